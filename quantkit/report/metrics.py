"""The metrics of a report by name: what gates, comparisons and plots speak of. docs/report.md lists them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from quantkit.report.intervals import QUANTILES, Resampler, tail_needs
from quantkit.report.names import of_task
from quantkit.report.schema import Context, Figure, Report, Task
from quantkit.report.task_stats import LEAST_ITEMS

__all__ = ["Metric", "Sample", "broken_where", "metrics", "mlp_name", "worst_expert", "worst_weight"]

_PROBE_MOST = 31  # of 32 windows and more, about 16 are probed (measure/run.py)


@dataclass(frozen=True)
class Sample:
    """What a figure's interval rests on: count of `unit`s, of which it takes `least`. option: what of `quantkit eval` raises
    the count; most: how far (None: as far as there is text); bounded: what to say beyond that."""

    count: int
    unit: str
    option: str = ""
    least: int = Resampler.LEAST_UNITS
    most: int | None = None
    bounded: str = ""


@dataclass(frozen=True)
class Metric:
    """A figure; sample: what its interval rests on, None where it is exact (no sample's, so it needs no interval). where:
    what in the model it speaks of. quality: it says how good the model is: nothing, when logits are not finite."""

    figure: Figure
    sample: Sample | None
    where: str = ""
    quality: bool = True

    @property
    def exact(self) -> bool:
        return self.sample is None


def metrics(report: Report) -> dict[str, Metric]:
    """All that this report can be judged by. What was not measured is not there."""
    text, probe = _documents(report), _probe(report)
    figures: dict[str, tuple[Figure | None, Sample]] = {}
    if (over := report.divergence) is not None:
        figures |= {f"kl.{key}": (figure, _of_kl(key, figure, text, report)) for key, figure in over.kl.items()}
        figures |= {f"perplexity.{key}": (figure, text) for key, figure in over.perplexity.items()}
        figures |= {"top1_agreement": (over.top1_agreement, text), "router_agreement": (over.router_agreement, text)}
        figures |= {"flips.right_to_wrong": (over.right_to_wrong, text), "flips.wrong_to_right": (over.wrong_to_right, text)}
    if report.probe:
        figures |= {"kl.floor": (report.probe.floor, probe), "kl.excess": (report.probe.excess, probe)}
        figures |= {"kl.forced_routing": (report.probe.forced_routing, probe)}
        figures |= {"kl.routing_term": (report.probe.routing_term, probe)}
    if report.kv:
        figures |= {"kv_cache.added_kl": (report.kv.added, probe)}
    if report.context:
        figures |= {"context.perplexity_ratio": (report.context.last_ratio, _long_windows(report.context.windows))}
        figures |= {"context.needle_recall": (report.context.needle_recall, _needles(report.context))}
    sampled = {name: Metric(figure, sample) for name, (figure, sample) in figures.items() if figure is not None}
    named = {**sampled, **_tasks(report), **_inside(report), **_counts(report)}
    return named | {f"change.{c.metric}": replace(named[c.metric], figure=c.difference, where="") for c in report.changes}


def _documents(report: Report) -> Sample:
    unit = report.provenance.unit
    return Sample(report.provenance.units, unit, f"a larger --windows, and a --text with as many {unit}s")


def _probe(report: Report) -> Sample:
    windows = report.probe.windows if report.probe else 0
    if report.probe and report.probe.units is not None and report.probe.units < Resampler.LEAST_UNITS:
        return replace(_documents(report), count=report.probe.units)
    most = max(windows, _PROBE_MOST if report.provenance.windows <= _PROBE_MOST else 0)
    bounded = "eval probes about 16 windows however many it reads, so more documents do not help"
    return Sample(windows, "probe window", "--windows", most=most, bounded=f"{bounded}; a longer --seq-len fills each more")


def _long_windows(count: int) -> Sample:
    bounded = f"eval reads {count} of them whatever --windows says, so more documents do not help"
    bounded += "; a longer --context fills each more"
    return Sample(count, "long window", most=count, bounded=bounded)


def _needles(context: Context) -> Sample:
    count = sum(needle.n for needle in context.needles)
    bounded = f"eval plants {count} of them whatever --windows says"
    return Sample(count, "needle", least=1, most=count, bounded=bounded)


def _of_kl(key: str, figure: Figure, text: Sample, report: Report) -> Sample:
    """A quantile has no interval either where too few tokens lie beyond it."""
    if key not in QUANTILES or figure.low is not None or text.count < text.least:
        return text
    return Sample(report.provenance.tokens, "token", "a larger --windows", least=tail_needs(QUANTILES[key]))


def _items(report: Report, task: Task) -> Sample:
    limit = report.task_run.limit if report.task_run else None
    all_run = report.task_run is not None and (limit is None or task.n < limit)
    most, bounded = (task.n, "the task has no more") if all_run else (None, "")
    return Sample(task.n, "item", "a larger --limit", LEAST_ITEMS, most, bounded)


def _tasks(report: Report) -> dict[str, Metric]:
    """Recovery alone: a gate on McNemar's p would pass the more easily the fewer items were run."""
    recoveries = {}
    for task in report.tasks:
        if task.recovery is not None:
            low, high = task.ci95 or (None, None)
            figure = Figure(value=task.recovery, low=low, high=high)
            recoveries[of_task(task.name)] = Metric(figure, _items(report, task))
    return recoveries


def mlp_name(layer: int, which: int | str = "") -> str:
    """which: number of the routed expert, `shared`, or empty for the MLP of a dense layer."""
    return f"layer {layer}, {f'expert {which}' if isinstance(which, int) else f'{which} expert' if which else 'MLP'}"


def _mlps(report: Report) -> list[tuple[str, Figure | None]]:
    """All MLPs and the error of their output; None where no probed token reached one."""
    named: list[tuple[str, Figure | None]] = [(mlp_name(layer), figure) for layer, figure in report.moe.dense.items()]
    for row in report.moe.layers:
        named += [(mlp_name(row.layer, i), f) for i, f in enumerate(row.output_error)]
        if row.shared_output_error is not None:
            named.append((mlp_name(row.layer, "shared"), row.shared_output_error))
    return named


def worst_expert(report: Report) -> tuple[str, Figure] | None:
    """The MLP (routed expert, shared expert or dense) whose output is most in error, and by how much: of those with an
    interval, where there are such. None where an output is not finite: that is worse than any."""
    measured = [(name, f) for name, f in _mlps(report) if f is not None and not report.moe.not_finite]
    sure = [(name, f) for name, f in measured if f.low is not None]
    return max(sure or measured, key=lambda pair: pair[1].value, default=None)


def worst_weight(report: Report) -> tuple[str, float] | None:
    """The linear whose weights lie furthest from the baseline's, and ||W - Q|| / ||W||."""
    named = [(row.key, row.weight_error) for row in report.linears if row.weight_error is not None]
    return max(named, key=lambda pair: pair[1]) if named else None


def _largest(figures: Sequence[Figure]) -> Figure:
    """The maximum: it lies between the largest lower and the largest upper bound, of those that have bounds if any has."""
    lows, highs = [f.low for f in figures if f.low is not None], [f.high for f in figures if f.high is not None]
    sure = [f for f in figures if f.low is not None] or figures
    return Figure(value=max(f.value for f in sure), low=max(lows, default=None), high=max(highs, default=None))


def _left_out(report: Report, worst: Figure) -> str:
    """How many MLPs the largest error says nothing about, and whether one of them looks worse."""
    named = _mlps(report)
    unsure = [(name, f) for name, f in named if f is None or f.low is None]
    if worst.low is None or not unsure:
        return ""
    few = f"fewer than {Resampler.LEAST_UNITS} {report.provenance.unit}s"
    note = f"; left out are {len(unsure)} of {len(named)} MLPs, read on {few}"
    name, top = max(((name, f) for name, f in unsure if f is not None), key=lambda pair: pair[1].value, default=("", worst))
    return f"{note}, with up to {top.value:.3g} in {name}" if top.value > worst.value else note


def _inside(report: Report) -> dict[str, Metric]:
    maxima = {}
    if worst := worst_expert(report):
        outputs = [f for _, f in _mlps(report) if f is not None]
        usual = f"{worst[0]}; the median of all is {median(f.value for f in outputs):.3g}"
        where = usual + _left_out(report, worst[1])
        maxima["mlp.output_error.max"] = Metric(_largest(outputs), _probe(report), where)
    if heaviest := worst_weight(report):
        middle = median(row.weight_error for row in report.linears if row.weight_error is not None)
        where = f"{heaviest[0]}; the median of all is {middle:.3g}"
        maxima["weights.error.max"] = Metric(Figure(value=heaviest[1]), None, where)
    return maxima


def _counts(report: Report) -> dict[str, Metric]:
    def exact(value: float, where: str = "") -> Metric:
        return Metric(Figure(value=value), None, where, quality=False)

    size, calibrated = report.size, [row for row in report.linears if row.method]
    counts = {
        "not_finite.tokens": exact(report.finite.tokens, broken_where(report)),
        "size.bytes": exact(size.bytes),
        "size.bits_per_weight": exact(size.bits_per_weight),
        "size.reduction": exact(size.baseline_bytes / size.bytes),
    }
    if calibrated:
        counts["fallbacks.count"] = exact(sum(bool(row.fallback) for row in calibrated))
        counts["fallbacks.share"] = exact(sum(bool(row.fallback) for row in calibrated) / len(calibrated))
    coverage = [value for layer in report.moe.layers for value in layer.coverage if value is not None]
    if coverage:
        counts["coverage.min"] = exact(min(coverage))
        counts["coverage.thin_experts"] = exact(sum(value < 1 for value in coverage))
    return counts


def broken_where(report: Report) -> str:
    if not report.finite.tokens:
        return ""
    if report.finite.layer is not None:
        return f"begins in layer {report.finite.layer}"
    if report.finite.head:
        return "the head"
    if places := [place for place, count in report.finite.elsewhere.items() if count]:
        return f"in {' and '.join(places)}"
    return "only in a variant that the probe runs"
