"""The metrics of a report by name: what gates, comparisons and plots speak of. docs/report.md lists them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from quantkit.evals.schema import Figure, Report

__all__ = ["Metric", "metrics", "worst_expert", "worst_weight"]


@dataclass(frozen=True)
class Metric:
    """A figure; exact: it is no sample's, so it needs no interval. where: what in the model it speaks of. quality: it says
    how good the model is, so that it means nothing when logits are not finite."""

    figure: Figure
    exact: bool = False
    where: str = ""
    quality: bool = True


def metrics(report: Report) -> dict[str, Metric]:
    """All that this report can be judged by. What was not measured is not there."""
    sampled: dict[str, Figure | None] = {}
    if (found := report.divergence) is not None:
        sampled |= {f"kl.{key}": figure for key, figure in found.kl.items()}
        sampled |= {f"perplexity.{key}": figure for key, figure in found.perplexity.items()}
        sampled |= {"top1_agreement": found.top1_agreement, "router_agreement": found.router_agreement}
        sampled |= {"flips.right_to_wrong": found.right_to_wrong, "flips.wrong_to_right": found.wrong_to_right}
    if report.probe:
        sampled |= {"kl.floor": report.probe.floor, "kl.excess": report.probe.excess}
        sampled |= {"kl.forced_routing": report.probe.forced_routing, "kl.routing_term": report.probe.routing_term}
    if report.kv:
        sampled |= {"kv_cache.added_kl": report.kv.added}
    if report.context:
        sampled |= {"context.perplexity_ratio": report.context.last_ratio}
        sampled |= {"context.needle_recall": report.context.needle_recall}
    sampled |= {f"change.{change.metric}": change.difference for change in report.changes}
    found_metrics = {name: Metric(figure) for name, figure in sampled.items() if figure is not None}
    return {**found_metrics, **_tasks(report), **_inside(report), **_counts(report)}


def _tasks(report: Report) -> dict[str, Metric]:
    found = {}
    for task in report.tasks:
        if task.recovery is not None:
            low, high = task.ci95 or (None, None)
            found[f"tasks.{task.name}.recovery"] = Metric(Figure(value=task.recovery, low=low, high=high))
        if task.mcnemar_p is not None:
            found[f"tasks.{task.name}.mcnemar_p"] = Metric(Figure(value=task.mcnemar_p), exact=True)
    return found


def worst_expert(report: Report) -> tuple[str, Figure] | None:
    """The MLP (routed expert, shared expert or dense) whose output is most in error, and by how much."""
    named = [(f"layer {layer}, MLP", figure) for layer, figure in report.moe.dense.items()]
    for row in report.moe.layers:
        named += [(f"layer {row.layer}, expert {i}", f) for i, f in enumerate(row.output_error) if f is not None]
        if row.shared_output_error is not None:
            named.append((f"layer {row.layer}, shared expert", row.shared_output_error))
    return max(named, key=lambda pair: pair[1].value) if named else None


def worst_weight(report: Report) -> tuple[str, float] | None:
    """The linear whose weights lie furthest from the baseline's, and ||W - Q|| / ||W||."""
    named = [(row.key, row.weight_error) for row in report.linears if row.weight_error is not None]
    return max(named, key=lambda pair: pair[1]) if named else None


def _largest(figures: Iterable[Figure]) -> Figure:
    """The maximum: it lies between the largest lower and the largest upper bound."""
    figures = list(figures)
    lows, highs = [f.low for f in figures if f.low is not None], [f.high for f in figures if f.high is not None]
    known = len(lows) == len(figures)
    return Figure(value=max(f.value for f in figures), low=max(lows) if known else None, high=max(highs) if known else None)


def _inside(report: Report) -> dict[str, Metric]:
    found = {}
    outputs = [f for row in report.moe.layers for f in (*row.output_error, row.shared_output_error) if f is not None]
    outputs += report.moe.dense.values()
    if worst := worst_expert(report):
        usual = median(f.value for f in outputs)
        found["mlp.output_error.max"] = Metric(_largest(outputs), where=f"{worst[0]}; the median of all is {usual:.3g}")
    if heaviest := worst_weight(report):
        usual = median(row.weight_error for row in report.linears if row.weight_error is not None)
        where = f"{heaviest[0]}; the median of all is {usual:.3g}"
        found["weights.error.max"] = Metric(Figure(value=heaviest[1]), exact=True, where=where)
    return found


def _counts(report: Report) -> dict[str, Metric]:
    def exact(value: float, where: str = "") -> Metric:
        return Metric(Figure(value=value), exact=True, where=where, quality=False)

    size, calibrated = report.size, [row for row in report.linears if row.method]
    found = {
        "not_finite.tokens": exact(report.finite.tokens, _broken_where(report)),
        "size.bytes": exact(size.bytes),
        "size.bits_per_weight": exact(size.bits_per_weight),
        "size.reduction": exact(size.baseline_bytes / size.bytes),
    }
    if calibrated:
        found["fallbacks.count"] = exact(sum(bool(row.fallback) for row in calibrated))
        found["fallbacks.share"] = exact(sum(bool(row.fallback) for row in calibrated) / len(calibrated))
    coverage = [value for layer in report.moe.layers for value in layer.coverage if value is not None]
    if coverage:
        found["coverage.min"] = exact(min(coverage))
        found["coverage.thin_experts"] = exact(sum(value < 1 for value in coverage))
    return found


def _broken_where(report: Report) -> str:
    if not report.finite.tokens:
        return ""
    if report.finite.layer is not None:
        return f"begins in layer {report.finite.layer}"
    return "the head" if report.finite.head else "only in a variant that the probe runs"
