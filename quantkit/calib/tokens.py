"""Text to token windows: for calibration (packed, all of one length) and for evaluation (by document, padded)."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from quantkit.calib import hy_tiktoken
from quantkit.calib.corpus import NAMED, named_documents
from quantkit.errors import CalibrationError, CheckpointError
from quantkit.formats.reader import load_json

__all__ = ["EvalSet", "calibration_windows", "chat_tokenizer", "digest", "documents", "evaluation_set", "load_tokenizer"]

_FORMATS = "a .txt, .jsonl (with 'text' or 'messages') or .parquet file (with a 'text' column)"


def load_tokenizer(folder: Path) -> Tokenizer:
    """tokenizer.json of a model folder, or Hunyuan's hy.tiktoken. Raises CheckpointError when there is none to be read."""
    path = folder / "tokenizer.json"
    if not path.is_file() and (folder / hy_tiktoken.FILE).is_file():
        return hy_tiktoken.load(folder / hy_tiktoken.FILE)
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has neither tokenizer.json nor {hy_tiktoken.FILE}",
            "add one: quantkit runs no tokenizer code that comes with a model",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for a file it cannot parse
        raise CheckpointError(f"{path} is not a tokenizer: {error}", "fetch the file again") from error
    tokenizer.no_truncation()  # the file may ask for them, for a use of its own
    tokenizer.no_padding()
    return tokenizer


def documents(source: str, folder: Path) -> list[str]:
    """The documents of a file or of a named corpus. `folder`: the model's, whose chat template `messages` need."""
    if source in NAMED:
        return named_documents(source)
    path = Path(source)
    if not os.path.isfile(path):
        raise CalibrationError(f"text '{source}' is neither a file nor one of {', '.join(NAMED)}", f"give {_FORMATS}")
    try:
        if path.suffix == ".txt":
            return [path.read_text("utf-8")]
        if path.suffix == ".jsonl":
            return _jsonl(path, folder)
        if path.suffix == ".parquet":
            return _parquet(path)
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as UTF-8 text: {error}", f"give {_FORMATS}") from error
    raise CalibrationError(f"{path} ends in '{path.suffix}'", f"give {_FORMATS}")


def _jsonl(path: Path, folder: Path) -> list[str]:
    texts = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path} line {number} is not JSON: {error}", "one JSON object a line") from error
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            texts.append(row["text"])
        elif isinstance(row, dict) and isinstance(row.get("messages"), list):
            texts.append(_chat(row["messages"], folder, f"{path} line {number}"))
        else:
            raise CalibrationError(f"{path} line {number} {_misfit(row)}", "give {'text': string} or {'messages': list}")
        try:
            texts[-1].encode()
        except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
            raise CalibrationError(f"{path} line {number} is not Unicode text: {error}", "repair or drop it") from error
    return texts


def _misfit(row: object) -> str:
    """What a line of JSON has in place of a string 'text' or a list 'messages'."""
    if not isinstance(row, dict):
        return f"is of type {type(row).__name__}, not an object"
    seen = [f"'{key}' of type {type(row[key]).__name__}" for key in ("text", "messages") if key in row]
    return f"has {' and '.join(seen)}" if seen else "has neither 'text' nor 'messages'"


def chat_tokenizer(folder: Path, where: str) -> Any:
    """transformers' PreTrainedTokenizerFast with the model's own chat template, which it renders in sandboxed Jinja.

    where: what asks for it, for the message. Raises CalibrationError when the folder has no template.
    """
    from transformers import PreTrainedTokenizerFast  # seconds to import

    config = load_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    template = folder / "chat_template.jinja"
    source = template.read_text("utf-8") if template.exists() else config.get("chat_template")
    if not isinstance(source, str):
        fix = "give plain 'text' instead, or add the chat_template.jinja of the model's chat version to the folder"
        raise CalibrationError(f"{where} has 'messages', but {folder} has no chat template", fix)
    special = {k: v for k, v in config.items() if k in ("bos_token", "eos_token", "pad_token") and isinstance(v, str)}
    return PreTrainedTokenizerFast(tokenizer_object=load_tokenizer(folder), chat_template=source, **special)


def _chat(messages: list[Any], folder: Path, where: str) -> str:
    """Messages through the model's own chat template."""
    tokenizer = chat_tokenizer(folder, where)
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template may raise anything; it is data of the model
        raise CalibrationError(f"{where}: the chat template refuses these messages: {error}", "check roles") from error


def _parquet(path: Path) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
        if "text" not in names:
            raise CalibrationError(f"{path} has columns {names}, none of them 'text'", "rename the one that holds text")
        values = pyarrow.parquet.read_table(path, columns=["text"]).column("text").to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CalibrationError(f"{path} cannot be read: {error}", "give a parquet file with a 'text' column") from error
    if other := {type(value).__name__ for value in values} - {"str", "NoneType"}:
        raise CalibrationError(f"column 'text' of {path} holds {', '.join(sorted(other))}", "give a column of strings")
    return [value for value in values if value]


def calibration_windows(
    tokenizer: Tokenizer, texts: list[str], samples: int, seq_len: int, seed: int, name: str = "given"
) -> Tensor:
    """int64 [samples, seq_len]: documents in random order, joined, cut into windows, `samples` of them drawn at random.

    Documents are taken until they give twice the tokens needed, so that a huge corpus costs no more than a large one.
    Raises CalibrationError when all of them give too few.
    """
    generator = np.random.default_rng(seed)
    parts: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    total, wanted = 0, 2 * samples * seq_len
    for index in generator.permutation(len(texts)):
        if total >= wanted:
            break
        parts.append(np.array(tokenizer.encode(texts[index]).ids, dtype=np.int64))
        total += len(parts[-1])
    count = total // seq_len
    if count < samples:
        raise CalibrationError(
            f"the calibration text '{name}' has {total:,} tokens: {count} windows of {seq_len}, and {samples} are asked for",
            "give more text, or lower --samples or --seq-len",
        )
    chosen = np.sort(generator.permutation(count)[:samples])
    return torch.from_numpy(np.concatenate(parts)[: count * seq_len].reshape(count, seq_len)[chosen])


@dataclass(frozen=True)
class EvalSet:
    """Windows to score. ids int64 [n, longest window], right-padded with 0; lengths int64 [n]; unit int64 [n].

    unit: which document a window belongs to, or itself when there is but one: what the bootstrap resamples.
    """

    ids: Tensor
    lengths: Tensor
    unit: Tensor
    unit_name: str

    def digest(self) -> str:
        """sha256 of the windows, of how long each is (padding is a token id too), and of the documents they are from."""
        return hashlib.sha256("".join(digest(part) for part in (self.ids, self.lengths, self.unit)).encode()).hexdigest()


def evaluation_set(tokenizer: Tokenizer, texts: list[str], seq_len: int, max_windows: int, name: str = "given") -> EvalSet:
    """The first windows of every document in turn, until `max_windows`. Raises CalibrationError when there is none."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    cuts = [[ids[i : i + seq_len] for i in range(0, len(ids), seq_len)] for ids in encoded]
    # Round-robin: every document gives its first window before any gives its second.
    order = sorted((w, d) for d, windows in enumerate(cuts) for w in range(len(windows)) if len(windows[w]) >= 2)
    chosen = sorted((d, w) for w, d in order[:max_windows])
    if not chosen:
        raise CalibrationError(f"the evaluation text '{name}' has no document of two tokens or more", "give more text")
    ids = torch.zeros(len(chosen), max(len(cuts[d][w]) for d, w in chosen), dtype=torch.int64)
    for row, (d, w) in enumerate(chosen):
        ids[row, : len(cuts[d][w])] = torch.tensor(cuts[d][w])
    lengths = torch.tensor([len(cuts[d][w]) for d, w in chosen])
    several = len({d for d, _ in chosen}) > 1
    unit = torch.tensor([d for d, _ in chosen]) if several else torch.arange(len(chosen))
    return EvalSet(ids, lengths, unit, "document" if several else "window")


def digest(ids: Tensor) -> str:
    """sha256 of token ids and their shape."""
    return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()
