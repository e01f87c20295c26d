"""Layers outside, text inside: what passes through them is read once, and a group's job is nothing but data."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quantkit
from quantkit.calib.lockstep import Observer
from quantkit.calib.tape import MemoryTape, Tape
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import CheckpointError
from quantkit.job import pipeline
from quantkit.job.group import GroupJob
from quantkit.job.pipeline import Step
from quantkit.measure.evaluate import Extent, evaluation_of, figures, measure, read_text
from quantkit.measure.run import Evaluation
from quantkit.model.cache import KVFormat
from quantkit.model.registry import build_spec
from quantkit.quant.method import Method
from quantkit.recipe import Recipe
from quantkit.scheme import PRESETS
from quantkit.stats import LinearStats
from tests.conftest import CONFIG, SMALL

RIDING = Extent(seq_len=48, windows=6, samples=0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """How often each tensor of each folder is read."""
    counted = Counter[tuple[str, str]]()
    for name in ("tensor", "rows"):
        read = getattr(CheckpointReader, name)

        def reading(self: CheckpointReader, key: str, *at_once: int, read: Any = read) -> Any:
            counted[self.folder.name, key] += 1
            return read(self, key, *at_once)

        monkeypatch.setattr(CheckpointReader, name, reading)
    return counted


@pytest.mark.parametrize("windows", [2, 40])
def test_eval_reads_each_weight_of_either_model_once(
    make_model: Callable[..., Path], tmp_path: Path, reads: Counter[tuple[str, str]], windows: int
) -> None:
    """Whatever the number of windows, with long ones, needles and all variants beside them."""
    model = make_model("source", tie_word_embeddings=False)
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W8A16", group_size=32))
    reads.clear()
    extent = Extent(seq_len=32, windows=windows, samples=0, context=70, kv_cache=KVFormat.FP8)
    report = measure(tmp_path / "out", model, extent=extent)
    assert report.context is not None and report.probe is not None and report.kv is not None
    stored = {(folder.name, key) for folder in (model, tmp_path / "out") for key in CheckpointReader(folder).entries}
    weights = {key for key in stored if not key[1].endswith("weight_shape")}  # two numbers, which the spec knows
    assert reads.keys() == weights and set(reads.values()) == {1}


def test_quantizing_reads_each_weight_once(
    make_model: Callable[..., Path], tmp_path: Path, reads: Counter[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And verification, which is independent, once more."""
    model, real, before = make_model("source"), pipeline.verify, Counter[tuple[str, str]]()

    def verify(*given: Any) -> Any:
        before.update(reads)
        return real(*given)

    monkeypatch.setattr(pipeline, "verify", verify)
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", **SMALL))
    linears = {key for key in reads if key[0] == "source" and "proj" in key[1]}
    assert linears and {before[key] for key in linears} == {1} and {reads[key] for key in linears} == {2}


def held_out(model: Path) -> Evaluation:
    data = read_text(model, CONFIG, "stdlib-held-out", RIDING).data
    return evaluation_of(build_spec(CONFIG, "test"), data, model)


@pytest.mark.parametrize("recipe", [Recipe(**SMALL), Recipe(scheme="W8A16", group_size=32)], ids=["calibrated", "data-free"])
def test_held_out_text_passes_while_weights_are_made(
    model: Path,
    tmp_path: Path,
    reads: Counter[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    recipe: Recipe,
) -> None:
    """No weight is read again for it, nothing of it is left in OUT, the bytes are those without it, and the figures those of
    an evaluation afterwards; also when the work was interrupted."""
    real, before, passing = pipeline.verify, Counter[tuple[str, str]](), held_out(model)

    def verify(*given: Any) -> Any:
        before.update(reads)
        return real(*given)

    monkeypatch.setattr(pipeline, "verify", verify)
    pipeline.quantize(model, tmp_path / "out", recipe, device="cpu", beside=[passing])
    linears = {key for key in before if "proj" in key[1]}
    assert passing.ran and linears and {before[key] for key in linears} == {1}
    reads.clear()
    found = measure(tmp_path / "out", model, extent=RIDING, ran=passing)
    assert not reads
    after = measure(tmp_path / "out", model, extent=RIDING)
    quantkit.quantize(model, tmp_path / "alone", recipe, device="cpu")
    sums = [(tmp_path / name / "SHA256SUMS").read_bytes() for name in ("out", "alone")]
    assert sums[0] == sums[1] and not list((tmp_path / "out").rglob("*.f32"))

    def killed(step: Step) -> None:
        if step.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model, tmp_path / "cut", recipe, device="cpu", progress=killed, beside=[held_out(model)])
    again = held_out(model)
    pipeline.quantize(model, tmp_path / "cut", recipe, device="cpu", beside=[again])
    resumed = measure(tmp_path / "cut", model, extent=RIDING, ran=again)
    for other in (after, resumed):
        assert figures(found)["kl"] == pytest.approx(figures(other)["kl"], rel=1e-4)
        assert figures(found)["perplexity"] == pytest.approx(figures(other)["perplexity"], rel=1e-6)
        assert found.probe and other.probe and found.probe.floor.value == pytest.approx(other.probe.floor.value, rel=1e-3)
        for a, b in zip(found.linears, other.linears, strict=True):
            assert a.weight_error == pytest.approx(b.weight_error, rel=1e-5) and a.key == b.key
    assert figures(found)["kl"]["mean"] > 0


def stats_of(x: torch.Tensor, lent: torch.Tensor) -> LinearStats:
    found = LinearStats.empty(x.shape[1], torch.device("cpu"), True)
    found.add(x)
    found.lend(lent, 0.25)
    return found


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(0, 40), st.integers(0, 40), st.integers(0, 9))
def test_merged_statistics_are_those_of_all_tokens(seed: int, width: int, first: int, second: int, lent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, more = (torch.randn(n, width, generator=generator) for n in (first + second, lent))
    whole, parts = stats_of(x, more), stats_of(x[:first], more[:0])
    parts.merge(stats_of(x[first:], more))
    assert whole.hessian is not None and parts.hessian is not None
    torch.testing.assert_close(parts.hessian, whole.hessian)
    same = ("in_features", "amax", "lent_amax", "tokens", "lent", "mass")
    assert [getattr(parts, name) for name in same] == [getattr(whole, name) for name in same]


def test_statistics_of_two_kinds_are_not_merged() -> None:
    of = LinearStats.empty
    for other in (of(3, torch.device("cpu"), True), of(4, torch.device("cpu"), False)):
        with pytest.raises(ValueError, match="features, or of two kinds"):
            of(4, torch.device("cpu"), True).merge(other)


WORKER = """
import pickle, sys, torch
torch.set_num_threads(1)
job = pickle.loads(sys.stdin.buffer.read())
done = [(one.quantized, one.outcome) for one in job.run(torch.device("cpu"))]
solved = [(q.codes.float(), q.scale, q.input_scale, outcome) for q, outcome in done]
sys.stdout.buffer.write(pickle.dumps(solved))
"""


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "FP8"])
def test_a_groups_job_runs_in_another_process(name: str) -> None:
    """It holds no file and no closure: sent away, it gives the codes that it gives here."""
    generator = torch.Generator().manual_seed(0)
    weights = tuple(torch.randn(n, 256, generator=generator).bfloat16() for n in (64, 32))
    stats = stats_of(torch.randn(400, 256, generator=generator), torch.randn(3, 256, generator=generator))
    job = GroupJob(weights, stats, PRESETS[name], Method("gptq" if name != "FP8" else "rtn"))
    here, threads = job, torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = here.run(torch.device("cpu"))
    finally:
        torch.set_num_threads(threads)
    sent = subprocess.run([sys.executable, "-c", WORKER], input=pickle.dumps(job), capture_output=True, check=True)
    for one, (codes, scale, input_scale, said) in zip(expected, pickle.loads(sent.stdout), strict=True):
        q, outcome = one.quantized, one.outcome
        assert torch.equal(q.codes.float(), codes) and torch.equal(q.scale, scale) and outcome == said
        assert outcome.weight_error > 0 and (input_scale is None) == (q.input_scale is None) == (name != "FP8")


def test_a_tape_in_memory_does_what_one_in_a_file_does(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tapes: tuple[Tape, ...] = Tape.create(tmp_path / "tape", 40, 7), MemoryTape(40, 7)
    for tape in tapes:
        tape.write(0, torch.zeros(40, 7))
    for _ in range(30):
        start = int(torch.randint(30, (), generator=generator))
        rows = torch.randperm(40, generator=generator)[:12].sort().values
        values, more = torch.randn(10, 7, generator=generator), torch.randn(12, 7, generator=generator).bfloat16()
        for tape in tapes:
            tape.write(start, values)
            tape.add(rows, more)
            tape.read(0, 40).zero_()  # a copy
    for read in (lambda tape: tape.read(3, 29), lambda tape: tape.gather(torch.tensor([5, 6, 31]))):
        whole = [read(tape).nan_to_num(0.0) for tape in tapes]
        torch.testing.assert_close(*whole)


def test_what_fails_beside_a_quantization_does_not_withhold_it(model: Path, tmp_path: Path) -> None:
    class Broken(Observer):
        def finish(self) -> None:
            raise CheckpointError("logits of the baseline are not finite", "check that checkpoint")

    recipe = Recipe(scheme="W8A16", group_size=32)
    with pytest.raises(CheckpointError, match="not finite"):
        pipeline.quantize(model, tmp_path / "out", recipe, device="cpu", beside=[held_out(model), Broken()])
    assert quantkit.quantize(model, tmp_path / "out", recipe, device="cpu")["linears"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("out")] == ["out"]
