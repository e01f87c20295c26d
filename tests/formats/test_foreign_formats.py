"""Checkpoints of other tools are read as what they mean, by every command that reads one; helpers/foreign.py is the
oracle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.kernels import dispatch
from quantkit.kernels.cpu import build
from quantkit.run.model import Model
from quantkit.run.weights import CheckpointWeights
from tests.helpers.commands import accepted, refused
from tests.helpers.edits import edit
from tests.helpers.foreign import CASES, KEPT, Case

IDS = torch.arange(1, 25).view(2, 12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_numbers_mean_what_the_format_says(case: Case, tmp_path: Path) -> None:
    """Every weight is the definition's, bit for bit in float32; the one that was left alone is; nothing is left over."""
    weights = case.write(tmp_path / "m")
    model = quantkit.load(tmp_path / "m", kernels="reference")
    assert isinstance(model.weights, CheckpointWeights) and model.weights.format.name == case.format
    for ref in model.spec.linears():
        scheme = model.weights.schemes[ref.key]
        if ref.key == KEPT:
            assert scheme is None
            continue
        assert scheme is not None and scheme.name == case.scheme
        q = model.weights.quantized(ref, scheme)
        assert torch.equal(q.dequantize(), weights[ref.key].float()), ref.key
    found = json.loads(json.dumps(quantkit_inspect(tmp_path / "m")))
    assert found["format"] == case.format and found["unknown_bytes"] == sum(t.nbytes for t in case.extra.values())


def quantkit_inspect(folder: Path) -> dict[str, object]:
    from quantkit.checkpoint.inspect import inspect

    return inspect(folder)


@pytest.mark.parametrize("name", ["gptq", "awq", "fp8 static", "fp8 dynamic", "deepseek-fp8"])
def test_every_command_reads_them(name: str, tmp_path: Path) -> None:
    """eval against the dequantized model: no more difference than the rounding of inputs makes; and text comes out."""
    CASES[name].write(tmp_path / "m")
    quantkit.convert(tmp_path / "m", tmp_path / "plain", "bf16")
    (tmp_path / "a.txt").write_text("some words " * 20)
    result = quantkit.evaluate(tmp_path / "m", tmp_path / "plain", str(tmp_path / "a.txt"), seq_len=32, windows=4)
    assert 0 <= result["kl"]["mean"] < 0.05
    for command in (["inspect"], ["inspect", "--kernels"], ["generate", "--prompt", "a", "--max-tokens", "2"]):
        accepted(command[0], tmp_path / "m", *command[1:])


def test_scales_of_other_dtypes_are_multiplied_as_they_are(tmp_path: Path) -> None:
    """The CPU kernels take float16 and float32 scales, the GPU's integer kernels decline them: neither rounds one."""
    for name in ("gptq", "deepseek-fp8"):
        CASES[name].write(tmp_path / name)
        model, reference = quantkit.load(tmp_path / name), quantkit.load(tmp_path / name, kernels="reference")
        for ref in [ref for ref in model.spec.linears() if model.weights.schemes[ref.key]][:3]:
            x = torch.randn(4, ref.in_features).bfloat16().float()  # the kernel's own rounding has nothing to do
            exact = reference.weights.linear(ref, x)
            error = (model.weights.linear(ref, x) - exact).abs().max() / exact.abs().max()
            assert error < 2**-14, (ref.key, error)  # a scale rounded to bfloat16 would be off by up to 2^-9
        rows = {row["scheme"]: row["elsewhere"] for row in model.explain() if row["kernel"] == "cpu-avx512"}
        assert rows or isinstance(build.load(), str)
        assert name != "gptq" or not any("triton" in str(place) for place in rows.values())


def test_scales_in_bfloat16_still_have_their_kernel(tmp_path: Path) -> None:
    CASES["gptq bfloat16"].write(tmp_path / "m")
    model = Model(tmp_path / "m", torch.device("cpu"), kernels="auto")
    assert not any("scales" in str(row["why"]) for row in model.explain() if row["kernel"] == dispatch.REFERENCE)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    """auto_map and modeling files are data: left out, never executed."""
    CASES["gptq"].write(tmp_path / "m")
    (tmp_path / "m" / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    auto = {"auto_map": {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "modeling_evil.M"}}
    edit("config.json", lambda config: config.update(auto))(tmp_path / "m")
    accepted("inspect", tmp_path / "m")
    accepted("convert", tmp_path / "m", "-o", tmp_path / "out", "--to", "compressed-tensors", "--quiet")
    accepted("verify", tmp_path / "out")
    accepted("generate", tmp_path / "out", "--prompt", "a", "--max-tokens", "1")
    assert not (tmp_path / "out" / "modeling_evil.py").exists() and not (tmp_path / "ran").exists()


Break = Callable[[Path], object]
LINEAR = "model.layers.0.mlp.experts.1.up_proj"


def scheme(**values: object) -> Break:
    return edit("config.json", lambda config: config["quantization_config"].update(values))


def without(*names: str) -> Break:
    return edit("config.json", lambda config: [config["quantization_config"].pop(name) for name in names])


def tensor(suffix: str, change: Callable[[Tensor], Tensor] | None) -> Break:
    """Change a tensor of LINEAR, or remove it (None)."""

    def apply(model: Path) -> None:
        key = f"{LINEAR}.{suffix}"
        shard = model / CheckpointReader(model).entry(key).shard
        weights = load_file(shard)
        if change is None:
            del weights[key]
            edit("model.safetensors.index.json", lambda index: index["weight_map"].pop(key))(model)
        else:
            weights[key] = change(weights[key]).contiguous()
        save_file(weights, shard)

    return apply


BROKEN: dict[tuple[str, str], tuple[Break, tuple[str, ...]]] = {
    ("gptq", "3 bits"): (scheme(bits=3), ("config.json", "'bits'", "3", "4 or 8")),
    ("gptq", "bits in words"): (scheme(bits="four"), ("config.json", "'bits'", "'four'")),
    ("gptq", "no bits"): (without("bits"), ("config.json", "'bits'", "required")),
    ("gptq", "group of 0"): (scheme(group_size=0), ("config.json", "'group_size' is 0", "-1")),
    ("gptq", "groups that do not fit"): (scheme(group_size=48), ("in_features 128", "group size 48")),
    ("gptq", "another group size"): (scheme(group_size=64), (".qzeros' is I32", "expected I32")),
    ("gptq", "marlin"): (scheme(checkpoint_format="marlin"), ("config.json", "'checkpoint_format'", "'marlin'", "gptq_v2")),
    ("gptq", "bits by layer"): (scheme(dynamic={"+:.*down.*": {"bits": 8}}), ("'dynamic'", "'+:.*down.*'")),
    ("gptq", "dynamic of lists"): (scheme(dynamic=[1]), ("config.json", "'dynamic'")),
    ("gptq", "sym that is not"): (tensor("qzeros", lambda t: t + 1), (f"'{LINEAR}.qzeros'", "sym")),
    ("gptq", "act-order"): (tensor("g_idx", lambda t: t.flip(0)), (f"'{LINEAR}.g_idx'", "desc_act", "static_groups")),
    ("gptq", "no qweight"): (tensor("qweight", None), (f"'{LINEAR}.qweight' is missing",)),
    ("gptq", "no scales"): (tensor("scales", None), (f"'{LINEAR}.scales' is missing",)),
    ("gptq", "scales of integers"): (tensor("scales", lambda t: t.int()), (f"'{LINEAR}.scales' is I32", "BF16 or F16")),
    ("gptq", "scales with NaN"): (tensor("scales", lambda t: t * torch.nan), (f"'{LINEAR}.scales'", "NaN")),
    ("gptq", "qweight of another shape"): (tensor("qweight", lambda t: t[:-1]), (f"'{LINEAR}.qweight' is I32 (15, 128)",)),
    ("gptq", "qweight of another dtype"): (tensor("qweight", lambda t: t.long()), (f"'{LINEAR}.qweight' is I64",)),
    ("gptq", "another method"): (scheme(quant_method="bitsandbytes"), ("config.json", "'bitsandbytes'", "awq and fp8")),
    ("gptq", "no method"): (without("quant_method"), ("config.json", "quant_method None")),
    ("gptq", "method of lists"): (scheme(quant_method=["gptq"]), ("config.json", "quant_method ['gptq']")),
    ("gptq asym", "zero point of 16"): (
        tensor("qzeros", lambda t: torch.full_like(t, -1)),
        (f"'{LINEAR}.qzeros' holds 15", "16 or as 0", "gptq_v2"),
    ),
    ("awq", "8 bits"): (scheme(bits=8), ("config.json", "'bits'", "8", "4")),
    ("awq", "gemv"): (scheme(version="gemv"), ("config.json", "'version'", "'gemv'", "'gemm'")),
    ("awq", "symmetric"): (scheme(zero_point=False), ("config.json", "'zero_point'", "False", "True")),
    ("awq", "no qzeros"): (tensor("qzeros", None), (f"'{LINEAR}.qzeros' is missing",)),
    ("awq", "qzeros of another shape"): (tensor("qzeros", lambda t: t[:, :-1]), (f"'{LINEAR}.qzeros' is I32 (4, 15)",)),
    ("fp8 static", "e5m2"): (scheme(fmt="e5m2"), ("config.json", "'fmt'", "'e5m2'", "e4m3")),
    ("fp8 static", "scheme"): (scheme(activation_scheme="token"), ("config.json", "'activation_scheme'", "'token'")),
    ("fp8 static", "no input scale"): (tensor("input_scale", None), (f"'{LINEAR}.input_scale' is missing",)),
    ("fp8 static", "no scale"): (tensor("weight_scale", None), (f"'{LINEAR}.weight_scale' is missing",)),
    ("fp8 static", "scale per row"): (
        tensor("weight_scale", lambda t: t.expand(128, 1)),
        (f"'{LINEAR}.weight_scale' is F32 (128, 1)",),
    ),
    ("fp8 static", "kept but is not"): (scheme(ignored_layers=[LINEAR]), ("config.json", f"keeps '{LINEAR}'", "F8_E4M3")),
    ("fp8 static", "static blocks"): (scheme(weight_block_size=[128, 128]), ("config.json", "blocks", "static")),
    ("fp8 static", "NaN"): (
        tensor("weight", lambda t: torch.full_like(t.float(), torch.nan).to(t.dtype)),
        (f"'{LINEAR}.weight'", "NaN"),
    ),
    ("deepseek-fp8", "blocks of 0"): (scheme(weight_block_size=[0, 128]), ("config.json", "'weight_block_size.0'", "0")),
    ("deepseek-fp8", "blocks of one side"): (scheme(weight_block_size=[128]), ("config.json", "'weight_block_size.1'")),
    ("deepseek-fp8", "other blocks"): (scheme(weight_block_size=[64, 64]), ("weight_scale_inv' is F32 (1, 1)", "(2, 2)")),
}


@pytest.mark.parametrize(("name", "what"), BROKEN, ids=[" ".join(pair) for pair in BROKEN])
def test_broken_ones_are_refused(name: str, what: str, tmp_path: Path) -> None:
    """One message, exit code 2, and no OUT, wherever it is found: in the config, in the headers or in the data."""
    spoil, expected = BROKEN[name, what]
    CASES[name].write(tmp_path / "m")
    spoil(tmp_path / "m")
    message = refused("convert", tmp_path / "m", "-o", tmp_path / "out", "--to", "bf16", "--quiet")
    assert all(word in message for word in expected), message
    assert not (tmp_path / "out").exists()
    refused("eval", tmp_path / "m", "--baseline", tmp_path / "m", "--seq-len", "16", "--windows", "1")


def test_quantized_input_is_not_quantized_again(tmp_path: Path) -> None:
    for name in ("gptq", "fp8 static"):
        CASES[name].write(tmp_path / name)
        message = refused("quantize", tmp_path / name, "-o", tmp_path / "out", "--method", "rtn")
        assert "already quantized" in message and "quantkit convert --to bf16" in message
