"""Where nothing may be written, disks that fill up, and outputs that are not what they claim: see test_bad_input.py."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.ranges import write_from
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.shard import OpenShard
from quantkit.cli import main
from quantkit.errors import CheckpointError, ConfigError, QuantkitError
from quantkit.job import pipeline
from quantkit.recipe import Recipe
from tests.conftest import CONFIG, random_weights, write_checkpoint
from tests.helpers.architectures import TINY
from tests.helpers.commands import QUICK, accepted, not_quantized, refused
from tests.helpers.edits import Break, edit, replace


def test_places_that_are_taken(model: Path, tmp_path: Path) -> None:
    """OUT exists in any form, or what lies at OUT.partial is not ours: nothing there is touched."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nothing")
    for name in ("folder", "file", "link", "model", "nothing/..", ""):
        assert "exists" in refused("quantize", model, "-o", f"{tmp_path}/{name}", *QUICK)
    assert "not a folder" in refused("quantize", tmp_path / "file", "-o", tmp_path / "out", *QUICK)
    assert "parent" in refused("quantize", model, "-o", tmp_path / "file" / "out", *QUICK)
    assert "name too long" in refused("quantize", model, "-o", tmp_path / ("n" * 250), *QUICK)
    own = model.rename(tmp_path / "own.partial")
    before = sorted(path.name for path in own.iterdir())
    assert "own.partial" in refused("quantize", own, "-o", tmp_path / "own", *QUICK)
    assert sorted(path.name for path in own.iterdir()) == before and (tmp_path / "file").read_text() == "mine"
    accepted("quantize", own, "-o", own / "[/new] folder" / "out", *QUICK)


def test_hub_names_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("quantkit-nobody/nothing", "no model/here"):
        message = refused("quantize", name, "-o", tmp_path / "out", *QUICK)
        assert f"'{name}' is no local folder" in message and "log in" in message


def stop(step: object) -> None:
    raise KeyboardInterrupt


def test_partial_of_another_job(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", method="rtn", group_size=32), progress=stop)
    message = not_quantized(model, *QUICK, "--experts", "W8A16")
    assert "out.partial belongs to another job" in message and 'recipe.experts: "W4A16" there, "W8A16" here' in message


def full(handle: int, view: memoryview, start: int) -> None:
    """Writes to a disk that has no room in a file beyond 100 kB."""
    if start > 100_000:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write_from(handle, view, start)


def test_what_cannot_be_read_at_the_end_costs_no_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that fails while the result is verified: the same command goes on from there."""
    recipe, out = Recipe(scheme="W4A16", method="rtn", group_size=32), tmp_path / "out"
    real, verifying = CheckpointReader._file, pipeline.verify

    def fails(folder: Path, source: Path) -> object:
        def file(reader: CheckpointReader, shard: str) -> OpenShard:
            if reader.folder == source:
                raise CheckpointError("the disk does not answer", "try again")
            return real(reader, shard)

        with monkeypatch.context() as patch:
            patch.setattr(CheckpointReader, "_file", file)
            return verifying(folder, source)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "verify", fails)
        with pytest.raises(CheckpointError, match="does not answer"):
            quantkit.quantize(model, out, recipe)
    assert not out.exists() and (tmp_path / "out.partial").exists()
    assert quantkit.quantize(model, out, recipe)["resumed_at_unit"] > 0
    assert not [*out.glob(".work")]


def test_an_option_for_what_is_not_there(tmp_path: Path) -> None:
    made = write_checkpoint(tmp_path / "llama", TINY["llama"], random_weights(TINY["llama"]))
    for options in (Recipe(experts="W4A16", method="rtn"), Recipe(scheme="W8A8", shared_experts="W8A16")):
        with pytest.raises(ConfigError, match="no linear with the role"):
            quantkit.quantize(made, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


NORM = "model.layers.1.input_layernorm.weight"


def test_states_that_overflow_in_calibration(make_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_model()
    shard = next(path for path in sorted(folder.glob("*.safetensors")) if NORM in load_file(path))
    tensors = load_file(shard)
    tensors[NORM] = torch.full_like(tensors[NORM], 3e38)  # finite, but not what it multiplies
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(QuantkitError, match="not finite"):
        quantkit.quantize(folder, tmp_path / "out", Recipe(scheme="FP8", samples=2, seq_len=64))
    assert not (tmp_path / "out").exists()


def test_disk_fills_up(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the work it is refused; in the middle of it, the same command resumes once there is room."""
    command = ("quantize", model, "-o", tmp_path / "out", "--quiet", *QUICK)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        message = refused(*command)
        assert "1,000 bytes free" in message and "needed" in message and not (tmp_path / "out.partial").exists()
    with monkeypatch.context() as patch:
        patch.setattr("quantkit.checkpoint.writer.write_from", full)
        message = refused(*command)
        assert "00002-of-00003.safetensors: No space left" in message and "resumes" in message
    assert not (tmp_path / "out").exists() and not [*(tmp_path / "out.partial").glob(".*.tmp")]
    accepted(*command)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed_at_unit"] == 1
    accepted("verify", tmp_path / "out", "--source", model)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its quantized checkpoint, for tests that copy it."""
    folder = tmp_path_factory.mktemp("finished")
    write_checkpoint(folder / "model", CONFIG, random_weights(CONFIG))
    accepted("quantize", folder / "model", "-o", folder / "out", *QUICK)
    return folder


def flip(out: Path) -> None:
    shard = out / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)


def scheme(change: Callable[[dict[str, Any]], object]) -> Break:
    return edit("config.json", lambda config: change(config["quantization_config"]))


def group(change: Callable[[dict[str, Any]], object]) -> Break:
    return scheme(lambda q: change(q["config_groups"]["group_0"]))


SUMS = "SHA256SUMS"
TAMPERED: dict[str, tuple[Break, str]] = {
    "byte": (flip, "model-00002-of-00003.safetensors does not have the hash"),
    "file added": (replace("extra.py", b""), "extra.py is not listed"),
    "file removed": (replace("tokenizer.json", None), "tokenizer.json is listed"),
    "shard removed": (replace("model-00002-of-00003.safetensors", None), "does not exist"),
    "no sums": (replace(SUMS, None), f"no {SUMS}"),
    "sums are no text": (replace(SUMS, b"\xff\n"), "is not listed"),
    "sums leave the folder": (replace(SUMS, b"abc  ../model/config.json\n"), "../model/config.json is listed"),
    "sums with a long name": (replace(SUMS, b"abc  " + b"n" * 300), "is listed"),
}
SCHEMES: dict[str, tuple[Break, str]] = {
    "text": (edit("config.json", lambda c: c.update(quantization_config="x")), "config.json: quantization_config"),
    "another tool": (scheme(lambda q: q.update(quant_method="gptq")), "config.json: quantization_config"),
    "groups in a list": (scheme(lambda q: q.update(config_groups=[1])), "config.json: quantization_config"),
    "3 bits": (group(lambda g: g["weights"].update(num_bits=3)), "none of the schemes"),
    "no targets": (group(lambda g: g.pop("targets")), "'targets'"),
    "target no pattern": (group(lambda g: g.update(targets=["re:("])), "malformed"),
    "groups of 0": (group(lambda g: g["weights"].update(group_size=0)), "group_size 0"),
    "another format": (group(lambda g: g.update(format="garbage-quantized")), "has format 'garbage-quantized'"),
    "transforms": (scheme(lambda q: q.update(transform_config={"config_groups": {"u": {}}})), "transform_config"),
    "sparse": (scheme(lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"})), "sparsity_config"),
    "rounded outputs": (group(lambda g: g.update(output_activations={"num_bits": 8})), "rounds outputs"),
    "groups of 64": (group(lambda g: g["weights"].update(group_size=64)), "weight_scale"),
}


def spoilt(finished: Path, folder: Path, spoil: Break) -> Path:
    out = Path(shutil.copytree(finished / "out", folder / "out"))
    spoil(out)
    return out


@pytest.mark.parametrize("case", TAMPERED)
def test_verify_tampered(case: str, finished: Path, tmp_path: Path) -> None:
    out = spoilt(finished, tmp_path, TAMPERED[case][0])
    message = refused("verify", out)
    assert str(out) in message and TAMPERED[case][1] in message, message
    assert "1 problems" not in message


def test_damage_is_not_given_new_hashes(finished: Path, tmp_path: Path) -> None:
    out = spoilt(finished, tmp_path, flip)
    assert "does not have the hash" in refused("convert", out, "-o", tmp_path / "b", "--to", "bf16")
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.partial").exists()


def test_devices_without_an_engine(finished: Path) -> None:
    for command in (("verify", finished / "out"), ("plan", finished / "model")):
        assert "--engine too" in refused(*command, "--tp", 8)


def test_a_long_window_that_is_none(finished: Path) -> None:
    assert "--context 1" in refused("eval", finished / "out", "--baseline", finished / "model", "--context", 1)


def test_kernels_that_are_none(finished: Path) -> None:
    with pytest.raises(ConfigError, match="choose reference, auto, w4a8"):
        quantkit.load(finished / "out", kernels="x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda out: quantkit.Recipe(samples=-1), "'samples' is -1"),
        (lambda out: quantkit.Recipe(expert="W4A16"), "'expert' .*\nFix: fields are scheme, experts"),
        (lambda out: quantkit.load(out, device="tpu"), "'tpu'"),
        (lambda out: quantkit.evaluate(out, out, device="tpu"), "'tpu'"),
        (lambda out: quantkit.load(out, kernels="reference").logits([[1, 2]]), "input_ids are a list"),
    ],
    ids=["range", "field", "device", "device of an evaluation", "list"],
)
def test_errors_of_the_library_are_its_own(call: Callable[[Path], object], words: str, finished: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        call(finished / "out")


def test_a_prompt_that_is_no_text(finished: Path) -> None:
    assert "UTF-8" in refused("generate", finished / "out", "--prompt", "a\udcff")


def test_a_closed_pipe_is_no_verdict(finished: Path) -> None:
    """Exit code 1 means that a gate failed or an engine would not load it."""
    command = [sys.executable, "-m", "quantkit.cli", "inspect", str(finished / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait() == 128 + 13 and "Traceback" not in said, said


@pytest.mark.parametrize("error", [MemoryError("64 GB"), torch.OutOfMemoryError("64 GB")])
def test_out_of_memory_is_no_bug(finished: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def inspect(folder: Path) -> None:
        raise error

    monkeypatch.setattr("quantkit.checkpoint.inspect.inspect", inspect)
    found = CliRunner().invoke(main, ["inspect", str(finished / "out")])
    assert found.exit_code == 2 and found.stderr.startswith("error: out of memory: 64 GB\nFix: "), found.stderr


def test_a_bug_is_no_verdict(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.checkpoint.inspect.inspect", lambda folder: {}["no such key"])
    found = CliRunner().invoke(main, ["inspect", str(finished / "out")])
    assert found.exit_code == 70 and "KeyError: 'no such key'" in found.stderr and found.stdout == ""
    assert found.stderr.splitlines()[-1].startswith("error: this is a bug in quantkit")


@pytest.mark.parametrize("case", SCHEMES)
def test_schemes_that_are_none(case: str, finished: Path, tmp_path: Path) -> None:
    out = spoilt(finished, tmp_path, SCHEMES[case][0])
    for message in (refused("verify", out), refused("eval", out, "--baseline", finished / "model")):
        assert str(out) in message and SCHEMES[case][1] in message, message
    if case != "groups of 64":
        assert SCHEMES[case][1] in refused("inspect", out)


def test_a_source_of_other_weights(finished: Path, tmp_path: Path) -> None:
    """The output is sound, and says what it was made from. A copy of that is as good."""
    other = write_checkpoint(tmp_path / "other", CONFIG, random_weights(CONFIG, seed=1))
    message = refused("verify", finished / "out", "--source", other)
    assert f"other seems not to be the model that {finished / 'out'}" in message
    assert f"run.json records {finished / 'model'}" in message and "differs from its source" in message
    accepted("verify", finished / "out", "--source", shutil.copytree(finished / "model", tmp_path / "copy"))
    out = Path(shutil.copytree(finished / "out", tmp_path / "out"))
    (out / "run.json").unlink()
    message = refused("verify", out, "--source", other)  # quantkit.json says it too
    assert "seems not" in message and "quantkit.json states other weights" in message and "differs" in message


def test_models_that_do_not_belong_together(finished: Path, make_model: Callable[..., Path]) -> None:
    other = make_model("other", num_hidden_layers=2)
    message = refused("eval", finished / "out", "--baseline", other)
    assert str(other) in message and str(finished / "out") in message and "--baseline" in message
    message = refused("verify", finished / "out", "--source", other)
    assert "other seems not to be the model" in message and "is missing" in message and "--source" in message
    message = refused("verify", finished / "out", "--source", finished / "out")
    assert "out seems not to be the model" in message and "unquantized" in message
    assert "already quantized" in refused("quantize", finished / "out", "-o", other.parent / "out", *QUICK)
    assert "already quantized" in refused("quantize", finished / "out", "-o", other.parent / "out", "--dry-run")
