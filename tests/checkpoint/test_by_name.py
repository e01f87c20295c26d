"""A checkpoint of an unknown architecture: linears chosen by name, everything else carried over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import quantkit
from quantkit.atomic import sha256
from quantkit.checkpoint.by_name import spec_by_name
from quantkit.checkpoint.opened import schemes_of
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.verify import verify
from quantkit.errors import VerificationError
from quantkit.job.pipeline import Step
from quantkit.recipe import Recipe
from tests.helpers.commands import refused, run


def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    tensors = {"wte.weight": random(50, 64), "norm.weight": random(64), "conv.weight": random(4, 4, 3)}
    tensors["steps"], tensors["logit_scale"] = torch.arange(3), torch.tensor(2.5)
    for i in range(3):
        tensors[f"h.{i}.mixer.in_proj.weight"] = random(96, 64)
        tensors[f"h.{i}.mixer.in_proj.bias"] = random(96)
        tensors[f"h.{i}.mixer.out_proj.weight"] = random(64, 96).float()
        tensors[f"h.{i}.gate.weight"] = random(8, 64)
    return tensors


@pytest.fixture
def unknown(tmp_path: Path) -> Path:
    folder, tensors = tmp_path / "unknown", weights()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba9", "hidden_size": 64}))
    parts = [{k: v for k, v in tensors.items() if ("h.2" in k) == second} for second in (False, True)]
    for i, part in enumerate(parts):
        save_file(part, folder / f"part-{i}.safetensors")
    index = {key: f"part-{i}.safetensors" for i, part in enumerate(parts) for key in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


PATTERNS = ("--linears", "h.*.in_proj", "--linears", "*.out_proj")


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("FP8_DYNAMIC", ()), ("W4A16", ("--method", "rtn", "--group-size", "32")), ("W8A8", ()), ("FP8_BLOCK", ())],
)
def test_end_to_end(scheme: str, options: tuple[str, ...], unknown: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if scheme == "FP8_BLOCK":  # its activations are in groups of 128
        assert "not a multiple of 128" in refused("quantize", unknown, "-o", out, *PATTERNS, "--scheme", scheme)
        return
    record = run("quantize", unknown, "-o", out, *PATTERNS, "--scheme", scheme, *options)
    chosen = {f"h.{i}.mixer.{name}_proj" for i in range(3) for name in ("in", "out")}
    assert record["linears"].keys() == chosen and record["fallbacks"] == {}
    source, reader = CheckpointReader(unknown), CheckpointReader(out)
    for key in source.entries:
        if key.removesuffix(".weight") not in chosen:
            assert torch.equal(source.tensor(key), reader.tensor(key)), key
    assert {key for key, s in schemes_of(reader).items() if s} == chosen
    shapes = {ref.key: (ref.out_features, ref.in_features) for ref in spec_by_name(reader).linears()}
    assert shapes == {ref.key: (ref.out_features, ref.in_features) for ref in spec_by_name(source).linears()}
    report = run("verify", out, "--source", unknown)
    assert report["ok"] and 0 < report["errors"]["linear"]["max"] < 0.2
    found = run("inspect", out)
    assert found["unknown_bytes"] == 0 and set(found["roles"]) == {"linear", "others"}
    again = run("quantize", unknown, "-o", tmp_path / "again", *PATTERNS, "--scheme", scheme, *options)
    assert again["job"] == record["job"]
    assert (out / "SHA256SUMS").read_bytes() == (tmp_path / "again" / "SHA256SUMS").read_bytes()


def test_resumes(unknown: Path, tmp_path: Path) -> None:
    recipe = Recipe(scheme="FP8_DYNAMIC", linears=("*_proj",))

    def stop(step: Step) -> None:
        if step.layer == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        quantkit.quantize(unknown, tmp_path / "out", recipe, progress=stop)
    assert not (tmp_path / "out").exists()
    assert quantkit.quantize(unknown, tmp_path / "out", recipe)["resumed_at_unit"] == 1
    quantkit.quantize(unknown, tmp_path / "whole", recipe)
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (tmp_path / "whole" / "SHA256SUMS").read_bytes()


def test_verify_notices(unknown: Path, tmp_path: Path) -> None:
    """A tensor that is gone, or changed, though the hashes are right."""
    out = tmp_path / "out"
    run("quantize", unknown, "-o", out, *PATTERNS, "--scheme", "FP8_DYNAMIC")

    def spoil(change: Callable[[dict[str, Tensor]], object]) -> None:
        shard = next(path for path in sorted(out.glob("*.safetensors")) if "norm.weight" in load_file(path))
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        gone = [k for k, v in index["weight_map"].items() if v == shard.name and k not in tensors]
        for key in gone:
            del index["weight_map"][key]
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
        sums = "".join(f"{sha256(p)}  {p.name}\n" for p in sorted(out.iterdir()) if p.name not in ("SHA256SUMS", "run.json"))
        (out / "SHA256SUMS").write_text(sums)

    spoil(lambda t: t["steps"].add_(1))
    with pytest.raises(VerificationError, match="'steps' should be unchanged"):
        verify(out, unknown)
    spoil(lambda t: t.pop("steps"))
    with pytest.raises(VerificationError, match="'steps' is in one of source and output"):
        verify(out, unknown)


def test_refused(unknown: Path, tmp_path: Path, model: Path) -> None:
    out = ("-o", tmp_path / "out")
    assert "matches no matrix" in refused("quantize", unknown, *out, "--linears", "h.*.bias", "--scheme", "FP8_DYNAMIC")
    assert "--linears" in refused("quantize", unknown, *out, "--scheme", "FP8_DYNAMIC")
    message = refused("quantize", unknown, *out, *PATTERNS, "--group-size", "32")
    assert "needs calibration" in message and "--method rtn" in message
    assert "needs calibration" in refused("quantize", unknown, *out, *PATTERNS, "--scheme", "FP8")
    assert "knows hunyuan" in refused("quantize", model, *out, *PATTERNS, "--scheme", "FP8_DYNAMIC")
    assert "cannot take" in refused("quantize", unknown, *out, *PATTERNS, "--scheme", "W8A16")
    run("quantize", unknown, *out, *PATTERNS, "--scheme", "FP8_DYNAMIC")
    assert "unknown architecture" in refused("generate", tmp_path / "out", "--prompt", "x")
    assert "already quantized" in refused("quantize", tmp_path / "out", "-o", tmp_path / "b", *PATTERNS)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == ["out"]
