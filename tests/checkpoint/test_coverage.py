"""Every tensor of the source is quantized, kept or refused; the bytes on disk are those of the plan; names are exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.coverage import Fate, account, reconcile
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import VerificationError
from quantkit.formats import compressed_tensors
from quantkit.job.plan import make_plan
from quantkit.recipe import Recipe
from quantkit.scheme import scheme_named
from tests.helpers.commands import not_quantized, refused
from tests.helpers.engine_models import SIZES, seen

QUICK = Recipe(scheme="W4A16", method="rtn", group_size=32, attention="BF16")


def test_every_tensor_has_one_fate(model: Path) -> None:
    reader = CheckpointReader(model)
    plan = make_plan(reader, QUICK)
    fates = {fate: set(plan.coverage.of(fate)) for fate in Fate}
    assert set.union(*fates.values()) == reader.entries.keys()
    assert sum(map(len, fates.values())) == len(reader.entries) and not fates[Fate.REFUSED]
    assert fates[Fate.QUANTIZED] == {k for k in reader.entries if "_mlp." in k or ".experts." in k}
    table = plan.coverage.as_dict()
    assert table["quantized"].keys() == {"experts", "shared_experts"} and table["refused"] == {}
    assert table["kept"].keys() == {"attention", "router", "norms", "embedding"}
    assert table["total"]["source_bytes"] == plan.source_bytes and table["total"]["output_bytes"] == plan.output_bytes
    assert table["kept"]["attention"]["output_bytes"] == table["kept"]["attention"]["source_bytes"]


def test_a_tensor_that_is_not_understood_is_refused(model: Path) -> None:
    reader = CheckpointReader(model)
    plan = make_plan(reader, QUICK)
    entry = reader.entries["model.norm.weight"]
    coverage = account({**reader.entries, "model.mystery.weight": entry}, plan.spec, plan.schemes)
    assert coverage.of(Fate.REFUSED) == ["model.mystery.weight"]
    assert coverage.as_dict()["refused"]["unknown"]["tensors"] == 1
    shard = model / "model-00001-of-00002.safetensors"
    save_file({**load_file(shard), "model.mystery.weight": torch.ones(3)}, shard)
    index = model / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.mystery.weight"] = shard.name
    index.write_text(json.dumps(data))
    assert "model.mystery.weight" in not_quantized(model, "--group-size", "32", "--method", "rtn")


def test_bytes_are_reconciled_with_the_disk(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = quantkit.quantize(model, out, QUICK)
    assert record["coverage"]["reconciled"] and record["coverage"] == json.loads((out / "run.json").read_text())["coverage"]
    size = 0
    for shard in out.glob("*.safetensors"):
        data = shard.read_bytes()
        size += len(data) - 8 - int.from_bytes(data[:8], "little")
    assert record["coverage"]["bytes_on_disk"] == record["coverage"]["total"]["output_bytes"] == size
    coverage = make_plan(CheckpointReader(model), QUICK).coverage
    shard = next(p for p in sorted(out.glob("*.safetensors")) if any(".experts.0." in k for k in load_file(p)))
    tensors = load_file(shard)
    key = next(k for k in tensors if k.endswith("experts.0.up_proj.weight_packed"))
    base = key.removesuffix("_packed")
    plain = {k: t for k, t in tensors.items() if not k.startswith(base)} | {base: torch.zeros(64, 128).bfloat16()}
    save_file(plain, shard)
    (out / "model.safetensors.index.json").unlink()
    for other in out.glob("*.safetensors"):
        if other != shard:
            plain |= load_file(other)
    save_file(plain, out / "model.safetensors")
    with pytest.raises(VerificationError, match="was planned and is not there") as caught:
        reconcile(coverage, CheckpointReader(out))
    assert f"experts '{base}' stayed BF16" in str(caught.value)


def test_bytes_behind_a_header_are_seen(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.quantize(model, out, QUICK)
    reader, coverage = CheckpointReader(out), make_plan(CheckpointReader(model), QUICK).coverage
    shard = out / reader.shards[0]
    shard.write_bytes(shard.read_bytes() + b"\0" * 16)
    with pytest.raises(VerificationError, match=r"bytes of data, its tensors"):
        reconcile(coverage, reader)


def test_routed_experts_stay_bf16_only_on_purpose(model: Path, tmp_path: Path) -> None:
    options = ("--scheme", "BF16", "--attention", "W8A8")
    message = not_quantized(model, *options)
    assert "routed expert 'model.layers.0.mlp.experts.0.gate_proj' would stay in BF16" in message and "--experts" in message
    assert "would stay in BF16" in refused("plan", model, *options)
    quantkit.quantize(model, tmp_path / "a", Recipe(scheme="W8A8", experts="BF16"))
    rules = [{"match": "model.layers.0.*", "scheme": "BF16"}]
    record = quantkit.quantize(model, tmp_path / "b", Recipe.of({"scheme": "W8A8", "rules": rules}))
    assert record["coverage"]["kept"]["experts"]["tensors"] == 4 * 3
    some = Recipe.of({"scheme": "W8A8", "rules": [{"match": "*.experts.1.*", "scheme": "BF16"}]})
    with pytest.raises(quantkit.errors.ConfigError, match="different schemes"):
        make_plan(CheckpointReader(model), some)


ROUTERS = {"mixtral": "block_sparse_moe.gate", "hunyuan": "mlp.gate.wg", "hunyuan_v1_moe": "mlp.gate.wg"}


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("kept", [None, "experts", "self_attn", "layers.0."], ids=str)
def test_names_in_the_config_are_exact(kind: str, kept: str | None) -> None:
    """Of every architecture: each entry hits the linears it is meant for and nothing else, as engines match."""
    view = seen(kind, parts={kept: "BF16"} if kept else None)
    if not any(view.schemes.values()) or (kind == "llama" and kept == "experts"):
        return
    routers = [f"model.layers.{i}.{ROUTERS.get(kind, 'mlp.gate')}" for i in range(2)] if kind != "llama" else []
    modules = [
        f"model.layers.0.{name}" for name in ("input_layernorm", "mlp", "self_attn", "mlp.experts", "mlp.gate_proj.x")
    ]
    kept_names = [*routers, "lm_head"]
    assert (
        compressed_tensors.inexact(view.quantization, view.schemes, kept_names, [*modules, "vision.layers.0.mlp.gate"]) == []
    )
    ignore = view.quantization["ignore"]
    assert all(entry.startswith("re:^") and entry.endswith("$") for entry in ignore if entry.startswith("re:"))


def test_an_inexact_pattern_is_found() -> None:
    view = seen("hunyuan_v1_moe")
    routers = [f"model.layers.{i}.mlp.gate.wg" for i in range(2)] + ["lm_head"]
    loose = {**view.quantization, "ignore": ["lm_head", "re:.*mlp.gate.*"]}
    found = "\n".join(compressed_tensors.inexact(loose, view.schemes, routers, []))
    assert "'model.layers.0.mlp.shared_mlp.gate_proj' is W4A16 but config.json says kept" in found
    assert "'re:.*mlp.gate.*' also catches 2 that it should not" in found
    unused = {**view.quantization, "ignore": [*view.quantization["ignore"], "model.mtp"]}
    assert compressed_tensors.inexact(unused, view.schemes, routers, []) == ["'model.mtp' matches nothing"]
    norms = {**view.quantization, "ignore": [*view.quantization["ignore"], "re:.*norm$"]}
    assert (
        "input_layernorm" in compressed_tensors.inexact(norms, view.schemes, routers, ["model.layers.0.input_layernorm"])[0]
    )
    bare = {**view.quantization, "ignore": ["lm_head"]}
    assert (
        "mlp.gate.wg' is kept but config.json says W4A16" in compressed_tensors.inexact(bare, view.schemes, routers, [])[0]
    )
    assert scheme_named("W4A16") in view.schemes.values()


def test_verify_asks_the_same(make_model: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.quantize(make_model(), out, Recipe(scheme="W4A16", method="rtn", group_size=32))
    path = out / "config.json"
    data = json.loads(path.read_text())
    data["quantization_config"]["ignore"].append("re:.*layernorm$")
    path.write_text(json.dumps(data))
    message = refused("verify", out)
    assert "'re:.*layernorm$' also catches" in message
