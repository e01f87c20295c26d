"""`quantkit convert`: the same codes, scales and zero points in another format, or a refusal that says why.

Oracles: the files themselves (bytes after a round trip), compressed-tensors' own converters and decompressor, and the
numbers of tests/helpers/foreign.py; where it is installed, GPTQModel's own packing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.verify import damaged
from quantkit.formats.table import FORMATS
from quantkit.job import placement
from quantkit.job.conversion import TARGETS
from quantkit.model.spec import Linear, Role
from quantkit.qtensor import QuantizedTensor
from quantkit.recipe import Recipe
from quantkit.scheme import weight_only
from tests.conftest import random_weights, write_checkpoint
from tests.helpers.commands import accepted, refused
from tests.helpers.edits import edit
from tests.helpers.foreign import CASES, KEPT, SMALL_CONFIG
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs" / "formats.md"
LINEAR = "model.layers.0.mlp.experts.1.up_proj"
SOURCES = ("W4A16", "W4A16_ASYM", "W4AFP8", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint per scheme, made by quantkit, and the model they come from."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "model", SMALL_CONFIG, random_weights(SMALL_CONFIG))
    (folder / "a.txt").write_text("some words " * 50)
    for name in SOURCES:
        method = "gptq" if name in ("W4A16", "W8A16") else "rtn"  # whose scales have signs
        fields: dict[str, Any] = {"scheme": name, "method": method, "group_size": 32, "samples": 2, "seq_len": 16}
        quantkit.quantize(folder / "model", folder / name, Recipe(**fields, calibration=str(folder / "a.txt")))
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for shard in CheckpointReader(folder).shards for key, tensor in load_file(folder / shard).items()}


def same(a: Tensor, b: Tensor) -> bool:
    """The same bytes; scales may have another dtype if the values are the same."""
    if a.dtype is not b.dtype:
        return torch.equal(a.double().reshape(-1), b.double().reshape(-1))
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def table() -> Iterator[tuple[str, str, str]]:
    """(scheme, format, cell) of the table in docs/formats.md."""
    rows = [
        [cell.strip() for cell in line.strip("|\n ").split("|")] for line in DOCS.read_text().splitlines() if "|" in line
    ]
    head = next(row for row in rows if row[0] == "from \\ to")
    for row in rows[rows.index(head) + 2 :]:
        if row[0].strip("`") in SOURCES:
            yield from ((row[0].strip("`"), column.strip("`"), cell) for column, cell in zip(head[1:], row[1:], strict=True))


def test_the_documented_table_is_whole() -> None:
    assert {(source, to) for source, to, _ in table()} == {
        (s, t) for s in SOURCES for t in TARGETS if t != "compressed-tensors"
    }


@pytest.mark.parametrize(("source", "to", "cell"), table())
def test_the_documented_table_is_true(source: str, to: str, cell: str, made: Path, tmp_path: Path) -> None:
    """A 'yes' comes back from the other format with the bytes it went out with; a 'no' is refused and leaves nothing."""
    if cell == "no":
        message = refused("convert", made / source, "-o", tmp_path / "out", "--to", to, "--quiet")
        assert source in message and "keep it so" in message and "--to bf16" in message and not [*tmp_path.iterdir()]
        return
    record = quantkit.convert(made / source, tmp_path / "out", to)
    assert cell == ("values" if to == "bf16" else "yes" if not record["notes"] else "yes, as `W4A16_ASYM`")
    accepted("verify", tmp_path / "out", *(() if to == "bf16" else ("--source", made / "model")))
    if to == "bf16":
        return
    quantkit.convert(tmp_path / "out", tmp_path / "back", "compressed-tensors")
    there, back = tensors(made / source), tensors(tmp_path / "back")
    signs = {bool((t < 0).any()) for key, t in there.items() if key.endswith("weight_scale")}
    assert (True in signs) == (source in ("W4A16", "W8A16"))
    added = {key for key in back if key.endswith("weight_zero_point")} if "as" in cell else set()
    assert back.keys() - added == there.keys() and all(same(back[key], there[key]) for key in there)
    assert all((back[key] == 0x88888888 - 2**32).all() for key in added)
    ours, theirs = (quantkit.load(tmp_path / n, kernels="reference") for n in ("out", "back"))
    ids = torch.arange(1, 9)[None]
    assert torch.equal(ours.logits(ids), theirs.logits(ids))
    assert torch.equal(ours.logits(ids), quantkit.load(made / source, kernels="reference").logits(ids))


@pytest.mark.parametrize("name", CASES)
def test_foreign_ones_become_compressed_tensors(name: str, tmp_path: Path) -> None:
    """compressed-tensors' own decompressor makes the numbers of the definition from what was converted."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weights = CASES[name].write(tmp_path / "m")
    record = quantkit.convert(tmp_path / "m", tmp_path / "out", "compressed-tensors")
    assert record["lossless"] and record["rounded_weights"] == 0 and record["kept_linears"] == 1
    config = QuantizationConfig.model_validate(CheckpointReader(tmp_path / "out").config["quantization_config"])
    found, plain = tensors(tmp_path / "out"), tensors(tmp_path / "m")
    (group,) = config.config_groups.values()
    decompressor = BaseCompressor.get_value_from_registry(str(config.format))
    for key, weight in weights.items():
        state = {n.removeprefix(f"{key}."): t for n, t in found.items() if n.startswith(f"{key}.")}
        if "weight_scale" in state:  # the library multiplies in the scale's dtype; float32 holds these products
            state["weight_scale"] = state["weight_scale"].float()
        assert torch.equal(decompressor.decompress(state, group)["weight"].float(), weight.float()), key
    for key in (f"{KEPT}.weight", "model.embed_tokens.weight", *CASES[name].extra):
        assert same(found[key], plain[key])


def test_awq_is_what_another_converter_reads(made: Path, tmp_path: Path) -> None:
    """compressed-tensors' AutoAWQ converter brings our AWQ back to the words that quantkit first wrote."""
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    quantkit.convert(made / "W4A16_ASYM", tmp_path / "awq", "awq")
    config = CheckpointReader(tmp_path / "awq").config["quantization_config"]
    back = AutoAWQConverter.from_autoawq_config(config).process(tensors(tmp_path / "awq"))
    there = tensors(made / "W4A16_ASYM")
    assert back.keys() == there.keys() and all(same(back[key], there[key]) for key in there)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group", [32, None])
def test_gptqmodel_packs_the_same_words(bits: int, sym: bool, group: int | None) -> None:
    """GPTQModel packs the dequantized weight into the words that we write, in both versions; so does its AWQ."""
    gptqmodel = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="gptqmodel is not installed: it pins torch")
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    out, inputs, half = 64, 128, 2 ** (bits - 1)
    ref, scheme = Linear("a.b", out, inputs, Role.MLP), weight_only(bits, sym, group).stored("F16")
    shape = scheme.weight.scale_shape(out, inputs)
    zero = None if sym else torch.randint(1 - half, half, shape, dtype=torch.int8)
    codes = torch.randint(-half, half, (out, inputs), dtype=torch.int8)
    q = QuantizedTensor(codes, (torch.rand(shape) * 0.02 + 0.001).half(), zero, scheme.weight)
    plain = torch.nn.Linear(inputs, out, bias=False)
    plain.weight.data = q.dequantize()
    zeros = (torch.zeros(shape) if zero is None else zero.float()) + half
    order = (torch.arange(inputs) // (group or inputs)).int()
    options = {"bits": bits, "group_size": group or -1, "sym": sym, "desc_act": False, "register_buffers": True}
    theirs = gptqmodel.TorchLinear(in_features=inputs, out_features=out, **options)
    theirs.pack_original(plain, q.scale.float(), zeros, order)
    for name, needs_change in {"gptq": True, "gptq-v2": False}.items():
        ours = gptqmodel.TorchLinear(in_features=inputs, out_features=out, **options)
        for suffix, tensor in FORMATS[name].encode(ref, scheme, q).items():
            setattr(ours, suffix.removeprefix("a.b."), tensor)
        if needs_change:
            convert_gptq_v1_to_v2_format_module(ours, bits, torch.int32)
        assert all(torch.equal(getattr(ours, n), getattr(theirs, n)) for n in ("qweight", "qzeros", "scales", "g_idx"))
    if bits == 4:
        awq = AwqTorchLinear(in_features=inputs, out_features=out, **options)
        awq.pack(plain, q.scale.float(), zeros)
        made = FORMATS["awq"].encode(ref, FORMATS["awq"].target(scheme), q)
        assert all(torch.equal(made[f"a.b.{n}"], getattr(awq, n)) for n in ("qweight", "qzeros", "scales"))


@pytest.mark.parametrize("name", ["deepseek-fp8", "deepseek-fp8 of 96 x 32"])
def test_bf16_is_what_another_dequantizer_makes(name: str, tmp_path: Path) -> None:
    """compressed-tensors' dequantizer of DeepSeek's format and `--to bf16` make the same bytes; rounding is counted."""
    from compressed_tensors.entrypoints.convert.converters import FP8BlockDequantizer

    weights = CASES[name].write(tmp_path / "m")
    record = quantkit.convert(tmp_path / "m", tmp_path / "out", "bf16")
    block = tuple(CASES[name].config["weight_block_size"])
    theirs = FP8BlockDequantizer(targets=[*weights], weight_block_size=block).process(tensors(tmp_path / "m"))
    ours = tensors(tmp_path / "out")
    assert ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    assert "quantization_config" not in CheckpointReader(tmp_path / "out").config
    inexact = sum(int((w.float().bfloat16().float() != w.float()).sum()) for w in weights.values())
    assert record["rounded_weights"] == inexact > 0 and not record["lossless"]
    assert "inputs; in BF16 they stay as they are" in record["notes"][0]
    quantkit.quantize(tmp_path / "out", tmp_path / "again", Recipe(scheme="W4A16", method="rtn", group_size=32))


def test_bf16_that_is_exact_says_so(tmp_path: Path) -> None:
    """Scales that are powers of two, as some FP8 checkpoints have: no value is rounded."""
    weights = CASES["fp8 dynamic"].write(tmp_path / "m")
    for shard in CheckpointReader(tmp_path / "m").shards:
        found = load_file(tmp_path / "m" / shard)
        for key in found:
            if key.endswith("weight_scale"):
                found[key].fill_(2.0**-9)
        save_file(found, tmp_path / "m" / shard)
    record = quantkit.convert(tmp_path / "m", tmp_path / "out", "bf16")
    assert weights and record["lossless"] and record["rounded_weights"] == 0


def test_kv_scales_go_along(tmp_path: Path) -> None:
    CASES["fp8 static"].write(tmp_path / "m")
    record = quantkit.convert(tmp_path / "m", tmp_path / "out", "fp8-transformers")
    assert CASES["fp8 static"].extra.keys() < tensors(tmp_path / "out").keys()
    assert any("K/V cache" in note for note in record["notes"])


def rescaled(folder: Path, value: float, to: Path) -> Path:
    """A copy in which a scale of LINEAR has another value."""
    shutil.copytree(folder, to)
    key = f"{LINEAR}.weight_scale"
    shard = to / CheckpointReader(to).entry(key).shard
    weights = load_file(shard)
    weights[key][0, 0] = value
    save_file(weights, shard)
    (to / "SHA256SUMS").unlink()  # as another tool would leave it
    return to


def test_scales_that_the_format_cannot_hold(made: Path, tmp_path: Path) -> None:
    """bfloat16 reaches further than float16 at both ends; what float16 holds exactly, subnormal or not, is accepted."""
    for value in (2.0**-26, 1.0078125 * 2.0**-18, 1e6):
        source = rescaled(made / "W4A16", value, tmp_path / str(value))
        for to in ("gptq", "awq"):
            message = refused("convert", source, "-o", tmp_path / "out", "--to", to, "--quiet")
            assert f"'{LINEAR}.scales'" in message and "F16 cannot hold 1 " in message and "--to bf16" in message
            assert not (tmp_path / "out").exists()
    quantkit.convert(rescaled(made / "W4A16", 2.0**-24, tmp_path / "tiny"), tmp_path / "held", "gptq")


def test_zero_points_that_the_format_cannot_hold(tmp_path: Path) -> None:
    """A zero point of 0 is -1 in GPTQ v1, which cannot be stored; v2 holds it."""
    CASES["awq"].write(tmp_path / "m")
    quantkit.convert(tmp_path / "m", tmp_path / "fine", "gptq")
    key = "model.layers.0.self_attn.o_proj.qzeros"
    shard = tmp_path / "m" / CheckpointReader(tmp_path / "m").entry(key).shard
    weights = load_file(shard)
    weights[key][0, 0] = 0
    save_file(weights, shard)
    message = refused("convert", tmp_path / "m", "-o", tmp_path / "out", "--to", "gptq", "--quiet")
    assert "o_proj' has a zero point of 0" in message and "--to gptq-v2" in message
    quantkit.convert(tmp_path / "m", tmp_path / "v2", "gptq-v2")


def test_what_needs_several_schemes_or_none(made: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    quantkit.quantize(
        made / "model", mixed, Recipe(method="rtn", group_size=32, experts="W4A16", attention="W8A16", shared_experts="BF16")
    )
    message = refused("convert", mixed, "-o", tmp_path / "out", "--to", "gptq", "--quiet")
    assert "one scheme" in message and "W4A16" in message and "W8A16" in message
    assert "not quantized" in refused("convert", made / "model", "-o", tmp_path / "out", "--to", "gptq")
    assert "already" in refused("convert", mixed, "-o", tmp_path / "out", "--to", "compressed-tensors")
    assert "'gguf'" in refused("convert", mixed, "-o", tmp_path / "out", "--to", "gguf")
    assert "exists" in refused("convert", mixed, "-o", made, "--to", "bf16")
    quantkit.convert(mixed, tmp_path / "out", "bf16")


def test_what_stays_bf16_is_named_for_engines(made: Path, tmp_path: Path) -> None:
    """Routers, the head and kept linears, each by its whole name: a shorter one would match shared_mlp.gate_proj too."""
    recipe = {"scheme": "W4A16", "method": "rtn", "group_size": 32, "attention": "BF16"}
    quantkit.quantize(made / "model", tmp_path / "m", Recipe(**recipe))
    kept = {"lm_head", "model.layers.1.mlp.gate.wg", "model.layers.1.self_attn.q_proj"}
    quantized = {LINEAR, "model.layers.1.mlp.shared_mlp.gate_proj"}
    quantkit.convert(tmp_path / "m", tmp_path / "gptq", "gptq")
    rules = CheckpointReader(tmp_path / "gptq").config["quantization_config"]["dynamic"]
    for key in kept | quantized:
        assert any(re.match(rule.removeprefix("-:"), key) for rule in rules) == (key in kept)
    quantkit.convert(tmp_path / "m", tmp_path / "awq", "awq")
    names = CheckpointReader(tmp_path / "awq").config["quantization_config"]["modules_to_not_convert"]
    for key in kept | quantized:
        assert any(name in key for name in names) == (key in kept)
    for name in ("gptq", "awq"):
        model = quantkit.load(tmp_path / name, kernels="reference")
        assert {key for key, scheme in model.weights.schemes.items() if scheme is None and "layers.1" in key} == {
            "model.layers.1.self_attn.q_proj",
            "model.layers.1.self_attn.o_proj",
        }


def test_interrupted_it_resumes_with_the_same_bytes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "MAX_SHARD_BYTES", 60_000)
    quantkit.convert(made / "W4A16", tmp_path / "whole", "gptq")

    def stop(done: int, total: int) -> None:
        assert total > 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantkit.convert(made / "W4A16", tmp_path / "out", "gptq", progress=stop)
    assert not (tmp_path / "out").exists() and "another job" in refused(
        "convert", made / "W4A16", "-o", tmp_path / "out", "--to", "awq"
    )
    (tmp_path / "out.partial" / ".model-00003.tmp").write_bytes(b"torn")
    calls: list[int] = []
    quantkit.convert(made / "W4A16", tmp_path / "out", "gptq", progress=lambda done, total: calls.append(done))
    assert calls[0] == 3
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert names == {path.name for path in (tmp_path / "out").iterdir()}
    for name in names - {"run.json"}:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_a_shard_that_changes_underneath_is_noticed(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written is read again before OUT appears."""
    monkeypatch.setattr(placement, "MAX_SHARD_BYTES", 60_000)

    def spoil(done: int, total: int) -> None:
        if done == 2:
            shard = next((tmp_path / "out.partial").glob("model-00001*"))
            data = bytearray(shard.read_bytes())
            data[-5] ^= 1
            shard.write_bytes(data)

    with pytest.raises(quantkit.errors.VerificationError, match="does not have the hash"):  # type: ignore[attr-defined]
        quantkit.convert(made / "W4A16", tmp_path / "out", "gptq", progress=spoil)
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial", "out.failed"}
    begun: list[tuple[int, int]] = []
    quantkit.convert(made / "W4A16", tmp_path / "out", "gptq", progress=lambda *step: begun.append(step))
    assert len(begun) == 1 and not damaged(tmp_path / "out"), "what was sound is not written again"


def test_command_line_prints_a_record(made: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from quantkit.cli import main

    arguments = ["convert", str(made / "W4A16"), "-o", str(tmp_path / "a"), "--to", "gptq"]
    result = CliRunner().invoke(main, [*arguments, "--json", "--quiet"], catch_exceptions=False)
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "a" / "run.json").read_text())
    assert (record["from"], record["to"], record["lossless"]) == ("compressed-tensors", "gptq", True)
    arguments[3:] = [str(tmp_path / "b"), "--to", "bf16"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "weights rounded to BF16" in result.stdout and "shard 1 of 1" in result.stderr
    edit("config.json", lambda config: config.update(hidden_size=-1))(tmp_path / "a")
    os.rename(tmp_path / "a", tmp_path / "c")
    assert "'hidden_size'" in refused("convert", tmp_path / "c", "-o", tmp_path / "d", "--to", "awq")
