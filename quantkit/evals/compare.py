"""Two reports of one model beside each other: what became better, what became worse, and how sure that is."""

from __future__ import annotations

import numpy as np

from quantkit.errors import ConfigError
from quantkit.evals.context import figure
from quantkit.evals.divergence import Interval, Resampler
from quantkit.evals.metrics import metrics
from quantkit.evals.schema import Change, Figure, Report, UnitSums

__all__ = ["against"]

# Which way is worse: +1 when more of it is.
_WORSE = {"kl.mean": 1, "perplexity.ratio": 1, "top1_agreement": -1, "router_agreement": -1}
_UNPAIRED = {"kl.p99": 1, "kl.p999": 1, "mlp.output_error.max": 1, "size.bytes": 1}


def against(report: Report, previous: Report, name: str) -> Report:
    """`report` with its changes since `previous`, paired over the documents that both scored. Raises ConfigError when the
    two cannot be compared: other text, other metrics, another model."""
    new, old = report.provenance, previous.provenance
    checks = (
        ("metric version", report.metrics_version, previous.metrics_version),
        ("evaluation text", new.text_digest, old.text_digest),
        (
            "model",
            f"{new.architecture}, {new.parameters:,} parameters",
            f"{old.architecture}, {old.parameters:,} parameters",
        ),
    )
    for what, current, before in checks:
        if current != before:
            seen = f"{name} cannot be compared: its {what} is {before}, this report's is {current}"
            raise ConfigError(seen, "evaluate both with the same model, --text, --seq-len, --windows and quantkit")
    notes = [*report.notes]
    if new.hardware != old.hardware:
        notes.append(f"{name} was measured on other hardware")
    paired = _paired(report, previous)
    if paired is None:
        notes.append(f"{name} is not compared token by token: logits that are not finite were left out of one of the two")
    rest = _unpaired(report, previous)
    return report.model_copy(update={"previous": name, "changes": [*(paired or []), *rest], "notes": notes})


def _paired(report: Report, previous: Report) -> list[Change] | None:
    """Differences of means over tokens, documents resampled jointly; None when the tokens are not the same."""
    new, old = report.divergence, previous.divergence
    if new is None or old is None:
        return None
    sides = [{row.unit: row for row in side.by_unit} for side in (new, old)]
    if {u: r.tokens for u, r in sides[0].items()} != {u: r.tokens for u, r in sides[1].items()}:
        return None
    units = sorted(sides[0])
    sizes = np.array([sides[0][u].tokens for u in units], dtype=np.float64)
    sample = Resampler(np.arange(len(units)))
    drawn = sample.drawn
    below = drawn @ sizes
    found = []
    for metric, sign in _WORSE.items():
        if metric == "router_agreement" and not (new.router_agreement and old.router_agreement):
            continue
        sums = [np.array([_sum(metric, side[u]) for u in units]) for side in sides]
        means, resampled = [s.sum() / sizes.sum() for s in sums], [(drawn @ s) / below for s in sums]
        if metric == "perplexity.ratio":
            means, resampled = [float(np.exp(m)) for m in means], [np.exp(np.minimum(r, 700)) for r in resampled]
        current, before = (figure(float(m), sample.interval(r)) for m, r in zip(means, resampled, strict=True))
        found.append(_change(metric, sign, before, current, sample.interval(resampled[0] - resampled[1])))
    return found


def _sum(metric: str, row: UnitSums) -> float:
    return {
        "kl.mean": row.kl,
        "perplexity.ratio": row.nll_quantized - row.nll_baseline,
        "top1_agreement": row.same_top1,
        "router_agreement": row.same_router,
    }[metric]


def _change(metric: str, worse: int, before: Figure, current: Figure, interval: Interval | None) -> Change:
    difference = figure(current.value - before.value, interval)
    bad = (interval[0] if worse > 0 else -interval[1]) > 0 if interval else False
    return Change(metric=metric, previous=before, current=current, difference=difference, regression=bad)


def _unpaired(report: Report, previous: Report) -> list[Change]:
    """Figures of which no pairs are kept: a regression is said where the two intervals do not touch, or where both are
    exact and one is worse."""
    new, old = metrics(report), metrics(previous)
    tasks = dict.fromkeys((n for n in new if n.startswith("tasks.") and n.endswith(".recovery")), -1)
    found = []
    for name, worse in {**_UNPAIRED, **tasks}.items():
        if name not in new or name not in old:
            continue
        current, before = new[name].figure, old[name].figure
        low, high = (current, before) if worse > 0 else (before, current)
        if low.low is not None and high.high is not None:
            bad = low.low > high.high
        else:
            bad = new[name].exact and low.value > high.value
        difference = _apart(before, current)
        found.append(Change(metric=name, previous=before, current=current, difference=difference, regression=bad))
    return found


def _apart(before: Figure, current: Figure) -> Figure:
    """The difference, with the widest interval that the two allow; without one where either has none."""
    difference = current.value - before.value
    if before.low is None or before.high is None or current.low is None or current.high is None:
        return Figure(value=difference)
    return Figure(value=difference, low=current.low - before.high, high=current.high - before.low)
