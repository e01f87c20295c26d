"""A model's tokenizer, through which all text becomes ids: calibration, evaluation, generation, samples and tasks.

A conversation goes through the model's chat template, which writes the special tokens, and is encoded without adding any:
the ids are those of transformers' `apply_chat_template(tokenize=True)`. Raw text gets the beginning-of-text token (BOS)
that the model was trained with, or what `add_bos` says. The vocabulary is tokenizer.json's as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from quantkit.calib.chat import Chat, settings_of
from quantkit.calib.documents import Conversation, Document
from quantkit.checkpoint import hy_tiktoken
from quantkit.checkpoint.reader import load_json
from quantkit.errors import CheckpointError, ConfigError, QuantkitError

__all__ = ["Bos", "TextTokenizer", "end_tokens", "has_tokenizer", "load_text_tokenizer", "load_tokenizer"]

_MARGIN = 128  # tokens before a cut in the text that are not believed: what follows could have changed them
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")


@contextmanager
def guarded(problem: str, fix: str) -> Iterator[None]:
    """What the tokenizers library raises as a CheckpointError; its panics too, which are no Exception."""
    try:
        yield
    except (QuantkitError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{problem}: {reason[:300]}", fix) from error


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", hy_tiktoken.FILE))


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a model folder, or Hunyuan's hy.tiktoken, without what the files beside it say. Raises
    CheckpointError when there is none to be read."""
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / hy_tiktoken.FILE).is_file():
        with guarded(f"{folder / hy_tiktoken.FILE} is not a tokenizer", "fetch the file again"):
            return hy_tiktoken.load(folder / hy_tiktoken.FILE)
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor {hy_tiktoken.FILE}",
            "add one: quantkit runs no tokenizer code that comes with a model",
        )
    with guarded(f"{path} is not a tokenizer", "fetch the file again"):
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_truncation()  # the file may ask for them, for a use of its own
        tokenizer.no_padding()
    return tokenizer


@dataclass(frozen=True)
class Bos:
    """The beginning-of-text token. id, token: None where no file names one. added: whether raw text gets it (None: nobody
    knows it, and the tokenizer's post-processor does what it does), and why."""

    id: int | None = None
    token: str | None = None
    added: bool | None = None
    why: str = "no file names a BOS token: the tokenizer's own post-processor decides"


class TextTokenizer:
    """Text and conversations to ids, and ids to text. Where the tokenizers library fails or panics, each method raises
    CheckpointError with the file and the reason."""

    def __init__(self, tokenizer: Tokenizer, bos: Bos = Bos(), chat: Chat | None = None, name: str = "tokenizer") -> None:
        self.bos, self.chat, self.name = bos, chat or Chat(name), name
        self._tokenizer = tokenizer
        self._written = bos.token is not None and _written(tokenizer, bos, name)  # by the post-processor

    def _guard(self, what: str) -> Any:
        return guarded(f"{self.name} cannot {what}", "fetch the tokenizer's files again, or repair them")

    def encode(self, text: str, limit: int | None = None) -> list[int]:
        """Ids of raw text, with BOS as `bos` says, never twice. limit: at most so many; only as much text is read."""
        return self._first(text, limit, self._raw)

    def encode_written(self, text: str, limit: int | None = None) -> list[int]:
        """Ids of text that a chat template wrote: no special token is added to its own. limit: as in `encode`."""
        return self._first(text, limit, self._plain)

    def encode_document(self, document: Document, limit: int | None = None) -> list[int]:
        """Ids of a text, or of a conversation through the chat template. Raises CalibrationError where that refuses."""
        if isinstance(document, Conversation):
            return self.encode_written(self.render(document), limit)
        return self.encode(document, limit)

    def render(self, conversation: Conversation, **how: bool) -> str:
        """The text of a conversation. how: add_generation_prompt, continue_final_message."""
        return self.chat.render(conversation, **how)

    def _plain(self, text: str) -> list[int]:
        with self._guard("encode the text"):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _raw(self, text: str) -> list[int]:
        if self.bos.id is None or self.bos.added is None:
            with self._guard("encode the text"):
                return list(self._tokenizer.encode(text, add_special_tokens=self.bos.added is not False).ids)
        with self._guard("encode the text"):
            ids = list(self._tokenizer.encode(text).ids)
        ids = ids[1:] if self._written else ids
        return [self.bos.id, *ids] if self.bos.added and ids[:1] != [self.bos.id] else ids

    def _first(self, text: str, limit: int | None, encode: Callable[[str], list[int]]) -> list[int]:
        if limit is None:
            return encode(text)
        length = 8 * limit + 1024
        while length < len(text):
            ids = encode(text[:length])
            if len(ids) >= limit + _MARGIN:
                return ids[:limit]
            length *= 2
        return encode(text)[:limit]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        with self._guard("decode ids"):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def stream(self) -> Callable[[int], str | None]:
        """A function from the next id to the text that became whole with it, if any."""
        decoder = DecodeStream(ids=[], skip_special_tokens=True)

        def step(token: int) -> str | None:
            with self._guard("decode ids"):
                piece: str | None = decoder.step(self._tokenizer, token)
            return piece

        return step

    def token(self, token_id: int) -> str:
        token: str | None = self._tokenizer.id_to_token(token_id)
        return f"[{token_id}]" if token is None else token

    def vocabulary(self) -> dict[str, int]:
        return dict(self._tokenizer.get_vocab())


def _written(tokenizer: Tokenizer, bos: Bos, name: str) -> bool:
    """Whether the post-processor puts BOS before a text, at once or before other tokens. The token itself is the text, since
    every tokenizer can read it."""
    with guarded(f"{name} cannot encode its own BOS token", "fetch the tokenizer's files again"):
        plain, whole = (tokenizer.encode(bos.token, add_special_tokens=added).ids for added in (False, True))
    ours = [number == bos.id for number in whole]
    return ours[:1] == [True] and sum(ours) > sum(number == bos.id for number in plain)


def load_text_tokenizer(folder: Path, add_bos: bool | None = None) -> TextTokenizer:
    """The tokenizer of a model folder with the special tokens, added tokens and chat template of all its files.

    add_bos: whether raw text gets BOS; None: as the model was trained (see `_rule`). Raises CheckpointError, and ConfigError
    where BOS is asked for and no file names one.
    """
    tokenizer, file = load_tokenizer(folder), str(folder / "tokenizer.json")
    with guarded(f"the tokenizer settings of {folder} (tokenizer_config.json and others) do not fit", "fetch them again"):
        settings = settings_of(folder, tokenizer, _assumed(folder))
    if settings is not None:
        tokenizer = settings.tokenizer
    bos = _bos(folder, tokenizer, settings.special if settings else {}, add_bos)
    return TextTokenizer(tokenizer, bos, Chat(str(folder), settings), file)


def _assumed(folder: Path) -> dict[str, str]:
    """Special tokens that Hunyuan-Large's own tokenizer class takes where nothing is stated: OUT states them."""
    if (folder / "tokenizer.json").is_file() or not (folder / hy_tiktoken.FILE).is_file():
        return {}
    parts = (folder / "tokenizer_config.json", folder / "config.json")
    stated, config = (load_json(path) if path.is_file() else {} for path in parts)
    return {name: token for name, token in hy_tiktoken.settings({}, config).items() if name not in stated}


def _bos(folder: Path, tokenizer: Tokenizer, special: dict[str, str], add_bos: bool | None) -> Bos:
    token = special.get("bos_token")
    config = load_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if token is None and isinstance(bos_id := config.get("bos_token_id"), int) and bos_id >= 0:
        token = tokenizer.id_to_token(bos_id)
    token_id = tokenizer.token_to_id(token) if token is not None else None
    if add_bos is not None:
        if add_bos and token_id is None:
            problem = f"{folder} names no BOS token that its tokenizer has (bos_token is {token!r})"
            raise ConfigError(f"--add-bos: {problem}", "leave --add-bos out")
        return Bos(token_id, token, add_bos, "--add-bos" if add_bos else "--no-add-bos")
    if token_id is None:
        return Bos()
    bos = Bos(token_id, token)
    added, why = _rule(folder, "bos_token" in special, _written(tokenizer, bos, str(folder / "tokenizer.json")))
    return Bos(token_id, token, added, why)


def _rule(folder: Path, named: bool, written: bool) -> tuple[bool, str]:
    """Whether raw text gets BOS, and why.

    transformers 4, under which these models were trained, let Llama's tokenizer class do as `add_bos_token` says (true where
    it is not said), whatever tokenizer.json's post-processor did, and other classes do as the post-processor does.
    transformers 5 asks the post-processor alone: DeepSeek's models, whose post-processor writes none, then run without it.
    """
    path = folder / "tokenizer_config.json"
    config = load_json(path) if path.is_file() else {}
    flag, kind = config.get("add_bos_token"), config.get("tokenizer_class")
    if flag is not None and not isinstance(flag, bool):
        raise CheckpointError(f"{path}: add_bos_token is {flag!r}, not true or false", "fetch the file again")
    if kind in _LLAMA and named:
        why = f"add_bos_token is {str(flag).lower()}" if flag is not None else "add_bos_token is true where it is not said"
        return flag is not False, f"{kind}: {why}"
    if written:
        return True, "the post-processor of tokenizer.json writes it"
    if flag and named:
        return True, "add_bos_token is true"
    return False, "the post-processor of tokenizer.json writes none"


def end_tokens(folder: Path, config: dict[str, Any]) -> frozenset[int]:
    """Ids that end a text: `eos_token_id` of config.json (given) and of generation_config.json, each an id or a list of ids.
    Raises ConfigError for anything else there."""
    path = folder / "generation_config.json"
    ends: set[int] = set()
    for name, data in (("config.json", config), (path.name, load_json(path) if path.is_file() else {})):
        value = data.get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
            raise ConfigError(f"{folder / name}: eos_token_id is {value!r}", "give a token id, or a list of token ids")
        ends |= set(ids)
    return frozenset(ends)
