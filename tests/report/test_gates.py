"""Gates, and the intervals that they are decided on: on reports made by hand and on data drawn from known distributions."""

from __future__ import annotations

from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from quantkit.errors import ConfigError
from quantkit.measure.divergence import TokenScores, bootstrap
from quantkit.measure.sections import moe
from quantkit.measure.trace import OutputErrors
from quantkit.report.compare import against
from quantkit.report.gates import DEFAULT_GATES, decide, junit, parse_gate
from quantkit.report.html import html
from quantkit.report.intervals import Resampler, student, tail_needs, wilson
from quantkit.report.markdown import markdown
from quantkit.report.metrics import metrics, worst_expert
from quantkit.report.schema import Finite, GateResult, Report, Run
from quantkit.report.task_schema import TaskRun
from quantkit.run.model import Model
from tests.helpers.paths import ROOT
from tests.helpers.reports import SURE, divergence, experts, fig, made, task

MODEL = ROOT / "examples" / "tiny-hunyuan"


def gate(report: Report, text: str) -> GateResult:
    return decide(report, [parse_gate(text)]).gates[1]


# Intervals


def scores(kl: np.ndarray, documents: int, flips: int = 0) -> TokenScores:
    n = len(kl)
    same = np.where(np.arange(n) < flips, 0.0, 1.0)
    unit = np.arange(n) * documents // n
    return TokenScores(kl, kl, kl, same, np.ones(n), same, np.ones(n), unit, unit)


def test_students_t_is_that_of_the_tables() -> None:
    table = {4: 2.7764, 5: 2.5706, 7: 2.3646, 15: 2.1314, 30: 2.0423, 120: 1.9799}
    assert {v: student(v) for v in table} == pytest.approx(table, rel=4e-4)


@pytest.mark.parametrize("documents", [5, 8, 16])
def test_a_few_documents_are_covered(documents: int) -> None:
    """2,000 sets of normal document means: about 95 % of intervals hold it; of plain percentiles 84, 88 and 92 %."""
    drawn = np.random.default_rng(1).standard_normal((2000, documents))
    sample = Resampler(np.arange(documents), resamples=500)
    held = [low < 0 < high for low, high in (sample.interval(sample.means(x)) or (1, 1) for x in drawn)]
    assert 0.93 <= np.mean(held) <= 0.97


def test_a_quantile_takes_tokens_beyond_it() -> None:
    """With fewer, the largest of them, which no resample exceeds, lies below the true quantile too often."""
    rng = np.random.default_rng(0)
    found = bootstrap(scores(rng.lognormal(size=400), 8), resamples=200)
    assert "kl.p90" in found and not {"kl.p99", "kl.p999"} & found.keys()
    readme = bootstrap(scores(rng.lognormal(size=64 * 511), 64), resamples=200)
    assert {"kl.p99", "kl.p999"} <= readme.keys()
    assert (tail_needs(0.5), tail_needs(0.99), tail_needs(0.999)) == (40, 2000, 20_000)
    few = divergence(p99=fig(0.01))
    row = gate(made(divergence=few, origin={"tokens": 400}), "kl.p99 < 1")
    assert row.status == "undecided" and "takes 2,000 tokens" in row.reason and row.needed == 2000


def test_the_upper_bound_of_a_quantile_holds() -> None:
    """Of p99 from the fewest tokens that have an interval: it may be missed a little more often than in 2.5 % of samples."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(150):
        missed += bootstrap(scores(rng.exponential(size=2000), 64), resamples=150)["kl.p99"][1] < -np.log(0.01)
    assert missed / 150 < 0.08


def test_no_flip_is_weak_evidence() -> None:
    found = bootstrap(scores(np.full(75, 0.1), 5))
    assert found["flips.right_to_wrong"] == pytest.approx((0, 0.0487), abs=1e-4)
    assert found["top1_agreement"] == pytest.approx((0.9513, 1), abs=1e-4)
    low, high = wilson(7, 50)  # its bounds are the shares from which 7 of 50 lie 1.96 standard errors away
    assert [abs(p - 7 / 50) / (p * (1 - p) / 50) ** 0.5 for p in (low, high)] == pytest.approx([1.96, 1.96], abs=1e-4)


def errors(blocks: int = 8) -> OutputErrors:
    """`every`: one token in each block; `one`: one in one block; `broken`: an output that is not finite in one block."""
    found, ones = OutputErrors(blocks), torch.ones(blocks, dtype=torch.float64)
    found.add("every", torch.arange(blocks), 0.01 * (1 + torch.arange(blocks)), ones)
    found.add("one", torch.zeros(1, dtype=torch.int64), 0.9 * ones[:1], ones[:1])
    lost = torch.where(torch.arange(blocks) == 3, torch.inf, 0.1 * ones)
    found.add("broken", torch.arange(blocks), lost, ones)
    found.add("nothing", torch.arange(blocks), 0 * ones, 0 * ones)
    found.add("from nothing", torch.arange(blocks), ones, 0 * ones)
    return found


def test_an_expert_needs_documents_of_its_own() -> None:
    found = errors().figures()
    assert found["one"] == fig(0.9)
    assert found["every"].low is not None and found["every"].low < found["every"].value < (found["every"].high or 0)
    assert found.keys() == {"every", "one"} and errors().not_finite() == {"broken", "from nothing"}


def test_the_largest_leaves_out_experts_without_an_interval() -> None:
    report = made(moe=experts(fig(0.02, 0.01, 0.03), fig(0.04, 0.02, 0.06), fig(0.9), None))
    row = gate(report, "mlp.output_error.max < 0.15")
    assert row.status == "pass" and row.measured == fig(0.04, 0.02, 0.06)
    assert "left out are 2 of 4 MLPs, read on fewer than 5 documents, with up to 0.9 in layer 2, expert 2" in row.reason
    worst = worst_expert(report)
    assert worst is not None and worst[0] == "layer 2, expert 1"
    assert gate(made(moe=experts(fig(0.9), fig(0.02))), "mlp.output_error.max < 0.15").status == "undecided"
    assert "left out" not in gate(made(), "mlp.output_error.max < 0.15").reason


# What is not finite


def test_an_expert_that_is_not_finite_fails_its_gate_and_is_named() -> None:
    report = decide(made(moe=experts(SURE, None, not_finite=["layer 2, expert 1"])))
    row = next(row for row in report.gates if row.metric == "mlp.output_error.max")
    assert row.status == report.verdict.status == "fail" and row.where == "layer 2, expert 1"
    assert "mlp.output_error.max" not in metrics(report) and "layer 2, expert 1" in report.verdict.reasons[0]
    assert decide(made(moe=report.moe), [parse_gate("kl.mean < 9")]).verdict.status == "fail"  # whatever is asked for
    run = [Run(name="x", report=report)]
    assert "Output not finite: layer 2, expert 1" in markdown(run) and "output that is not finite" in html(run)


def test_sections_name_experts_and_read_all_their_linears() -> None:
    """down_proj had fewer tokens for its inputs than gate_proj; expert 5 of layer 2 is not finite."""
    spec = Model(MODEL, torch.device("cpu")).spec
    layer = spec.layers[2]
    expert = layer.mlp.experts[5]  # type: ignore[union-attr]
    found = OutputErrors(8)
    found.add(expert.gate.key, torch.tensor([0]), torch.tensor([torch.nan]).double(), torch.ones(1).double())
    sent = np.zeros((len(spec.layers), 64), dtype=np.int64)
    run = SimpleNamespace(errors=found, spec=spec, layers=SimpleNamespace(sent=sent))
    row = {"layer": 2, "role": "x", "scheme": "W8A16", "weight_error": 0.1, "method": "gptq"}
    rows = [
        made(linears=[{**row, "key": linear.key, "coverage": coverage}]).linears[0]
        for linear, coverage in zip(expert.linears(), (3.0, 3.0, 0.4), strict=True)
    ]
    section = moe(run, rows)  # type: ignore[arg-type]
    assert section.not_finite == ["layer 2, expert 5"]
    known = metrics(made(moe=section, linears=rows))
    assert known["coverage.min"].figure.value == 0.4 and known["coverage.thin_experts"].figure.value == 1


def test_probe_tokens_that_are_not_finite_fail_the_gates_on_the_probe() -> None:
    report = made(finite=Finite(tokens=0, of=9000, probe={"floor": 0, "forced": 3}))
    row = gate(report, "kl.forced_routing < 9")
    assert row.status == "fail" and "3 in 'forced'" in row.reason
    assert gate(report, "kl.mean < 9").status == "pass"


@pytest.mark.parametrize("operator", ["<", "<=", ">", ">="])
def test_what_is_no_number_meets_no_gate(operator: str) -> None:
    assert not parse_gate(f"kl.mean {operator} 1").holds(float("nan"))


# Decisions


@pytest.mark.parametrize(
    ("threshold", "below", "above"), [(0.012, "pass", "fail"), (0.0105, "undecided", "undecided"), (0.008, "fail", "pass")]
)
def test_gates_are_decided_on_the_bound(threshold: float, below: str, above: str) -> None:
    report = made()
    assert gate(report, f"kl.mean < {threshold}").status == below
    assert gate(report, f"kl.mean >= {threshold}").status == above
    assert decide(report, [parse_gate("kl.mean < 0.0105"), parse_gate("size.bytes < 1")]).verdict.status == "fail"


@pytest.mark.parametrize(("threshold", "status"), [(0.9, "pass"), (0.99, "undecided"), (1.02, "fail")])
def test_tasks_are_gated_on_their_interval(threshold: float, status: str) -> None:
    report = made(tasks=[task(fig(0.98, 0.95, 1.01))])
    assert decide(report, [parse_gate(f"tasks.gsm8k.recovery>={threshold}")]).verdict.status == status
    assert "gsm8k" in html([Run(name="x", report=decide(report))])


def test_default_gates_that_were_not_measured_are_shown() -> None:
    report = decide(made(linears=[]))
    row = next(row for row in report.gates if row.metric == "weights.error.max")
    assert row.status == "not measured" and row.measured is None and len(report.gates) == 1 + len(DEFAULT_GATES)
    assert report.verdict.status == "pass" and report.verdict.reasons[0] == "all 5 measured gates pass"
    assert report.verdict.reasons[1] == "weights.error.max < 0.3: not measured: no linear is quantized"
    run = [Run(name="x", report=report)]
    assert ">not measured</span>" in html(run) and "not measured" in markdown(run)
    suite = ElementTree.fromstring(junit([("x", report)]))[0]
    assert suite.get("skipped") == "1" and len(suite.findall("testcase/skipped")) == 1
    assert decide(made()).verdict.reasons == ["all 6 gates pass"]
    with pytest.raises(ConfigError):
        decide(made(linears=[]), [parse_gate("weights.error.max<1")])


def test_an_interval_that_is_missing_does_not_decide() -> None:
    few = made(divergence=divergence(mean=fig(0.01)), origin={"units": 3})
    row = gate(few, "kl.mean<9")
    assert row.status == "undecided" and "takes 5 documents" in row.reason and row.needed == 5
    assert row.advice.startswith("5 documents instead of 3 give one: ") and "would decide" not in row.reason
    probe = few.probe
    assert probe is not None
    probe = probe.model_copy(update={"units": 3, "excess": fig(0.01)})  # 16 windows, but of three documents
    row = gate(few.model_copy(update={"probe": probe}), "kl.excess<9")
    assert row.unit == "document" and row.advice.startswith("5 documents instead of 3 give one: ")


# How much more is needed


def test_what_would_decide_is_counted_in_what_the_interval_rests_on() -> None:
    half = fig(0.5, 0.25, 0.75)  # 4 times as many would halve its width
    text = gate(made(divergence=divergence(mean=half)), "kl.mean < 0.625")
    assert (text.needed, text.unit) == (65, "document") and "--windows" in text.advice
    assert "about 65 documents instead of 16 would decide if the value stays: a larger --windows" in text.reason
    probe = made().probe
    assert probe is not None
    probe = probe.model_copy(update={"excess": half})
    fixed = gate(made(probe=probe), "kl.excess < 0.625")
    assert (fixed.needed, fixed.unit) == (65, "probe window") and "more documents do not help" in fixed.advice
    small = made(probe=probe.model_copy(update={"windows": 6}), origin={"windows": 6, "units": 6})
    assert (
        gate(small, "kl.excess < 0.625").advice
        == "about 25 probe windows instead of 6 would decide if the value stays: --windows"
    )
    mlp = gate(made(moe=experts(half)), "mlp.output_error.max < 0.625")
    assert mlp.unit == "probe window" and "more documents do not help" in mlp.advice
    assert "no number of documents" in gate(made(), "kl.mean < 0.01").reason


def test_tasks_and_long_windows_are_not_documents() -> None:
    recovery = task(fig(0.98, 0.94, 1.02))
    how = TaskRun(
        suite=None, benchmarks=[], left_out=[], limit=100, max_new_tokens=None, chat_template=False, kernels="x",
        kv_cache="x", truncated={"baseline": 0, "quantized": 0}, harness="x", items=None, seconds=1,
    )  # fmt: skip
    row = gate(made(tasks=[recovery], task_run=how), "tasks.gsm8k.recovery < 1")
    assert (row.needed, row.unit) == (401, "item") and row.advice.endswith(": a larger --limit")
    whole = gate(made(tasks=[recovery], task_run=how.model_copy(update={"limit": None})), "tasks.gsm8k.recovery < 1")
    assert whole.advice.endswith(", but the task has no more")
    few = gate(made(tasks=[task(fig(0.98), n=7)], task_run=how), "tasks.gsm8k.recovery < 1")
    assert few.status == "undecided" and "takes 20 items" in few.reason
    context = {"length": 4096, "windows": 8, "kv_cache": "fp8", "positions": [], "needles": [], "needle_recall": None}
    context |= {"tokens": 32760, "not_finite": 0, "not_finite_layer": None}
    long = gate(made(context={**context, "last_ratio": fig(1.0, 0.98, 1.02)}), "context.perplexity_ratio < 1.01")
    assert (long.needed, long.unit) == (33, "long window") and "a longer --context" in long.advice


# Changes


def test_sums_in_another_order_are_no_regression() -> None:
    def weighs(error: float) -> Report:
        return made(linears=[{"key": "x", "layer": 0, "role": "q", "scheme": "W8A16", "weight_error": error}])

    for error, bad in ((0.1 + 1e-15, False), (0.1001, True)):
        (row,) = (c for c in against(weighs(error), weighs(0.1), "old").changes if c.metric == "weights.error.max")
        assert row.regression is bad


def test_changes_without_pairs_can_be_gated() -> None:
    old = made(size={"bytes": 400}, moe=experts(fig(0.02, 0.01, 0.03)), tasks=[task(fig(1.0, 0.99, 1.01))])
    new = made(moe=experts(fig(0.1, 0.08, 0.12)), tasks=[task(fig(0.98, 0.97, 0.99))])
    report = against(new, old, "old")
    size = gate(report, "change.size.bytes <= 50")
    assert size.status == "fail" and size.exact and "100 B, exact" in size.reason
    mlp = gate(report, "change.mlp.output_error.max < 0.2")
    assert mlp.status == "pass" and mlp.measured is not None
    assert (mlp.measured.low, mlp.measured.high) == pytest.approx((0.05, 0.11))
    recovery = gate(report, "change.tasks.gsm8k.recovery > -0.03")
    assert recovery.status == "undecided" and recovery.unit == "item"


# What is shown, and refused


def test_only_an_exact_figure_is_called_exact() -> None:
    gates = [parse_gate(text) for text in ("kl.mean < 9", "size.bytes < 600")]
    report = decide(made(divergence=divergence(mean=fig(0.01)), origin={"units": 3}), gates)
    assert [row.exact for row in report.gates] == [True, False, True]
    page, text = html([Run(name="x", report=report)]), markdown([Run(name="x", report=report)])
    assert '<td class="n">0.01 nats</td><td class="n">&lt; 9</td><td class="n">none</td>' in page
    assert '<td class="n">500 B</td><td class="n">&lt; 600</td><td class="n">exact</td>' in page
    assert "| 0.01 nats | none | undecided |" in text and "| 500 B | exact | pass |" in text


def test_several_texts_are_said_in_both_formats() -> None:
    one, other = (Run(name=d, report=decide(made(origin={"text_digest": d}))) for d in "de")
    assert all("different texts" in page for page in (html([one, other]), markdown([one, other])))
    assert "different texts" not in markdown([one, one])


@pytest.mark.parametrize(
    ("text", "said", "fix"),
    [
        ("tasks.gsm8k.mcnemar_p >= 0.05", "the more easily the fewer items", "tasks.gsm8k.recovery"),
        ("tasks.gsm8k.recovery >= 0.9", "the baseline got no item of gsm8k right", "--limit"),
    ],
)
def test_gates_that_mean_nothing_are_refused(text: str, said: str, fix: str) -> None:
    nothing = task(fig(1)).model_copy(update={"recovery": None, "baseline": 0.0})
    with pytest.raises(ConfigError) as error:
        decide(made(tasks=[nothing]), [parse_gate(text)])
    assert said in str(error.value) and fix in error.value.fix
