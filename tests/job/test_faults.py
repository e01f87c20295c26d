"""What is read again is checked, what is good is kept: damage and change between the lines of a job, in hand-made cases."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import quantkit
from quantkit.atomic import temporary_name
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import CheckpointError, ConfigError, OutputError, QuantkitError, VerificationError
from quantkit.job import pipeline, placement
from quantkit.recipe import Recipe
from tests.conftest import CONFIG, SMALL, random_weights, write_checkpoint

RECIPE = Recipe(experts="W4A16", attention="FP8", **SMALL)  # type: ignore[arg-type]
ROUNDED = Recipe(scheme="W8A16", group_size=32)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and `out` that was made from it."""
    root = tmp_path_factory.mktemp("undisturbed")
    write_checkpoint(root / "model", CONFIG, random_weights(CONFIG))
    quantkit.quantize(root / "model", root / "out", RECIPE)
    return root


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def stopped(model: Path, out: Path, after_layer: int, recipe: Recipe = RECIPE) -> Path:
    """OUT.partial of a run that was interrupted in the unit after this layer's (3: before the last one is committed)."""

    def stop(step: pipeline.Step) -> None:
        if step.layer == after_layer:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantkit.quantize(model, out, recipe, progress=stop)
    return out.with_name(out.name + ".partial")


def same(out: Path, undisturbed: Path) -> bool:
    names = {path.name for path in (undisturbed / "out").iterdir()}
    whole = (out / "SHA256SUMS").read_bytes() == (undisturbed / "out" / "SHA256SUMS").read_bytes()
    return whole and {path.name for path in out.iterdir()} == names


def test_a_bad_bit_in_a_committed_shard_costs_its_unit(undisturbed: Path, tmp_path: Path) -> None:
    out, done = tmp_path / "out", list[int]()
    partial = stopped(undisturbed / "model", out, 3)
    flip(partial / "model-00001-of-00003.safetensors")
    damaged = (partial / "model-00001-of-00003.safetensors").read_bytes()
    record = quantkit.quantize(undisturbed / "model", out, RECIPE, progress=lambda step: done.append(step.layer))
    assert same(out, undisturbed) and done == [2, 3]
    (kept,) = (tmp_path / "out.failed").iterdir()
    assert kept.read_bytes() == damaged and "no longer what was written" in record["recovered"][0]


def test_a_bad_bit_in_an_early_unit_spares_the_later_ones(tmp_path: Path) -> None:
    """Also where the hidden states that the unit read are gone: they come again through the units before it."""
    out, done, config = tmp_path / "out", list[int](), {**CONFIG, "num_hidden_layers": 6}
    model = write_checkpoint(tmp_path / "model", config, random_weights(config))
    quantkit.quantize(model, tmp_path / "whole", RECIPE)
    partial = stopped(model, out, 5)  # units 0 (around), 1, 2 are committed
    flip(partial / "model-00002-of-00004.safetensors")
    quantkit.quantize(model, out, RECIPE, progress=lambda step: done.append(step.layer))
    assert done == [0, 1, 4, 5]  # the pair that was damaged, and the one that was not there
    assert (out / "SHA256SUMS").read_bytes() == (tmp_path / "whole" / "SHA256SUMS").read_bytes()


def test_a_bad_bit_in_an_early_journal_line_spares_the_later_ones(undisturbed: Path, tmp_path: Path) -> None:
    out, done = tmp_path / "out", list[int]()
    partial = stopped(undisturbed / "model", out, 3)
    journal = partial / ".work" / "journal"
    flip(journal, journal.read_bytes().index(b"\n") + 40)  # in the line of unit 0
    quantkit.quantize(undisturbed / "model", out, RECIPE, progress=lambda step: done.append(step.layer))
    assert done == [2, 3] and same(out, undisturbed)


@pytest.mark.parametrize("damage", ["flipped", "cut", "link"])
def test_a_damaged_tape_is_computed_again(damage: str, undisturbed: Path, tmp_path: Path) -> None:
    """One bit of a hidden state would give other codes; a short file would be filled with zeros."""
    out, done = tmp_path / "out", list[int]()
    partial = stopped(undisturbed / "model", out, 3)
    (tape,) = (partial / ".work").glob("tape-2.f32")
    if damage == "cut":
        os.truncate(tape, 100)
    else:
        flip(tape, 103)  # of the exponent of one value
    if damage == "link":
        tape.symlink_to(tape.rename(tmp_path / "elsewhere"))
    quantkit.quantize(undisturbed / "model", out, RECIPE, progress=lambda step: done.append(step.layer))
    assert done == [2, 3] and same(out, undisturbed)


def test_damage_found_at_the_end_costs_its_unit(undisturbed: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "out", undisturbed / "model"

    def spoil(step: pipeline.Step) -> None:
        if step.layer == 3:
            flip(tmp_path / "out.partial" / "model-00002-of-00003.safetensors")

    with pytest.raises(VerificationError, match=r"does not have the hash[^$]*kept as[^$]*repeat the command"):
        quantkit.quantize(model, out, RECIPE, progress=spoil)
    done: list[int] = []
    assert not out.exists()
    quantkit.quantize(model, out, RECIPE, progress=lambda step: done.append(step.layer))
    assert done == [0, 1] and same(out, undisturbed)


def test_what_no_repetition_would_mend_is_kept(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(folder: Path, source: Path) -> None:
        raise VerificationError("a weight is wrong")

    monkeypatch.setattr(pipeline, "verify", wrong)
    for name in ("out.partial", "out.partial.2"):
        with pytest.raises(VerificationError, match=f"kept as .*out.failed/{name}"):
            quantkit.quantize(undisturbed / "model", tmp_path / "out", ROUNDED)
        assert len([*(tmp_path / "out.failed" / name).glob("*.safetensors")]) == 3
    assert not (tmp_path / "out.partial").exists() and not (tmp_path / "out").exists()


def test_a_source_that_is_replaced_is_noticed(undisturbed: Path, tmp_path: Path) -> None:
    """Another model of the same names and shapes: before, OUT was a mixture of both."""
    model, out = shutil.copytree(undisturbed / "model", tmp_path / "model"), tmp_path / "out"
    other = write_checkpoint(tmp_path / "other", CONFIG, random_weights(CONFIG, seed=1))

    def replace(step: pipeline.Step) -> None:
        if step.layer == 1:
            for shard in other.glob("*.safetensors"):
                os.replace(shard, model / shard.name)

    with pytest.raises(CheckpointError, match=r"model-0000.*has been replaced while"):
        quantkit.quantize(model, out, RECIPE, progress=replace)
    assert not out.exists()
    with pytest.raises(OutputError, match="another job; these differ:\n  source: "):
        quantkit.quantize(model, out, RECIPE)
    shutil.rmtree(model)  # put back: a copy, with other times
    shutil.copytree(undisturbed / "model", model, copy_function=shutil.copy)
    assert quantkit.quantize(model, out, RECIPE)["resumed_at_unit"] >= 1 and same(out, undisturbed)


def test_one_value_changed_where_no_sample_lies(tmp_path: Path) -> None:
    """The fingerprint reads 4 KiB of each tensor; the weights are compared with the source before OUT appears."""
    model, out = write_checkpoint(tmp_path / "model", CONFIG, random_weights(CONFIG)), tmp_path / "out"
    reader = CheckpointReader(model)
    before, entry = reader.fingerprint(), reader.entries["model.embed_tokens.weight"]

    def change(step: pipeline.Step) -> None:
        if step.layer == 3:
            data = bytearray((model / entry.shard).read_bytes())
            header = int.from_bytes(data[:8], "little")
            begin = json.loads(data[8 : 8 + header])["model.embed_tokens.weight"]["data_offsets"][0]
            data[8 + header + begin] ^= 1
            (model / entry.shard).write_bytes(data)

    with pytest.raises(VerificationError, match="model.embed_tokens.weight"):
        quantkit.quantize(model, out, ROUNDED, progress=change)
    assert reader.fingerprint() == before and not out.exists()


def test_options_that_decide_nothing_are_not_in_the_key(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(undisturbed / "model", out, 3, ROUNDED)
    record = quantkit.quantize(undisturbed / "model", out, ROUNDED.model_copy(update={"seed": 5, "samples": 7}))
    assert record["resumed_at_unit"] == 2


def test_another_number_of_threads_resumes_with_the_first(undisturbed: Path, tmp_path: Path) -> None:
    """Threads decide the last bits of sums: a job keeps the number that it began with, and leaves the caller's as it was."""
    stopped(undisturbed / "model", tmp_path / "out", 1, ROUNDED)
    seen, out = set[int](), tmp_path / "out"
    try:
        torch.set_num_threads(2)
        record = quantkit.quantize(
            undisturbed / "model", out, ROUNDED, progress=lambda step: seen.add(torch.get_num_threads())
        )
        assert seen == {1} and record["threads"] == 1 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_killed_between_publishing_and_clean_up(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, model = tmp_path / "out", undisturbed / "model"

    def killed(target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("quantkit.job.partial._clean", killed)
        quantkit.quantize(model, out, RECIPE)
    assert (out / ".work").is_dir()
    for _ in range(2):  # the second time there is nothing left to do
        assert quantkit.quantize(model, out, RECIPE) == json.loads((out / "run.json").read_text())
        assert same(out, undisturbed) and os.stat(out).st_mode & 0o777 == os.stat(model).st_mode & 0o777
    pipeline.describe(model, out, RECIPE, "cpu")
    for refused in (quantkit.quantize, lambda *given: pipeline.describe(*given, "cpu")):
        with pytest.raises(OutputError, match="exists"):
            refused(model, out, RECIPE.model_copy(update={"group_size": 64}))
    flip(out / "model-00002-of-00003.safetensors")
    with pytest.raises(OutputError, match="made it, and since then model-00002-of-00003.safetensors does not have the hash"):
        quantkit.quantize(model, out, RECIPE)


def taken(model: Path, out: Path, prepare: Callable[[], object]) -> str:
    prepare()
    with pytest.raises(OutputError) as refused:
        quantkit.quantize(model, out, ROUNDED)
    assert not out.exists()
    return str(refused.value)


@pytest.mark.parametrize("name", ["", ".work"])
def test_work_that_others_may_write_to_is_refused(name: str, undisturbed: Path, tmp_path: Path) -> None:
    partial = stopped(undisturbed / "model", tmp_path / "out", 1, ROUNDED)
    assert [oct(os.stat(path).st_mode & 0o777) for path in (partial, partial / ".work")] == ["0o700", "0o700"]
    message = taken(undisturbed / "model", tmp_path / "out", lambda: os.chmod(partial / name, 0o770))
    assert f"others may write to {partial / name}".rstrip("/") in message
    os.chmod(partial / name, 0o700)
    real = shutil.move(partial / name, tmp_path / "elsewhere")
    (partial / name).symlink_to(real)
    assert "link" in taken(undisturbed / "model", tmp_path / "out", lambda: None) or not name  # else quantkit's not at all


@pytest.mark.parametrize("name", ["lock", "journal"])
def test_links_in_the_work_are_not_followed(name: str, undisturbed: Path, tmp_path: Path) -> None:
    partial = stopped(undisturbed / "model", tmp_path / "out", 1, ROUNDED)
    mine = tmp_path / "mine"
    mine.write_text("my own")

    def link() -> None:
        (partial / ".work" / name).unlink()
        (partial / ".work" / name).symlink_to(mine)

    assert "link" in taken(undisturbed / "model", tmp_path / "out", link) and mine.read_text() == "my own"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_work_of_another_user_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    partial = stopped(undisturbed / "model", tmp_path / "out", 1, ROUNDED)
    for place in (partial, partial / ".work", partial / ".work" / "journal"):
        message = taken(undisturbed / "model", tmp_path / "out", lambda place=place: os.chown(place, 12345, -1))
        assert f"{place} belongs to another user (uid 12345)" in message
        os.chown(place, 0, -1)


def test_links_out_of_the_model_are_not_carried(undisturbed: Path, tmp_path: Path) -> None:
    """A hub snapshot's links to its own blobs are its files; a link elsewhere would publish what lies there."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    shutil.copytree(undisturbed / "model", snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    blob = shutil.move(snapshot / "tokenizer.json", tmp_path / "models--a--b" / "blobs" / "0123abcd")
    (snapshot / "tokenizer.json").symlink_to(os.path.relpath(blob, snapshot))
    quantkit.quantize(snapshot, tmp_path / "out", ROUNDED)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (undisturbed / "model" / "tokenizer.json").read_bytes()
    (tmp_path / "secret").write_text("a key")
    (snapshot / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="LICENSE is a link to .*secret, outside the model"):
        quantkit.quantize(snapshot, tmp_path / "other", ROUNDED)
    assert not (tmp_path / "other.partial").exists()


def test_no_settings_of_the_caller_reach_the_numbers(make_model: Callable[..., Path], tmp_path: Path) -> None:
    """As libraries leave them: a default dtype, autocast, a default device, matrix products in less than float32."""
    model, ids = make_model(num_hidden_layers=2), torch.arange(1, 41).view(2, 20)

    def everything(name: str) -> tuple[Any, ...]:
        quantkit.quantize(model, tmp_path / name, RECIPE)
        quantkit.convert(tmp_path / name, tmp_path / f"{name}-bf16", "bf16")
        result = quantkit.evaluate(tmp_path / name, model, seq_len=16, windows=2)
        loaded = quantkit.load(tmp_path / name, kernels="reference")
        states = [trace.hidden for trace in loaded.layers(ids)]
        made = [(tmp_path / folder / "SHA256SUMS").read_bytes() for folder in (name, f"{name}-bf16")]
        return made, result["kl"], result["perplexity"], loaded.logits(ids), loaded.head(states[-1]), loaded.generate(ids, 4)

    plain = everything("plain")
    try:
        torch.set_default_dtype(torch.bfloat16)
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            typed = everything("typed")
            assert torch.get_default_dtype() is torch.bfloat16 and torch.get_float32_matmul_precision() == "medium"
            assert torch.is_autocast_enabled("cpu")
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision("highest")
    with torch.device("meta"):
        placed = everything("placed")
    for found in (typed, placed):
        assert found[:3] == plain[:3]
        assert all(torch.equal(a, b) for a, b in zip(found[3:], plain[3:], strict=True))


def test_temporary_names_do_not_hang_on_the_process_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two containers that share a disk both have a process 7."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    assert len({temporary_name(tmp_path / "a") for _ in range(9)}) == 9


def test_conversion_keeps_what_is_good(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "MAX_SHARD_BYTES", 60_000)
    quantkit.quantize(undisturbed / "model", tmp_path / "source", ROUNDED)
    quantkit.convert(tmp_path / "source", tmp_path / "whole", "bf16")

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantkit.convert(tmp_path / "source", tmp_path / "out", "bf16", progress=stop)
    flip(next((tmp_path / "out.partial").glob("model-00002-*")))
    done: list[int] = []
    quantkit.convert(tmp_path / "source", tmp_path / "out", "bf16", progress=lambda n, total: done.append(n))
    assert done[:2] == [2, 5] and len([*(tmp_path / "out.failed").iterdir()]) == 1
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (tmp_path / "whole" / "SHA256SUMS").read_bytes()
    before = json.loads((tmp_path / "out" / "run.json").read_text())
    assert quantkit.convert(tmp_path / "source", tmp_path / "out", "bf16") == before  # repeated, it is finished
    with pytest.raises(QuantkitError, match="exists"):
        quantkit.convert(tmp_path / "source", tmp_path / "out", "gptq")
