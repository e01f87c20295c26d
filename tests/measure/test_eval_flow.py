"""What surrounds the figures of an evaluation: what is refused and when, digests, comparisons, and logits that are not
finite wherever they come up."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantkit.calib import streams, tokens
from quantkit.calib.documents import read_documents
from quantkit.calib.lockstep import Track
from quantkit.calib.streams import Span, Stream
from quantkit.calib.tokenizer import load_text_tokenizer
from quantkit.calib.tokens import EvalSet
from quantkit.checkpoint.contents import contents
from quantkit.errors import CheckpointError, ConfigError
from quantkit.measure import context
from quantkit.measure.cache import BaselineCache
from quantkit.measure.evaluate import measure
from quantkit.model.cache import KVFormat
from quantkit.model.spec import Layer
from quantkit.report.compare import against
from quantkit.report.gate_names import expected
from quantkit.report.gates import decide, parse_gate
from quantkit.report.html import html
from quantkit.report.markdown import markdown
from quantkit.report.metrics import metrics
from quantkit.report.report import read_report
from quantkit.report.schema import Report, Run, Task
from quantkit.report.task_schema import TaskRun, TaskSource
from quantkit.run.model import Model
from quantkit.run.weights import CheckpointWeights
from tests.conftest import CONFIG, random_weights, write_checkpoint
from tests.helpers.commands import cli
from tests.helpers.evaluations import EXTENT, SHORT, both, flip

LAST = CONFIG["num_hidden_layers"] - 1


@pytest.fixture(scope="module")
def report(pair: tuple[Path, Path]) -> Report:
    return measure(*pair, extent=EXTENT)


def windows(model: Path, length: int, count: int = 6) -> torch.Tensor:
    texts = read_documents("stdlib-held-out")
    return tokens.calibration_windows(load_text_tokenizer(model), texts, count, length, 0)


def spoil(monkeypatch: pytest.MonkeyPatch, which: Path, beyond: int) -> None:
    """In long windows, the hidden states of one model are NaN after so many positions, after the last layer."""
    real = Track.done

    def done(self: Track, layer: Layer) -> None:
        own = isinstance(self.stream.weights, CheckpointWeights) and self.stream.weights.reader.folder == which
        windows, length = self.ids.shape
        if own and layer == self.stream.place.spec.layers[-1] and length > beyond:
            for window in range(windows):
                rows = torch.full((length - beyond, self.stream.target.shape[1]), float("nan"))
                self.stream.target.write(window * length + beyond, rows)
        real(self, layer)

    monkeypatch.setattr(Track, "done", done)


# Long context


def test_far_tokens_that_are_not_finite_are_counted_and_fail(
    pair: tuple[Path, Path], report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, pair[0], 96)
    found = measure(*pair, extent=dataclasses.replace(EXTENT, context=129))
    assert found.context is not None and found.probe is not None
    assert found.context.not_finite == 8 * 32 and found.finite.layer == LAST
    assert found.finite.tokens == 8 * 32 + 3 * 8 * 3  # and what three needles in each window are answered with
    assert found.finite.of >= report.provenance.tokens + 8 * 128
    assert any("256 tokens of the long windows" in note for note in found.notes)
    judged = decide(found, [parse_gate("context.perplexity_ratio < 9")])
    assert judged.verdict.status == "fail" and [gate.status for gate in judged.gates] == ["fail", "fail"]
    assert f"begins in layer {LAST}" in judged.gates[0].reason


def test_no_ratio_where_the_whole_far_half_is_not_finite(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, pair[0], 64)
    found = measure(*pair, extent=dataclasses.replace(EXTENT, context=129))
    assert found.context is not None and found.context.last_ratio is None and found.context.not_finite == 8 * 64
    assert "context.perplexity_ratio" not in metrics(found)
    assert "no logits are finite" in html([Run(name="x", report=decide(found))])


def test_a_baseline_that_is_not_finite_far_out_is_refused(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, pair[1], 64)
    with pytest.raises(CheckpointError, match="logits of the baseline are not finite in windows of 129 tokens"):
        context.long_context(both(pair), windows(pair[1], 129), KVFormat.FLOAT32)


def test_needles_that_are_answered_with_nothing_finite_fail(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, pair[0], 128)  # the text's windows end before, the last read of each needle is beyond
    found = measure(*pair, extent=dataclasses.replace(EXTENT, context=129))
    assert found.context is not None and found.context.not_finite == 0
    assert found.finite.tokens == 24 == found.finite.elsewhere["needles"]
    assert any("24 tokens of the needles' answers" in note for note in found.notes)
    judged = decide(found, [parse_gate("kl.mean < 9")])
    assert judged.verdict.status == "fail" and "not finite: in needles" in judged.gates[1].reason
    spoil(monkeypatch, pair[1], 128)
    with pytest.raises(CheckpointError, match="logits of the baseline are not finite"):
        context.long_context(both(pair), windows(pair[1], 129), KVFormat.FLOAT32)


def test_windows_cut_into_pieces_give_the_same(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ids, real, sizes = windows(pair[1], 150), Stream.spans, set[tuple[int, int]]()
    whole = context.long_context(both(pair), ids, KVFormat.FLOAT32)

    def spans(self: Stream) -> Iterator[Span]:
        for span in real(self):
            sizes.add((span.batch, span.stop - span.start))
            yield span

    monkeypatch.setattr(Stream, "spans", spans)
    monkeypatch.setattr(streams, "_BATCH_TOKENS", 40)
    monkeypatch.setattr(streams, "_LONGEST_WHOLE", 40)
    cut = context.long_context(both(pair), ids, KVFormat.FLOAT32)
    assert {batch for batch, _ in sizes} == {1} and max(size for _, size in sizes) == 40
    for a, b in zip(whole.positions, cut.positions, strict=True):
        assert a.perplexity_quantized == pytest.approx(b.perplexity_quantized, rel=1e-5)
    assert whole.last_ratio and cut.last_ratio and cut.last_ratio.value == pytest.approx(whole.last_ratio.value, rel=1e-5)
    assert [n.quantized for n in cut.needles] == pytest.approx([n.quantized for n in whole.needles], rel=1e-4)


def test_needle_recall_is_a_share_of_what_the_baseline_recalls(
    pair: tuple[Path, Path], report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, ids = both(pair), windows(pair[1], 80)
    nothing = context.long_context(models, ids, KVFormat.FLOAT32)
    assert nothing.needle_recall is None  # random weights recall nothing
    assert "context.needle_recall" not in metrics(report.model_copy(update={"context": nothing}))

    def recall(model: Model, track: Track, first: int, wanted: torch.Tensor) -> Any:
        hits = np.ones(wanted.shape, dtype=bool)
        hits[:: len(ids)] = False  # at each depth, neither recalls this one
        if model is models[1]:
            hits[1 :: len(ids), 2] = False  # the quantized model forgets a token of this one
        return hits.astype(float), hits

    monkeypatch.setattr(context, "_recall", recall)
    found = report.model_copy(update={"context": context.long_context(models, ids, KVFormat.FLOAT32)})
    figure = metrics(found)["context.needle_recall"].figure
    assert figure.value == 12 / 15 and figure.low is not None and figure.high is not None
    assert 0.5 < figure.low < 0.8 < figure.high < 1
    assert decide(found, [parse_gate("context.needle_recall > 0.99")]).verdict.status == "fail"
    (_, gate) = decide(found, [parse_gate("context.needle_recall > 0.9")]).gates
    assert gate.status == "undecided" and gate.unit == "needle" and "eval plants 18 of them" in gate.advice
    assert "context.needle\\_recall" in markdown([Run(name="x", report=decide(found))])
    assert "the quantized model recalls <strong>80.00 %" in html([Run(name="x", report=decide(found))])
    (change,) = [c for c in against(found, found, "old").changes if c.metric == "context.needle_recall"]
    assert change.difference.value == 0 and not change.regression


def test_windows_beyond_the_model_s_positions_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for option in ("--seq-len", "--context"):
        found = cli("eval", pair[0], "--baseline", pair[1], *SHORT, option, 513, "--save", tmp_path)
        assert found.exit_code == 2 and f"{option}: windows of 513 tokens" in found.stderr
        assert "max_position_embeddings is 512" in found.stderr and f"Fix: give {option} 512 or less" in found.stderr


# Digests, and reports that belong to what lies there


def test_a_report_of_other_contents_is_refused(pair: tuple[Path, Path], out: Path) -> None:
    assert cli("eval", out, "--baseline", pair[1], *SHORT).exit_code == 0
    assert cli("report", out, "--gate", "kl.mean<9").exit_code == 0
    shard = flip(out)
    stale = cli("report", out, "--gate", "kl.mean<9")
    assert stale.exit_code == 2 and "was measured on other contents" in stale.stderr and "evaluate it again" in stale.stderr
    assert cli("report", out / "eval" / "report.json", "--gate", "kl.mean<9").exit_code == 0  # the file alone claims nothing
    assert cli("eval", out, "--baseline", pair[1], *SHORT).exit_code == 0
    notes = read_report(out / "eval" / "report.json").notes
    assert f"{out}: {shard.name} does not have the hash that SHA256SUMS states" in notes
    assert contents(out).changed == (shard.name,) and contents(pair[0]).changed == ()


def test_an_eval_that_fails_leaves_nothing_that_looks_finished(pair: tuple[Path, Path], out: Path, tmp_path: Path) -> None:
    junit = tmp_path / "gates.xml"
    assert cli("eval", out, "--baseline", pair[1], *SHORT, "--junit", junit).exit_code == 0
    before = (out / "eval" / "report.json").read_bytes()
    assert cli("eval", out, "--baseline", tmp_path / "none", *SHORT, "--junit", junit).exit_code == 2
    assert [path.name for path in (out / "eval").iterdir()] == ["report.previous.json"] and not junit.exists()
    assert (out / "eval" / "report.previous.json").read_bytes() == before
    assert "holds no evaluation" in cli("report", out).stderr


def test_another_fine_tune_is_another_baseline(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Same names, sizes, headers and times: only the contents tell it."""
    other = shutil.copytree(pair[1], tmp_path / "other")
    flip(other)
    for base in (pair[1], other):
        measure(pair[0], base, extent=dataclasses.replace(EXTENT, cache=tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert contents(other).digest != contents(pair[1]).digest


def test_other_code_is_another_cached_baseline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from quantkit.measure import cache

    def key() -> Path:
        return BaselineCache(tmp_path, "model", "text", 8, torch.device("cpu")).folder

    first = key()
    assert key() == first
    monkeypatch.setattr(cache, "code_digest", lambda parts: "another version")
    assert key() != first


def test_the_text_s_digest_tells_padding_from_a_token() -> None:
    ids = torch.tensor([[5, 7, 0, 0], [1, 2, 3, 4]])
    digests = {EvalSet(ids, torch.tensor([n, 4]), torch.tensor([0, 1]), "document").digest() for n in (2, 3, 4)}
    assert len(digests) == 3


# Comparisons


def test_another_baseline_is_refused(pair: tuple[Path, Path], report: Report, tmp_path: Path) -> None:
    tuned = random_weights(CONFIG)
    tuned["model.norm.weight"] = tuned["model.norm.weight"] * 1.2
    base = write_checkpoint(tmp_path / "tuned", CONFIG, tuned)
    other = measure(pair[0], base, extent=EXTENT)
    with pytest.raises(ConfigError, match="its baseline is .*nats for document.*tuned"):
        against(other, report, "old")
    for name, found in (("a", report), ("b", other)):
        (tmp_path / f"{name}.json").write_text(found.model_dump_json())
    side = cli("report", tmp_path / "a.json", tmp_path / "b.json", "--gate", "kl.mean<99")
    assert side.exit_code == 0 and "warning: " in side.stderr and "cannot be compared: baseline" in side.stderr
    alike = cli("report", tmp_path / "a.json", tmp_path / "a.json", "--gate", "kl.mean<99")
    assert "warning" not in alike.stderr


def test_another_kv_cache_is_refused(report: Report) -> None:
    origin = report.provenance.model_copy(update={"kv_cache": "fp8"})
    with pytest.raises(ConfigError, match=r"its KV cache \(--kv-cache\) is not rounded, this report's is fp8"):
        against(report.model_copy(update={"provenance": origin}), report, "old")


def with_task(report: Report, limit: int | None = None, **changed: Any) -> Report:
    figures = {"metric": "acc", "baseline": 0.5, "quantized": 0.4, "recovery": 0.8, "ci95": (0.7, 0.9)}
    counts = {"right_to_wrong": 10, "wrong_to_right": 0, "mcnemar_p": 0.1, "n": 100}
    how = {"name": "piqa", "task": "piqa", "shots": 0, "filter": "none", "data": "hub"}
    task = {"name": "piqa", **figures, **counts}
    task |= {key: value for key, value in changed.items() if key in task and key != "name"}
    how |= {key: value for key, value in changed.items() if key in how}
    run = TaskRun(
        suite=None, benchmarks=[TaskSource(**how)], left_out=[], limit=limit, max_new_tokens=None, kernels="auto",
        chat_template=changed.get("chat_template", False), kv_cache="bf16", truncated={}, harness="0", items=None, seconds=1,
    )  # fmt: skip
    return report.model_copy(update={"tasks": [Task.model_validate(task)], "task_run": run})


@pytest.mark.parametrize(
    "changed",
    [{"shots": 5}, {"filter": "strict"}, {"n": 50}, {"metric": "acc_norm"}, {"limit": 9}, {"chat_template": True}],
)
def test_a_task_asked_in_another_way_is_not_compared(report: Report, changed: dict[str, Any]) -> None:
    same = against(with_task(report), with_task(report), "old")
    assert "tasks.piqa.recovery" in {change.metric for change in same.changes}
    found = against(with_task(report, **changed), with_task(report), "old")
    assert "tasks.piqa.recovery" not in {change.metric for change in found.changes}
    (note,) = [note for note in found.notes if "tasks.piqa" in note]
    word = next(iter(changed)).replace("_", " ", 1) if changed != {"metric": "acc_norm"} else "metric"
    assert "old is not compared by tasks.piqa" in note and word in note


def test_kv_cache_context_and_weights_are_compared_too(pair: tuple[Path, Path]) -> None:
    extent = dataclasses.replace(EXTENT, kv_cache=KVFormat.FP8, context=80)
    found = measure(*pair, extent=extent)
    names = {change.metric for change in against(found, found, "old").changes}
    assert {"kv_cache.added_kl", "context.perplexity_ratio", "weights.error.max"} <= names
    assert found.context is not None
    longer = found.model_copy(update={"context": found.context.model_copy(update={"length": 160})})
    unlike = against(longer, found, "old")
    assert "context.perplexity_ratio" not in {change.metric for change in unlike.changes}
    assert "old is not compared by context: length 80, now 160" in unlike.notes
    names_of_gates = expected(True, True, ["piqa"])
    assert metrics(with_task(found)).keys() <= names_of_gates and "context.needle_recall" in names_of_gates


# What is refused before the work
