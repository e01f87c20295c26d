"""What a fresh process, a repeated command and a model that changes beside its weights must not bring in unseen."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.errors import CheckpointError, ConfigError, OutputError
from quantkit.recipe import Recipe

ROUNDED = Recipe(scheme="W8A16", group_size=32)


def test_what_is_made_at_import_does_not_hang_on_the_caller() -> None:
    """quantkit imports its parts when they are first used, perhaps under settings of the caller's."""
    code = """
import torch
torch.set_default_dtype(torch.bfloat16)
with torch.device("meta"):
    from quantkit.job import conversion
    from quantkit.job import pipeline
    from quantkit.run import model as runtime
    from quantkit.measure import evaluate
from quantkit.quant import grid
print(grid._SHRINK)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(torch.linspace(0.5, 1.05, 23).tolist())


def test_precision_that_was_set_backend_by_backend(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """torch's newer way, which it lets nobody mix with the older one; in a process of its own."""
    code = """
import sys, torch, quantkit
torch.backends.mkldnn.matmul.fp32_precision = "bf16"
quantkit.quantize(sys.argv[1], sys.argv[2], quantkit.Recipe(scheme="W8A16", group_size=32))
assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
"""
    model = make_model(num_hidden_layers=2)
    run = subprocess.run([sys.executable, "-c", code, model, tmp_path / "out"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    quantkit.quantize(model, tmp_path / "plain", ROUNDED)
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (tmp_path / "plain" / "SHA256SUMS").read_bytes()


@pytest.mark.parametrize("damage", ["no sums", "empty sums", "a file more"])
def test_a_finished_folder_is_only_known_by_its_sums(damage: str, make_model: Callable[..., Path], tmp_path: Path) -> None:
    """The same command repeated: what nobody vouches for is not taken for its result."""
    model, out, recipe = make_model(num_hidden_layers=2), tmp_path / "out", ROUNDED
    quantkit.quantize(model, out, recipe)
    assert quantkit.quantize(model, out, recipe)["linears"]
    if damage == "a file more":
        (out / "more.txt").write_text("")
    else:
        (out / "SHA256SUMS").unlink()
        if damage == "empty sums":
            (out / "SHA256SUMS").touch()
            next(out.glob("*.safetensors")).unlink()
    with pytest.raises(OutputError, match="since then"):
        quantkit.quantize(model, out, recipe)


def test_a_link_to_nothing_is_no_missing_file(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model(num_hidden_layers=2)
    (model / "generation_config.json").symlink_to("../../blobs/none")
    with pytest.raises(ConfigError, match="generation_config.json is a link to ../../blobs/none, which is not there"):
        quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W8A16", group_size=32))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == []


def test_a_tokenizer_that_is_replaced_is_noticed(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """Else OUT holds another than the one whose ids it was calibrated on; put back, the run goes on."""
    model, out = make_model(num_hidden_layers=2), tmp_path / "out"
    path = model / "tokenizer.json"
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="tokenizer.json has been replaced"):
        quantkit.quantize(model, out, ROUNDED, progress=lambda step: path.write_bytes(before + b" ") and None)
    assert not out.exists()
    path.write_bytes(before)
    (tmp_path / "out.partial" / ".quantkit-0.tmp").mkdir()  # in the place of a file that a killed run leaves
    assert quantkit.quantize(model, out, ROUNDED)["linears"]
    assert not (out / ".quantkit-0.tmp").exists()
