"""Conversations and raw text become the ids that transformers gives, with one beginning of text; templates under limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantkit.calib.chat import Chat, Settings
from quantkit.calib.documents import Conversation
from quantkit.calib.tokenizer import TextTokenizer, end_tokens, load_text_tokenizer
from quantkit.errors import CalibrationError, CheckpointError, ConfigError
from tests.conftest import byte_tokenizer
from tests.helpers.commands import not_quantized, refused
from tests.helpers.tokenizer_layouts import LAYOUTS, MESSAGES, added, byte_level, write_tokenizer

TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
CALL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


def configured(folder: Path, **config: Any) -> Path:
    """A byte-level tokenizer with tokens <s>, </s> and <sep>, and these settings."""
    folder.mkdir(exist_ok=True)
    byte_level("<s>", "</s>", "<sep>").save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def chat(template: str, seconds: float = 10) -> Chat:
    return Chat("MODEL", Settings(byte_tokenizer(), {"bos_token": "<s>"}, [], template), seconds)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversations_have_transformers_ids(layout: str, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = write_tokenizer(tmp_path / "model", layout)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = load_text_tokenizer(folder)
    ids = tokenizer.encode_document(Conversation(MESSAGES))
    assert ids == theirs.apply_chat_template(MESSAGES, tokenize=True)["input_ids"]
    assert ids[0] == theirs.bos_token_id != ids[1]
    assert tokenizer.decode(ids, skip_special=False) == theirs.decode(ids)
    asked = tokenizer.render(Conversation(MESSAGES[:2]), add_generation_prompt=True)
    assert asked == theirs.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_raw_text_gets_the_bos_it_was_trained_with_once(layout: str, tmp_path: Path) -> None:
    """Also DeepSeek's, whose post-processor writes none: transformers 5 then runs the model without."""
    folder = write_tokenizer(tmp_path / "model", layout)
    tokenizer, without = load_text_tokenizer(folder), load_text_tokenizer(folder, add_bos=False)
    bos = tokenizer.bos.id
    assert tokenizer.bos.added and bos is not None
    assert tokenizer.encode("hi")[0] == bos and tokenizer.encode("hi").count(bos) == 1
    assert tokenizer.encode("hi")[1:] == without.encode("hi") and bos not in without.encode("hi")
    written = f"{tokenizer.bos.token}hi"  # as files hold that somebody has sent through a template
    assert tokenizer.encode(written).count(bos) == 1 and without.encode(written)[0] == bos


@pytest.mark.parametrize(
    ("config", "bos", "added_", "why"),
    [
        ({}, None, True, "post-processor"),
        ({"add_bos_token": False}, None, True, "post-processor"),
        ({"add_bos_token": False, "tokenizer_class": "LlamaTokenizerFast"}, None, False, "add_bos_token is false"),
        ({"tokenizer_class": "LlamaTokenizer"}, "none", True, "where it is not said"),
        ({"add_bos_token": True}, "none", True, "add_bos_token is true"),
        ({}, "none", False, "writes none"),
    ],
)
def test_the_rule_of_bos(config: dict[str, Any], bos: str | None, added_: bool, why: str, tmp_path: Path) -> None:
    folder = configured(tmp_path / "model", bos_token="<s>", **config)
    if bos is None:
        byte_level("<s>", "</s>", "<sep>", bos="<s>").save(str(folder / "tokenizer.json"))
    tokenizer = load_text_tokenizer(folder)
    assert (tokenizer.bos.added, tokenizer.encode("a")[0] == tokenizer.bos.id) == (added_, added_)
    assert why in tokenizer.bos.why
    assert load_text_tokenizer(folder, add_bos=True).encode("a")[0] == tokenizer.bos.id


def test_bos_that_no_file_names(tmp_path: Path) -> None:
    folder = configured(tmp_path / "model", eos_token="</s>")
    assert load_text_tokenizer(folder).bos.added is None
    with pytest.raises(ConfigError, match="--add-bos"):
        load_text_tokenizer(folder, add_bos=True)
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 257}))
    assert load_text_tokenizer(folder, add_bos=True).encode("a")[0] == 257
    assert 257 not in load_text_tokenizer(folder).encode("a")
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": "yes"}))
    with pytest.raises(CheckpointError, match="add_bos_token is 'yes'"):
        load_text_tokenizer(folder)


def test_every_special_token_reaches_the_template(tmp_path: Path) -> None:
    """From each of the files that transformers reads, as strings and as objects."""
    names = ("bos", "eos", "unk", "sep", "pad", "cls", "image", "extra")
    template = "|".join(f"{{{{ {name}_token }}}}" for name in names) + "{{ additional_special_tokens[0] }}"
    config = {
        "bos_token": added("<s>"),
        "eos_token": "</s>",
        "sep_token": added("<sep>"),
        "image_token": "<img>",
        "extra_special_tokens": {"extra_token": "<x>"},
        "chat_template": template,
    }
    folder = configured(tmp_path / "model", **config)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": added("<pad>") | {"special": True}, "cls_token": "<cls>", "unk_token": "<unk>"})
    )
    from transformers import PreTrainedTokenizerFast

    del config["chat_template"]
    text = template.removesuffix("{{ additional_special_tokens[0] }}")
    read = PreTrainedTokenizerFast.from_pretrained(folder)
    theirs = read.apply_chat_template(MESSAGES, chat_template=text, tokenize=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": text}))
    found = load_text_tokenizer(folder).render(Conversation(MESSAGES))
    assert found == theirs == "<s>|</s>|<unk>|<sep>|<pad>|<cls>|<img>|<x>"
    lists = {**config, "extra_special_tokens": ["<one>", "<two>"], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(lists))
    assert load_text_tokenizer(folder).render(Conversation(MESSAGES)).endswith("<img>|<one>")


def test_tokens_that_only_the_settings_add_are_tokens_everywhere(tmp_path: Path) -> None:
    """ChatML fine-tunes often leave tokenizer.json as it was."""
    folder = configured(tmp_path / "model", added_tokens_decoder={"259": added("<|im_start|>") | {"special": True}})
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    del raw["added_tokens_decoder"]["259"]["__type"]
    (folder / "tokenizer_config.json").write_text(json.dumps(raw))
    assert load_text_tokenizer(folder).encode("<|im_start|>") == [259]


TEMPLATES: dict[str, Callable[[Path], Any]] = {
    "a string": lambda f: config(f, chat_template="own " + TURNS),
    "a list of named ones": lambda f: config(
        f, chat_template=[{"name": "rag", "template": "no"}, {"name": "default", "template": "own " + TURNS}]
    ),
    "chat_template.jinja": lambda f: (f / "chat_template.jinja").write_text("own " + TURNS),
    "chat_template.json": lambda f: (f / "chat_template.json").write_text(json.dumps({"chat_template": "own " + TURNS})),
    "additional_chat_templates": lambda f: (
        (f / "chat_template.jinja").write_text("own " + TURNS),
        (f / "additional_chat_templates").mkdir(),
        (f / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].function.name }}"),
    ),
}


def config(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("place", TEMPLATES)
def test_a_template_is_found_where_transformers_finds_it(place: str, tmp_path: Path) -> None:
    folder = configured(tmp_path / "model")
    if place == "chat_template.jinja":  # it comes before the one in the settings
        config(folder, chat_template="no")
    TEMPLATES[place](folder)
    tokenizer = load_text_tokenizer(folder)
    assert tokenizer.render(Conversation(MESSAGES[1:2])) == "own <user>hi  there, 人"
    if place == "additional_chat_templates":
        assert tokenizer.render(Conversation(MESSAGES, {"tools": [CALL]})) == "f"


def test_named_templates_without_a_default_are_refused(tmp_path: Path) -> None:
    folder = configured(tmp_path / "model", chat_template=[{"name": "rag", "template": "no"}])
    with pytest.raises(CalibrationError, match="named rag"):
        load_text_tokenizer(folder).render(Conversation(MESSAGES))
    config(folder, chat_template=[{"template": "no"}])
    with pytest.raises(CheckpointError, match="tokenizer_config.json"):
        load_text_tokenizer(folder)


def test_what_a_row_says_reaches_the_template_or_is_refused() -> None:
    reads = chat("{{ date_string }}{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + TURNS)
    row = {"tools": [CALL], "date_string": "1 May", "id": 7, "namespace": "n", "padding": 1}
    assert reads.render(Conversation(MESSAGES[1:2], row)) == "1 Mayf<user>hi  there, 人"
    for name, value in {"tools": [CALL], "documents": [{"title": "a", "text": "b"}]}.items():
        with pytest.raises(CalibrationError, match=f"'{name}', which the chat template of MODEL does not read"):
            chat(TURNS).render(Conversation(MESSAGES, {name: value}))
    with pytest.raises(CalibrationError, match="'padding', which cannot be passed"):
        chat("{{ padding }}").render(Conversation(MESSAGES, {"padding": 1}))


def test_templates_have_limits() -> None:
    """Time costs the process, and the next conversation has another."""
    one = chat(TURNS, seconds=0.5)
    for template, words in {
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "ran for more than 0.5 s",
        "{{ 'x' * 10**10 }}": "more memory",
        "{% for a in range(20000) %}{{ 'x' * 1000 }}{% endfor %}": "writes 20,000,000 characters",
        "{{ raise_exception('no system role') }}": "refuses these messages: no system role",
        "{% for %}": "refuses",
        "{{ messages[0].__class__.__mro__ }}": "refuses",
    }.items():
        one.settings = chat(template).settings
        with pytest.raises(CalibrationError, match=f"a.jsonl line 3: the chat template of MODEL .*{words}"):
            one.render(Conversation(MESSAGES, where="a.jsonl line 3"))
    one.settings = chat(TURNS).settings
    assert one.render(Conversation(MESSAGES[1:2])) == "<user>hi  there, 人"


def test_many_conversations_cost_one_process() -> None:
    one = chat(TURNS)
    process = None
    for i in range(200):
        assert one.render(Conversation([{"role": "user", "content": str(i), "name": None}])) == f"<user>{i}"
        process = process or one._process
    assert one._process is process


# The library's errors and panics

CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "BAAAAGFiY2R4eXo="}
MISSING = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"}
PREFIX = {"continuing_subword_prefix": "##é", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"normalizer": CHARSMAP}, "index out of bounds"),
        ({"normalizer": {**CHARSMAP, "precompiled_charsmap": "BQ=="}}, "is not a tokenizer: Precompiled"),
        ({"model": {"type": "BPE", **PREFIX}}, "is not a tokenizer: range end index"),
        ({"model": MISSING, "pre_tokenizer": None}, "Missing [UNK] token"),
    ],
    ids=["panics on text", "panics at loading", "panics at a prefix", "no unk token"],
)
def test_panics_and_errors_of_the_library_are_errors_of_the_file(
    change: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    """In every command that reads text; 1 is a verdict, and a panic is no Exception."""
    path = model / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    (tmp_path / "a.txt").write_text("some words " * 50)
    quick = ("--samples", "2", "--seq-len", "16", "--group-size", "32")
    for message in (
        not_quantized(model, "--calibration", tmp_path / "a.txt", *quick),
        refused("eval", model, "--baseline", model, "--text", tmp_path / "a.txt"),
        refused("generate", model, "--prompt", "some words"),
    ):
        assert "tokenizer.json" in message and words in message, message


def test_a_panic_when_ids_are_read_back_is_an_error() -> None:
    class Panics:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            raise type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})("index")

    with pytest.raises(CheckpointError, match="cannot decode ids: index"):
        TextTokenizer(Panics()).decode([1])  # type: ignore[arg-type]


# End tokens


@pytest.mark.parametrize(
    ("config_", "generation", "ends"),
    [
        (2, None, {2}),
        ([2, 3], [3, 4], {2, 3, 4}),
        (None, 5, {5}),
        (0, [], {0}),
        (None, None, set()),
    ],
)
def test_end_tokens_are_those_of_both_files(config_: object, generation: Any, ends: set[int], tmp_path: Path) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert end_tokens(tmp_path, {"eos_token_id": config_}) == ends


@pytest.mark.parametrize("bad", [{"a": 1}, [[1]], True, [True], "2", -1, 1.0])
def test_end_tokens_that_are_no_ids_are_refused(bad: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="config.json: eos_token_id is"):
        end_tokens(tmp_path, {"eos_token_id": bad})
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": bad}))
    with pytest.raises(ConfigError, match="generation_config.json: eos_token_id is"):
        end_tokens(tmp_path, {})
