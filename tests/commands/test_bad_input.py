"""What a clumsy or hostile user can give: exit code 2, one message that names the place and the fix, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.checkpoint.reader import INDEX, CheckpointReader
from quantkit.errors import CheckpointError
from tests.conftest import CONFIG, write_checkpoint
from tests.helpers.commands import QUICK, accepted, not_quantized, refused
from tests.helpers.edits import SHARD, Break, edit, replace

KEY = "model.layers.0.mlp.experts.0.down_proj.weight"  # in that shard
KEPT, CROSS = "model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"


def fields(**values: object) -> Break:
    return edit("config.json", lambda config: config.update(values))


def index(shard: object) -> Break:
    return edit(INDEX, lambda data: data["weight_map"].update({KEY: shard}))


def cut(change: Callable[[bytes], bytes]) -> Break:
    return lambda model: (model / SHARD).write_bytes(change((model / SHARD).read_bytes()))


def header(change: Callable[[dict[str, Any]], object]) -> Break:
    """Change a shard's header; what is returned, if it is text, is the new header."""

    def apply(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        fields = json.loads(data[8:end])
        made = change(fields)
        text = (made if isinstance(made, str) else json.dumps(fields)).encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    return cut(apply)


def twice(fields: dict[str, Any]) -> str:
    """A header that names a tensor twice, with other shapes."""
    again = {**fields[KEY], "shape": [64, 128]}
    return f"{json.dumps(fields)[:-1]}, {json.dumps({KEY: again})[1:]}"


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Break:
    """Change the tensors of a shard, and the index with them."""

    def apply(model: Path) -> None:
        weights = load_file(model / SHARD)
        change(weights)
        save_file(weights, model / SHARD)
        old = json.loads((model / INDEX).read_text())["weight_map"]
        others = {key: shard for key, shard in old.items() if shard != SHARD}
        (model / INDEX).write_text(json.dumps({"weight_map": {**others, **dict.fromkeys(weights, SHARD)}}))

    return apply


UNREADABLE: dict[str, tuple[Break, tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("model is not a folder",)),
    "no config": (replace("config.json", None), ("config.json does not exist",)),
    "broken config": (replace("config.json", b'{"a":'), ("config.json is not readable JSON",)),
    "config not an object": (replace("config.json", b"[1]"), ("config.json holds a list",)),
    "config nested too deep": (replace("config.json", b"[" * 100_000), ("config.json is not readable JSON",)),
    "config with a huge number": (replace("config.json", b"9" * 5000), ("config.json is not readable JSON",)),
    "config not UTF-8": (replace("config.json", b"\xff"), ("config.json is not readable JSON",)),
    "no index": (replace(INDEX, None), (INDEX, "model.safetensors")),
    "empty index": (edit(INDEX, lambda data: data.update(weight_map={})), (INDEX, "'weight_map'")),
    "index with a list": (edit(INDEX, lambda data: data.update(weight_map=[1])), (INDEX, "'weight_map'")),
    "index leaves the folder": (index("../x.safetensors"), (INDEX, KEY, "'../x.safetensors'", "same folder")),
    "index with a path": (index("/etc/x.safetensors"), (INDEX, KEY, "'/etc/x.safetensors'", "same folder")),
    "index names a pickle": (index("x.bin"), (INDEX, KEY, "'x.bin'", ".safetensors")),
    "index names a number": (index(7), (INDEX, KEY, "7", ".safetensors")),
    "index names nothing there": (index("n" * 300 + ".safetensors"), (KEY, "does not exist")),
    "index names NUL": (index("a\0.safetensors"), (KEY, "same folder")),
    "index misses a tensor": (edit(INDEX, lambda data: data["weight_map"].pop(KEY)), (INDEX, KEY)),
    "index has one more": (edit(INDEX, lambda data: data["weight_map"].update(foo=SHARD)), (INDEX, "'foo'", SHARD)),
    "index swaps shards": (index(SHARD.replace("1", "2", 1)), (INDEX, KEY, SHARD.replace("1", "2", 1))),
    "shard missing": (replace(SHARD, None), (SHARD, "does not exist")),
    "shard empty": (replace(SHARD, b""), (SHARD, "0 bytes")),
    "shard cut in its header": (cut(lambda data: data[:500]), (SHARD, "500 bytes", "truncated")),
    "shard cut in its data": (cut(lambda data: data[:-500]), (SHARD, "truncated")),
    "shard too long": (cut(lambda data: data + b"more"), (SHARD, "damaged")),
    "shard is a pickle": (cut(lambda data: b"PK\x03\x04" + data), (SHARD, "damaged")),
    "header of 8 EB": (cut(lambda data: (2**63).to_bytes(8, "little") + data[8:]), (SHARD, "too large")),
    "header nested too deep": (header(lambda h: '{"a":' + "[" * 100_000), (SHARD, "damaged")),
    "offsets overlap": (header(lambda h: h[KEY].update(data_offsets=[0, 128 * 64 * 2])), (SHARD, "offset")),
    "offsets out of range": (header(lambda h: h[KEY].update(data_offsets=[2**40, 2**40 + 2**14])), (SHARD, "offset")),
    "offsets reversed": (header(lambda h: h[KEY]["data_offsets"].reverse()), (SHARD, "offset")),
    "shape overflows": (header(lambda h: h[KEY].update(shape=[2**63, 2**63])), (SHARD, "overflow")),
    "dtype unheard of": (header(lambda h: h[KEY].update(dtype="Q4")), (SHARD, "Q4")),
    "dtype not supported": (header(lambda h: h[KEY].update(dtype="U16")), (SHARD, KEY, "U16", "BF16")),
    "unknown architecture": (fields(model_type="mamba2"), ("config.json", "'mamba2'", "hunyuan_v1_moe")),
    "architecture of lists": (fields(model_type=["hunyuan"]), ("config.json", "['hunyuan']", "hunyuan_v1_moe")),
    "gelu": (fields(hidden_act="gelu"), ("config.json", "'hidden_act'", "'gelu'", "'silu'")),
    "attention bias": (fields(attention_bias=True), ("config.json", "'attention_bias'", "True", "False")),
    "yarn": (
        fields(rope_scaling={"type": "yarn", "alpha": 1.0}),
        ("config.json", "rope_scaling.type", "'yarn'", "'dynamic'"),
    ),
    "layers differ": (fields(moe_topk=[1, 2, 1, 1]), ("config.json", "'moe_topk'", "[1, 2, 1, 1]", "layers differ")),
    "list of lists": (fields(moe_topk=[[1], {}]), ("config.json", "'moe_topk'", "layers differ")),
    "positions in words": (
        fields(max_position_embeddings="x"),
        ("config.json", "'max_position_embeddings'", "'x'", "integer"),
    ),
    "size as text": (fields(hidden_size="128"), ("config.json", "'hidden_size'", "'128'", "integer")),
    "dtype that is none": (fields(torch_dtype="foo"), ("config.json", "'torch_dtype'", "'foo'", "'bfloat16'")),
    "dtype by its newer name": (fields(dtype=16), ("config.json", "'dtype'", "16", "'bfloat16'")),
    "negative size": (fields(hidden_size=-4), ("config.json", "'hidden_size'", "-4", "greater than 0")),
    "a million layers": (fields(num_hidden_layers=10**6), ("config.json", "'num_hidden_layers'", "1000")),
    "infinite epsilon": (fields(rms_norm_eps=float("inf")), ("config.json", "'rms_norm_eps'", "finite")),
    "rope that overflows": (fields(rope_scaling={"type": "dynamic", "alpha": 1e308}), ("config.json", "alpha")),
    "heads of 2": (fields(head_dim=2), ("config.json", "head_dim is 2", "at least 4")),
    "heads that do not group": (fields(num_key_value_heads=3), ("config.json", "num_key_value_heads 3", "multiple")),
    "more chosen than there are": (fields(moe_topk=9), ("config.json", "moe_topk 9", "num_experts 4")),
    "rope_parameters": (
        fields(model_type="hunyuan_v1_moe", moe_topk=2, use_cla=False, rope_parameters=[1]),
        ("config.json", "rope_parameters"),
    ),
}
UNFIT: dict[str, tuple[Break, tuple[str, ...]]] = {
    "tensor missing": (tensors(lambda w: w.pop(KEY)), ("1 missing", KEY)),
    "tensor too many": (tensors(lambda w: w.update(foo=torch.ones(2))), ("1 unexpected", "'foo'")),
    "k_proj on a cross layer": (tensors(lambda w: w.update({CROSS: torch.ones(64, 128)})), ("1 unexpected", CROSS)),
    "layers missing": (fields(num_hidden_layers=6), ("missing", "model.layers.4.")),
    "name given twice": (header(twice), (SHARD, KEY, "twice")),
    "wrong shape": (tensors(lambda w: w.update({KEY: w[KEY][:5].clone()})), (SHARD, KEY, "(5, 64)", "(128, 64)")),
    "integers": (tensors(lambda w: w.update({KEY: w[KEY].to(torch.int8)})), (SHARD, KEY, "I8", "BF16")),
    "head of another shape": (tensors(lambda w: w.update({"lm_head.weight": torch.ones(3)})), (SHARD, "lm_head", "(3,)")),
    "NaN": (tensors(lambda w: w[KEY][1].__setitem__(3, torch.nan)), (SHARD, KEY, "1 NaN or infinite", "index 67")),
    "infinity": (tensors(lambda w: w[KEY].fill_(-torch.inf)), (SHARD, KEY, "8192 NaN or infinite")),
    "NaN in a kept tensor": (tensors(lambda w: w[KEPT].fill_(torch.nan)), (SHARD, KEPT, "NaN")),
    "quantized already": (fields(quantization_config={"quant_method": "gptq"}), ("config.json", "already quantized")),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_unreadable_checkpoints(case: str, model: Path) -> None:
    spoil, words = UNREADABLE[case]
    spoil(model)
    for message in (
        not_quantized(model, *QUICK),
        refused("inspect", model),
        refused("eval", model, "--baseline", model),
        refused("verify", model),
    ):
        assert all(word in message for word in words), message


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_checkpoints(case: str, model: Path) -> None:
    spoil, words = UNFIT[case]
    spoil(model)
    message = not_quantized(model, *QUICK)
    assert str(model) in message and all(word in message for word in words), message
    refused("eval", model, "--baseline", model, "--seq-len", "16", "--windows", "2")


OPTIONS: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("model.layers.0.mlp.shared_mlp.down_proj.weight", "in_features 64", "group size 128", "--group-size"),
    ("--group-size", "48"): (".weight", "multiple of group size 48", "--group-size"),
    ("--group-size", "-1"): ("'group_size'", "-1", "8"),
    ("--group-size", "0"): ("'group_size' is 0", "greater than or equal to 8"),
    ("--scheme", "W3A16"): ("'W3A16'", "W4A16", "BF16"),
    ("--attention", "int4"): ("'int4'", "W4A16"),
    ("--scheme", "BF16"): ("nothing to quantize",),
    ("--samples", "0"): ("'samples'", "0", "1"),
    ("--seq-len", "0"): ("'seq_len'", "0", "8"),
    ("--seed", "-1"): ("'seed'", "-1", "0"),
    ("--device", "cuda:7"): ("'cuda:7'", "cpu"),
    ("--device", "banana"): ("'banana'", "cuda:N"),
    ("--device", "meta"): ("'meta'", "cuda:N"),
    ("--recipe", "missing.yaml"): ("missing.yaml", "YAML"),
}
RECIPES = {
    "a: [": ("recipe.yaml cannot be read",),
    "seed: 2024-99-99": ("recipe.yaml cannot be read",),
    "[" * 5000: ("recipe.yaml cannot be read",),
    "": ("recipe.yaml holds NoneType",),
    "- a": ("recipe.yaml holds list", "scheme: W4A16"),
    "1: 2": ("recipe.yaml", "'1'"),
    "scheme: W4A16\nscheme: W8A16": ("recipe.yaml cannot be read", "'scheme' is given twice", "line 2"),
    "rules: [{match: a, match: b, scheme: W8A16}]": ("recipe.yaml cannot be read", "'match' is given twice"),
    "bits: 4": ("recipe.yaml", "'bits'", "group_size"),
    "scheme: 4": ("recipe.yaml", "'scheme' is 4"),
    "rules: x": ("recipe.yaml", "'rules' is 'x'"),
    "rules: [{match: 'foo*', scheme: W8A16}]": ("'foo*'", "no linear", "model.layers"),
    "rules: [{match: '*.mlp.*', scheme: W3}]": ("'W3'", "W4A16"),
    "rules: [{match: '*.q_proj', scheme: W8A8}]": ("0.self_attn.q_proj", "k_proj", "alike"),
    "rules: [{match: '*.experts.0.*', scheme: W8A16}]": ("experts.0", "experts.1", "alike"),
}
SHORT = ("--samples", "2", "--seq-len", "16", "--group-size", "32")
TEXTS: dict[tuple[str, bytes | None], tuple[str, ...]] = {
    ("none.txt", None): ("none.txt", "stdlib", ".jsonl"),
    ("n" * 300, None): ("neither a file", "stdlib"),
    ("a.txt", b"\xff\xfe" * 50): ("a.txt", "UTF-8"),
    ("a.md", b"words " * 50): ("a.md", "'.md'", ".parquet"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text"'): ("a.jsonl line 3", "JSON"),
    ("b.jsonl", b'{"body": "a"}'): ("b.jsonl line 1", "'text'", "'messages'"),
    ("f.jsonl", b'{"text": 5}'): ("f.jsonl line 1 has 'text' of type int", "string"),
    ("g.jsonl", b"[1]"): ("g.jsonl line 1 is of type list", "'text'"),
    ("c.jsonl", b"[" * 100_000): ("c.jsonl line 1", "JSON"),
    ("d.jsonl", b'{"text": "\\ud800"}'): ("d.jsonl line 1", "Unicode"),
    ("e.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}'): (
        "e.jsonl line 1",
        "no chat template",
        "'text' instead",
        "chat_template.jinja",
    ),
    ("a.parquet", b"PAR1"): ("a.parquet", "parquet"),
}


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_options(options: tuple[str, ...], model: Path) -> None:
    message = not_quantized(model, *options)
    assert all(word in message for word in OPTIONS[options]), message
    refused("quantize", model, "-o", model.parent / "out", "--dry-run", *options)


def test_windows_are_no_longer_than_the_model_reads(make_model: Callable[..., Path]) -> None:
    model = make_model(max_position_embeddings=64)
    for options in ((), ("--dry-run",)):
        message = not_quantized(model, "--group-size", "32", "--seq-len", "65", *options)
        assert "seq_len 65" in message and "is 64" in message and "Fix: give --seq-len 64" in message
    accepted("quantize", model, "-o", "out", "--group-size", "32", "--samples", "2", "--seq-len", "64", "--dry-run")
    accepted("quantize", model, "-o", "out", "--seq-len", "65", "--dry-run", *QUICK)  # nothing is calibrated


@pytest.mark.parametrize("text", RECIPES, ids=lambda text: text[:40] or "empty")
def test_recipes(text: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    message = not_quantized(model, "--recipe", tmp_path / "recipe.yaml", *QUICK)
    assert all(word in message for word in RECIPES[text]), message


@pytest.mark.parametrize(("name", "data"), TEXTS, ids=lambda value: value[:9] if isinstance(value, str) else "")
def test_texts(name: str, data: bytes | None, model: Path, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    for message in (
        not_quantized(model, "--calibration", tmp_path / name, *SHORT),
        refused("eval", model, "--baseline", model, "--text", tmp_path / name),
    ):
        assert all(word in message for word in TEXTS[name, data]), message


def test_texts_too_short_and_not_text(model: Path, tmp_path: Path) -> None:
    for text in ("", "a"):
        (tmp_path / "a.txt").write_text(text)
        message = not_quantized(model, "--calibration", tmp_path / "a.txt", *SHORT)
        assert f"a.txt' has {len(text)} tokens" in message and "--samples" in message
        assert "a.txt" in refused("eval", model, "--baseline", model, "--text", tmp_path / "a.txt")
    for column, values in {"body": ["a"], "text": [1, 2]}.items():
        pyarrow.parquet.write_table(pyarrow.table({column: values}), tmp_path / "a.parquet")
        message = not_quantized(model, "--calibration", tmp_path / "a.parquet", *SHORT)
        assert "a.parquet" in message and "'text'" in message
    assert "neither a file" in not_quantized(model, "--calibration", tmp_path, *SHORT)


def test_line_separators_inside_a_string_do_not_end_a_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "' + "one\u2028two\u0085" * 20 + '"}\r\n', encoding="utf-8")
    accepted("eval", model, "--baseline", model, "--text", tmp_path / "a.jsonl", "--seq-len", "16", "--windows", "2")


def test_tokenizers(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words " * 50)
    path = model / "tokenizer.json"
    vocabulary = json.loads(path.read_text())
    cases = {" tokenizer.json": None, "tokenizer.json is not a tokenizer": b"{}"}
    for words, data in cases.items():
        replace("tokenizer.json", data)(model)
        assert words in not_quantized(model, "--calibration", tmp_path / "a.txt", *SHORT)
        assert words in refused("eval", model, "--baseline", model, "--text", tmp_path / "a.txt")
        path.touch()
    vocabulary["model"]["vocab"]["e"] = 300
    path.write_text(json.dumps(vocabulary))
    message = not_quantized(model, "--calibration", tmp_path / "a.txt", *SHORT)
    assert "gives id 300" in message and "256" in message


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that is mostly header."""
    weights = {
        "a": torch.ones(4),
        "b.weight": torch.ones(2, 3).bfloat16(),
        "c": torch.zeros(0, 2),
        "d": torch.ones(3).double(),
    }
    return write_checkpoint(tmp_path_factory.mktemp("fuzz") / "tiny", CONFIG, weights, shards=1)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([INDEX, "model-00001-of-00001.safetensors"]),
    changes=st.lists(st.tuples(st.integers(0, 450), st.sampled_from(b'0189"{}[],:-e\\') | st.integers(0, 255)), max_size=4),
    length=st.one_of(st.none(), st.integers(0, 450)),
)
def test_reader_survives_any_bytes(tiny: Path, name: str, changes: list[tuple[int, int]], length: int | None) -> None:
    """Whatever bytes change: every tensor reads, or a CheckpointError says why not."""
    original = (tiny / name).read_bytes()
    data = bytearray(original)
    for position, value in changes:
        data[position % len(data)] = value
    (tiny / name).write_bytes(data[:length])
    try:
        reader = CheckpointReader(tiny)
        for key, entry in reader.entries.items():
            assert tuple(reader.tensor(key).shape) == entry.shape
    except CheckpointError as error:
        assert str(tiny) in str(error) or "tensor" in str(error)
    finally:
        (tiny / name).write_bytes(original)
