"""OUT of a model that is released with code and without a tokenizer.json needs no such code: tokens, config, files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import quantkit
from quantkit.calib.documents import Conversation
from quantkit.calib.tokenizer import load_text_tokenizer, load_tokenizer
from quantkit.checkpoint.published import published_config, published_files, published_notes
from quantkit.checkpoint.verify import verify
from quantkit.errors import CheckpointError
from quantkit.job.conversion import convert
from quantkit.model.registry import ARCHITECTURES
from quantkit.recipe import Recipe
from tests.helpers.architectures import RELEASED
from tests.helpers.released_layout import (
    AUTO_MAP,
    CODE_FILES,
    RANKS,
    TEMPLATE,
    TOKENIZER_CONFIG,
    VARIED,
    VOCAB,
    code_of,
    released_layout,
    their_ids,
)

RTN = Recipe(scheme="W8A16", method="rtn", group_size=32)


@pytest.fixture
def released(make_model: Callable[..., Path]) -> Path:
    return released_layout(make_model(vocab_size=VOCAB))


def test_out_names_and_holds_no_code(released: Path, tmp_path: Path) -> None:
    """Also where a checkpoint of another tool is converted, which still has its code."""
    record = quantkit.quantize(released, tmp_path / "out", RTN)
    shutil.copytree(tmp_path / "out", tmp_path / "theirs")
    (tmp_path / "theirs" / "SHA256SUMS").unlink()
    (tmp_path / "theirs" / "hy.tiktoken").unlink()
    convert(released_layout(tmp_path / "theirs"), tmp_path / "again", "bf16")
    for folder in (tmp_path / "out", tmp_path / "again"):
        config = json.loads((folder / "config.json").read_text())
        assert "auto_map" not in config and config["rope_scaling"]["alpha"] == 1000.0
        stated = json.loads((folder / "tokenizer_config.json").read_text())
        kept = {key: value for key, value in TOKENIZER_CONFIG.items() if key not in ("auto_map", "tokenizer_class")}
        assert stated == {**kept, "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|startoftext|>"}
        assert not list(folder.glob("*.py")) and (folder / "tokenizer.json").is_file()
    said = " ".join(record["notes"])
    assert "auto_map" in said and "made from hy.tiktoken" in said and all(name in said for name in CODE_FILES)
    verify(tmp_path / "out", released)
    assert not list(tmp_path.rglob("ran"))


def test_tokens_are_those_of_the_released_reading(released: Path, tmp_path: Path) -> None:
    quantkit.quantize(released, tmp_path / "out", RTN)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in VARIED:
        ids = their_ids(text)
        assert theirs(text)["input_ids"] == ids, text
        assert load_tokenizer(released).encode(text).ids == load_tokenizer(tmp_path / "out").encode(text).ids == ids
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == unicodedata.normalize("NFC", text)
        shown = [i for i in ids if i < len(RANKS)]
        assert theirs.decode(ids, skip_special_tokens=True) == theirs.decode(shown)
    messages = [{"role": "user", "content": "the 人"}, {"role": "assistant", "content": "in"}]
    written = "<|startoftext|>the 人<|extra_0|>in<|eos|>"
    assert theirs.chat_template == TEMPLATE
    assert theirs.apply_chat_template(messages, tokenize=True, return_dict=False) == their_ids(written)
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == ("<|startoftext|>", "<|eos|>", "<|pad|>")
    assert set(theirs("the")) == {"input_ids", "attention_mask"}  # what the model takes


def test_a_process_that_trusts_no_code_loads_it(released: Path, tmp_path: Path) -> None:
    """In a process of its own: nothing is registered there but what quantkit registers."""
    quantkit.quantize(released, tmp_path / "out", RTN)
    code = """
import sys, transformers
out = sys.argv[1]
tokenizer = transformers.AutoTokenizer.from_pretrained(out)  # before: it needs nothing of quantkit
from quantkit.engines.transformers_model import register
register()
assert type(transformers.AutoConfig.from_pretrained(out)).__module__.startswith("quantkit.")
assert transformers.AutoTokenizer.from_pretrained(out)("the")["input_ids"] == tokenizer("the")["input_ids"]
model = transformers.AutoModelForCausalLM.from_pretrained(out)
given = tokenizer("the 人", return_tensors="pt")
print(model.generate(**given, max_new_tokens=4, do_sample=False).shape[1] - given["input_ids"].shape[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert 1 <= int(done.stdout) <= 4 and not list(tmp_path.rglob("ran"))


def test_a_document_begins_as_the_tokenizers_config_says(released: Path) -> None:
    """The released class has `add_bod_token`. Its `add_eod_token` would end a prompt, and nothing follows an end."""
    start = len(RANKS) + 1
    assert load_tokenizer(released).encode("the").ids == their_ids("the")
    stated = {**TOKENIZER_CONFIG, "add_bod_token": True, "add_eod_token": True}
    (released / "tokenizer_config.json").write_text(json.dumps(stated))
    tokenizer = load_tokenizer(released)
    assert tokenizer.encode("the").ids == [start, *their_ids("the")]
    assert tokenizer.encode("the", add_special_tokens=False).ids == their_ids("the")


def test_hunyuan_a13b_has_one_special_token_more(released: Path) -> None:
    config = {**RELEASED["hunyuan-a13b"], "auto_map": AUTO_MAP}
    (released / "config.json").write_text(json.dumps(config))
    for text in VARIED:
        assert load_tokenizer(released).encode(text).ids == their_ids(text, 205)
    files = published_files(released, config)
    assert files["tokenizer.json"] and files["tokenizer_config.json"]
    assert "bos_token" not in json.loads(files["tokenizer_config.json"])  # its class states none


@pytest.mark.parametrize("place", ["tokenizer_config.json", "tokenizer_config.json, old spelling", "config.json"])
def test_own_tokenizer_code_goes_where_there_is_a_tokenizer_json(
    place: str, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Any model that engines know."""
    own: list[Any] = ["tokenization_own.T", None]
    auto_map = own if "old" in place else {"AutoTokenizer": own}
    model = make_model(**({"auto_map": auto_map} if place == "config.json" else {}))
    stated = {"tokenizer_class": "T", "eos_token": "<|end|>", **({} if place == "config.json" else {"auto_map": auto_map})}
    (model / "tokenizer_config.json").write_text(json.dumps(stated))
    (model / "tokenization_own.py").write_text(code_of(model))
    quantkit.quantize(model, tmp_path / "out", RTN)
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("ab")["input_ids"] == load_tokenizer(model).encode("ab").ids and tokenizer.eos_token == "<|end|>"
    assert not list((tmp_path / "out").glob("*.py")) and not list(tmp_path.rglob("ran"))


def test_what_only_its_own_code_reads_keeps_it(released: Path, tmp_path: Path) -> None:
    """A tokenizer in a form that quantkit cannot read; a class that no engine has; an architecture that is not known."""
    config = json.loads((released / "config.json").read_text())
    (released / "hy.tiktoken").rename(released / "other.tiktoken")
    assert published_files(released, config) == {"configuration_hunyuan.py": None, "modeling_hunyuan.py": None}
    assert any("flag" in note for note in published_notes(released, config))
    quantkit.quantize(released, tmp_path / "out", RTN)
    assert [path.name for path in (tmp_path / "out").glob("*.py")] == ["tokenization_hy.py"]
    assert "auto_map" in json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    moved = {**config, "auto_map": {**AUTO_MAP, **TOKENIZER_CONFIG["auto_map"]}}  # all in config.json, which OUT has without
    (released / "tokenizer_config.json").unlink()
    written = published_files(released, moved)["tokenizer_config.json"]
    assert written and json.loads(written) == {"auto_map": TOKENIZER_CONFIG["auto_map"]}
    for foreign in ({**config, "architectures": ["MyForCausalLM"]}, {**config, "model_type": "mine"}):
        assert published_config(foreign, None) == foreign and not published_files(released, foreign)
        assert not published_notes(released, foreign)


def test_a_broken_file_is_refused_before_any_work(released: Path, tmp_path: Path) -> None:
    """Rounding needs no tokens, and would have found out at its end."""
    (released / "hy.tiktoken").write_text("$$$ 1\n")
    with pytest.raises(CheckpointError, match=r"hy\.tiktoken"):
        quantkit.quantize(released, tmp_path / "out", RTN)
    assert not list(tmp_path.glob("out*"))


def test_config_is_the_sources_but_for_what_is_said() -> None:
    source: dict[str, Any] = {
        "model_type": "llama",
        "auto_map": {"AutoConfig": "c.C"},
        "a": [1],
        "quantization_config": {"x": 1},
    }
    assert published_config(source, {"y": 2}) == {"model_type": "llama", "a": [1], "quantization_config": {"y": 2}}
    assert published_config(source, None) == {"model_type": "llama", "a": [1]}
    assert all(row.native for row in ARCHITECTURES.values())  # a new architecture says which classes are its own


def test_the_source_has_the_special_tokens_that_its_own_class_assumes(released: Path, tmp_path: Path) -> None:
    """Calibration on the source sees what engines see that serve OUT."""
    for stated in ({"chat_template": "{{ bos_token }}{{ messages[0].content }}"}, None):
        settings = released / "tokenizer_config.json"
        settings.unlink(missing_ok=True)
        if stated:
            settings.write_text(json.dumps(stated))
        out = tmp_path / f"out-{stated is None}"
        quantkit.quantize(released, out, RTN)
        ours, theirs = load_text_tokenizer(released), load_text_tokenizer(out)
        assert ours.bos == theirs.bos and ours.bos.token == "<|startoftext|>" and ours.encode("the") == theirs.encode("the")
        if stated:
            asked = Conversation([{"role": "user", "content": "the"}])
            assert ours.encode_document(asked) == theirs.encode_document(asked) == their_ids("<|startoftext|>the")
