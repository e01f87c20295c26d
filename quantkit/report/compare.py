"""Two reports of one model beside each other: what became better, what became worse, and how sure that is."""

from __future__ import annotations

import math

import numpy as np

from quantkit.errors import ConfigError
from quantkit.report.intervals import Interval, Resampler, figure
from quantkit.report.metrics import metrics
from quantkit.report.names import METRICS, of_task
from quantkit.report.schema import Change, Figure, Provenance, Report, UnitSums

__all__ = ["against", "differences"]

# Which way is worse: 1 when more of it is.
_PAIRED = {name: row.worse for name, row in METRICS.items() if row.worse and row.paired}
_UNPAIRED = {name: row.worse for name, row in METRICS.items() if row.worse and not row.paired}
_EXACT = 1e-9  # sums in another order differ by less
_SAME = 1e-3  # of a document's likelihood under the baseline: kernels and hardware differ by less, two models by more


def differences(report: Report, other: Report) -> list[tuple[str, str, str]]:
    """Why figures of the two cannot stand beside each other: (what, of this one, of the other); empty when they can."""
    ours, theirs = report.provenance, other.provenance
    checks = [
        ("metric version", str(report.metrics_version), str(other.metrics_version)),
        ("evaluation text", *_texts(ours, theirs)),
        (
            "model",
            f"{ours.architecture}, {ours.parameters:,} parameters",
            f"{theirs.architecture}, {theirs.parameters:,} parameters",
        ),
        ("KV cache (--kv-cache)", ours.kv_cache or "not rounded", theirs.kv_cache or "not rounded"),
    ]
    differing = [check for check in checks if check[1] != check[2]]
    return differing or _baselines(report, other)


def _texts(*origins: Provenance) -> tuple[str, str]:
    """What the two were evaluated on, in words: equal when the digests are; with these where the words are the same."""
    ours, theirs = (f"{x.text}, {x.windows} windows of {x.seq_len} tokens" for x in origins)
    digests = [x.text_digest for x in origins]
    if digests[0] == digests[1]:
        return ours, ours
    return (ours, theirs) if ours != theirs else (f"{ours} ({digests[0][:12]})", f"{theirs} ({digests[1][:12]})")


def _baselines(report: Report, other: Report) -> list[tuple[str, str, str]]:
    """Whether both were compared with the same baseline, told by what it thinks of each document: files may be stored in
    another way, and two fine-tunes of one model have the same sizes."""
    sides = [{row.unit: row for row in r.divergence.by_unit} if r.divergence else {} for r in (report, other)]
    for unit in sorted(sides[0].keys() & sides[1].keys()):
        ours, theirs = (side[unit] for side in sides)
        near = math.isclose(ours.nll_baseline, theirs.nll_baseline, rel_tol=_SAME, abs_tol=_SAME / 10 * ours.tokens)
        if ours.tokens == theirs.tokens and not near:
            where = f"nats for {report.provenance.unit} {unit}"
            current, before = (
                f"{r.provenance.baseline}, {row.nll_baseline:.5g} {where}" for r, row in ((report, ours), (other, theirs))
            )
            return [("baseline", current, before)]
    return []


def against(report: Report, previous: Report, name: str) -> Report:
    """`report` with its changes since `previous`, paired over the documents that both scored. Raises ConfigError when the
    two cannot be compared: see `differences`."""
    for what, current, before in differences(report, previous):
        problem = f"{name} cannot be compared: its {what} is {before}, this report's is {current}"
        raise ConfigError(
            problem, "evaluate both with the same baseline, --text, --seq-len, --windows, --kv-cache and quantkit"
        )
    notes = [*report.notes]
    if report.provenance.hardware != previous.provenance.hardware:
        notes.append(f"{name} was measured on other hardware")
    paired = _paired(report, previous)
    if paired is None:
        notes.append(f"{name} is not compared token by token: logits that are not finite were left out of one of the two")
    rest, unlike = _unpaired(report, previous)
    notes += [f"{name} is not compared by {what}" for what in unlike]
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
    changes = []
    for metric, sign in _PAIRED.items():
        if metric == "router_agreement" and not (new.router_agreement and old.router_agreement):
            continue
        sums = [np.array([_sum(metric, side[u]) for u in units]) for side in sides]
        means, resampled = [s.sum() / sizes.sum() for s in sums], [(drawn @ s) / below for s in sums]
        if metric == "perplexity.ratio":
            means, resampled = [float(np.exp(m)) for m in means], [np.exp(np.minimum(r, 700)) for r in resampled]
        current, before = (figure(float(m), sample.interval(r)) for m, r in zip(means, resampled, strict=True))
        changes.append(_change(metric, sign, before, current, sample.interval(resampled[0] - resampled[1])))
    return changes


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


def _unpaired(report: Report, previous: Report) -> tuple[list[Change], list[str]]:
    """Figures of which no pairs are kept: a regression is said where the two intervals do not touch, or where both are
    exact and one is worse. Also what both have but cannot be compared, and why."""
    new, old = metrics(report), metrics(previous)
    unlike = _unlike(report, previous)
    tasks = dict.fromkeys((name for task in report.tasks if (name := of_task(task.name)) in new), -1)
    changes = []
    for name, worse in {**_UNPAIRED, **tasks}.items():
        if name not in new or name not in old or any(name.startswith(f"{group}.") for group in unlike):
            continue
        current, before = new[name].figure, old[name].figure
        low, high = (current, before) if worse > 0 else (before, current)
        if low.low is not None and high.high is not None:
            bad = low.low > high.high
        else:
            same = math.isclose(low.value, high.value, rel_tol=_EXACT)
            bad = new[name].exact and low.value > high.value and not same
        difference = _apart(before, current)
        changes.append(Change(metric=name, previous=before, current=current, difference=difference, regression=bad))
    return changes, [f"{group}: {why}" for group, why in unlike.items()]


def _unlike(report: Report, previous: Report) -> dict[str, str]:
    """Of tasks and long windows, by the beginning of their metrics' names: what was measured in another way."""
    setups = [_how(r) for r in (report, previous)]
    reasons = {}
    for group in setups[0].keys() & setups[1].keys():
        ours, theirs = (side[group] for side in setups)
        if differing := [f"{key} {theirs.get(key)}, now {ours[key]}" for key in ours if ours[key] != theirs.get(key)]:
            reasons[group] = "; ".join(differing)
    return dict(sorted(reasons.items()))


def _how(report: Report) -> dict[str, dict[str, object]]:
    setups: dict[str, dict[str, object]] = {}
    if report.context:
        setups["context"] = {"length": report.context.length, "windows": report.context.windows}
    sources = {row.name: row for row in report.task_run.benchmarks} if report.task_run else {}
    for task in report.tasks:
        how: dict[str, object] = {"metric": task.metric, "n": task.n}
        if report.task_run and (source := sources.get(task.name)):
            how |= {"task": source.task, "shots": source.shots, "filter": source.filter, "limit": report.task_run.limit}
            how |= {"chat template": report.task_run.chat_template, "max new tokens": report.task_run.max_new_tokens}
        setups[f"tasks.{task.name}"] = how
    return setups


def _apart(before: Figure, current: Figure) -> Figure:
    """The difference, with the widest interval that the two allow; without one where either has none."""
    difference = current.value - before.value
    if before.low is None or before.high is None or current.low is None or current.high is None:
        return Figure(value=difference)
    return Figure(value=difference, low=current.low - before.high, high=current.high - before.low)
