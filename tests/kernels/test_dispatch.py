"""A checkpoint on this machine's kernels: what is chosen, why, and that it computes what the reference computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.cli import main
from quantkit.errors import CheckpointError
from quantkit.kernels import dispatch
from quantkit.kernels.cpu import build
from quantkit.recipe import Recipe
from quantkit.run.model import Model
from quantkit.run.weights import Kernels, KernelWeights
from quantkit.scheme import PRESETS, scheme_named

built = pytest.mark.skipif(isinstance(build.load(), str), reason=f"no CPU kernels: {build.load()}")
CPU, SHAPE = torch.device("cpu"), (64, 128)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "kernels", lambda number: "no compiler: 'g++' is not on PATH")


def test_choice_and_its_reason(no_library: None) -> None:
    for scheme in PRESETS.values():
        choice = dispatch.choose(scheme, SHAPE, CPU)
        assert choice.kernel == dispatch.REFERENCE and "g++" in choice.why and "avx512" in choice.elsewhere
    assert dispatch.choose(None, SHAPE, CPU).kernel == dispatch.PLAIN
    odd = scheme_named("W4A16", 12)
    assert "groups of 12" in dispatch.choose(odd, SHAPE, CPU).why
    assert "cuda" in dispatch.choose(PRESETS["W4A16"], SHAPE, torch.device("cuda:0")).why


def test_explain_counts_every_linear(make_model: Callable[..., Path], tmp_path: Path, no_library: None) -> None:
    recipe = Recipe(attention="FP8_DYNAMIC", shared_experts="BF16", group_size=32, method="rtn")
    quantkit.quantize(make_model(), tmp_path / "out", recipe)
    result = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--kernels", "--json"], catch_exceptions=False)
    rows = {row["role"]: row for row in json.loads(result.stdout)["kernels"]}
    assert {role: row["scheme"] for role, row in rows.items()} == {
        "attention": "FP8_DYNAMIC",
        "shared_experts": "BF16",
        "experts": "W4A16",
    }
    assert [row["linears"] for row in rows.values()] == [12, 12, 48] and rows["shared_experts"]["kernel"] == "torch"


def check_against_reference(folder: Path, kernels: Kernels, tolerance: float) -> Model:
    """The first layer, over tokens whose expert is the same: bfloat16 may tip a router that is nearly even."""
    fast, slow = quantkit.load(folder, kernels=kernels), quantkit.load(folder, kernels="reference")
    ids = torch.arange(1, 61).view(2, 30)
    here, there = next(fast.layers(ids)), next(slow.layers(ids))
    assert here.routing is not None and there.routing is not None
    same = (here.routing.experts == there.routing.experts).flatten()
    assert same.double().mean() > 0.9
    moved = (here.hidden - there.hidden).flatten(0, 1)[same].norm() / there.hidden.flatten(0, 1)[same].norm()
    assert moved < tolerance
    assert torch.equal(fast.generate(ids[:, :4], 3)[:, :4], ids[:, :4])
    return fast


@built
@pytest.mark.parametrize("scheme", PRESETS)
def test_kernels_agree_with_the_reference(scheme: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """bfloat16 rounds each linear's input by 2^-9; where that tips an FP8 or INT8 code, a step of 2^-4 or 2^-7 is added."""
    recipe = Recipe(scheme=scheme, group_size=32, method="rtn", samples=4, seq_len=32)
    quantkit.quantize(make_model(intermediate_size=128), tmp_path / "out", recipe)
    model = check_against_reference(tmp_path / "out", "auto", 0.05 if PRESETS[scheme].activation else 0.01)
    assert {row["kernel"] for row in model.explain()} == {"cpu-avx512"}


@built
def test_w4a8_when_asked(make_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe(scheme="W4A16", group_size=32, attention="FP8_DYNAMIC", method="rtn")
    quantkit.quantize(make_model(), tmp_path / "out", recipe)
    model = check_against_reference(tmp_path / "out", "w4a8", 0.03)
    kernels = {row["role"]: row["kernel"] for row in model.explain()}
    assert kernels == {"attention": "cpu-avx512", "experts": "cpu-w4a8", "shared_experts": "cpu-w4a8"}


@built
@pytest.mark.parametrize(
    ("recipe", "fused"),
    [
        ({}, 4),  # the shared expert goes with the routed ones
        ({"shared_experts": "FP8_DYNAMIC"}, 8),
        ({"shared_experts": "BF16"}, 4),
        ({"experts": "BF16"}, 4),
        ({"rules": [{"match": "*.layers.1.mlp.shared_mlp.down_proj", "scheme": "BF16"}]}, 4),
    ],
)
def test_experts_that_differ_go_apart(
    recipe: dict[str, Any], fused: int, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantkit.quantize(make_model(), tmp_path / "out", Recipe(scheme="W4A16", group_size=32, method="rtn", **recipe))
    model = check_against_reference(tmp_path / "out", "auto", 0.03)
    assert isinstance(model.weights, KernelWeights)
    assert sum(kernel is not None for kernel in model.weights._fused.values()) == fused
    assert not model.weights._quantized  # nothing lies in memory twice


@built
def test_gate_and_up_that_round_their_input_differently_go_apart(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Other tools calibrate each linear alone; a product of both at once would round the input wrongly for one."""
    out = tmp_path / "out"
    quantkit.quantize(make_model(), out, Recipe(scheme="FP8", method="rtn", samples=4, seq_len=32))
    for shard in out.glob("*.safetensors"):
        tensors = load_file(shard)
        for name in [key for key in tensors if key.endswith("experts.1.up_proj.input_scale")]:
            tensors[name] = tensors[name] * 2
        save_file(tensors, shard, metadata={"format": "pt"})
    model = check_against_reference(out, "auto", 0.05)
    assert isinstance(model.weights, KernelWeights)
    fused = {key for key, kernel in model.weights._fused.items() if kernel}
    alone = [f"experts.{e}" for e in (0, 2, 3)] + ["shared_mlp"]
    assert fused == {(f"model.layers.{i}.mlp.{name}.gate_proj", 1) for i in range(4) for name in alone}


@built
def test_a_weight_that_cannot_be_packed_is_named(make_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.quantize(make_model(), out, Recipe(scheme="FP8", method="rtn", samples=4, seq_len=32))
    name = "model.layers.2.self_attn.o_proj.input_scale"
    shard = next(path for path in out.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors[name] = tensors[name] * 0
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.o_proj cannot be packed: .*input scale above 0"):
        quantkit.load(out)


def test_bench_measures_every_matrix(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model(max_position_embeddings=300)
    quantkit.quantize(source, tmp_path / "out", Recipe(scheme="W4A16", attention="BF16", group_size=32, method="rtn"))
    command = ["bench", str(tmp_path / "out"), "--tokens", "1,3", "--rounds", "2", "--json"]
    command += ["--positions", "5,240,512"]
    found = json.loads(CliRunner().invoke(main, command, catch_exceptions=False).stdout)
    rows, generated = found["rows"], found["generation"]
    assert [row["positions"] for row in generated] == [5, 240, 512] and "skipped" in generated[2]
    assert all(row["prefill_tokens_per_s"] > 0 and row["decode_tokens_per_s"] > 0 for row in generated[:2])
    named = {(row["matrix"], row["tokens"]) for row in rows}
    roles = [f"{role} {name}_proj" for role in ("experts", "shared_experts") for name in ("gate", "up", "down")]
    assert named == {(role, tokens) for role in roles for tokens in (1, 3)}
    for row in rows:
        time = row["microseconds"]
        assert 0 < time["p20"] <= time["median"] <= time["p80"]
        assert row["gb_per_s"] * time["median"] == pytest.approx(128 * 64 * 4.5 / 8 / 1e3)  # INT4 and a scale per 32
        assert row["of_bf16"] > 0 and row["of_roofline"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "nothing to measure is given\nFix: give a checkpoint, or --shape"),
        (["some", "--scheme", "FP8"], "some has shapes and schemes of its own"),
        (["some", "--shape", "hunyuan-a13b"], "some has shapes and schemes of its own"),
        (["--shape", "gpt"], "hunyuan-large"),
        (["--shape", "hunyuan-a13b", "--scheme", "BF16"], "no kernel to measure"),
        (["--shape", "hunyuan-a13b", "--tokens", "1,x"], "positive numbers"),
        (["--shape", "hunyuan-a13b", "--positions", "0"], "--positions"),
    ],
)
def test_bench_refuses(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(main, ["bench", *arguments])
    assert result.exit_code == 2 and words in result.stderr
