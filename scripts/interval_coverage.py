"""How often 95 % intervals hold the truth: `python -m scripts.interval_coverage` prints docs/report.md's table.

Sets of n documents are drawn from known distributions; of each the interval is taken by stretched percentiles and by
stretched BCa percentiles (quantkit/report/intervals.py). A cell: share of sets that the interval holds the truth in, and of
those in which the truth lies above it, which is what a gate `metric < number` rests on; 2.5 % would be right.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from quantkit.report.intervals import Floats, Resampler, bca_interval, percentile_interval

UNITS = (8, 16, 32, 64, 200)
Generator = np.random.Generator
Rows = Callable[[Resampler, Generator], Floats]


def mean(draw: Callable[[Generator, int], Floats]) -> Rows:
    """The mean over documents of equal length."""
    return lambda sample, rng: sample.means(draw(rng, sample.units))


def ratio(sample: Resampler, rng: Generator) -> Floats:
    """Sums over sums, of documents that differ in weight: the output error of an expert."""
    weight = rng.lognormal(0, 0.5, sample.units)
    return np.asarray((sample.drawn @ (weight * rng.lognormal(0, 1, sample.units))) / (sample.drawn @ weight))


def quantile(share: float, tokens: int) -> Rows:
    """Over tokens that resemble their document's others: half of the variance of their logarithm is the document's."""

    def rows(sample: Resampler, rng: Generator) -> Floats:
        values = np.exp(rng.normal(0, 0.7, (sample.units, 1)) + rng.normal(0, 0.7, (sample.units, tokens))).ravel()
        order, owner = np.argsort(values), np.repeat(np.arange(sample.units), tokens)
        totals = (np.cumsum(counts[owner[order]]) for counts in sample.drawn)
        return np.array([values[order[np.searchsorted(total, share * total[-1])]] for total in totals])

    return rows


def quantile_of_the_law(share: float) -> float:
    return math.exp(NormalDist().inv_cdf(share) * math.sqrt(2 * 0.7**2))


CASES: dict[str, tuple[Rows, float, int]] = {
    "mean, normal": (mean(lambda rng, n: rng.standard_normal(n)), 0.0, 2000),
    "mean, exponential": (mean(lambda rng, n: rng.exponential(size=n)), 1.0, 2000),
    "mean, lognormal, sigma 1": (mean(lambda rng, n: rng.lognormal(0, 1, n)), math.exp(0.5), 2000),
    "mean, lognormal, sigma 1.5": (mean(lambda rng, n: rng.lognormal(0, 1.5, n)), math.exp(1.125), 2000),
    "ratio, lognormal, sigma 1": (ratio, math.exp(0.5), 2000),
    "p90, 20 tokens each": (quantile(0.9, 20), quantile_of_the_law(0.9), 400),
    "p99, 128 tokens each": (quantile(0.99, 128), quantile_of_the_law(0.99), 200),
}


def covered(rows: Rows, truth: float, units: int, sets: int) -> list[str]:
    """Of both intervals `held %, above %`."""
    rng, sample = np.random.default_rng(1), Resampler(np.arange(units), resamples=1000)
    held, above = np.zeros(2), np.zeros(2)
    for _ in range(sets):
        point, left_out, resampled = np.split(rows(sample, rng), (1, 1 + sample.blocks))
        value = float(point[0])
        found = [percentile_interval(value, resampled, units), bca_interval(value, resampled, left_out, units)]
        held += [low <= truth <= high for low, high in found]
        above += [high < truth for _, high in found]
    return [f"{h / sets:.1%}, {a / sets:.1%}".replace("%", " %") for h, a in zip(held, above, strict=True)]


def main() -> None:
    head = ["documents", *(f"{n}" for n in UNITS)]
    print("| " + " | ".join([*head[:1], "interval", *head[1:]]) + " |")
    print("|---" * (len(head) + 1) + "|")
    for name, (rows, truth, sets) in CASES.items():
        cells = [covered(rows, truth, units, sets) for units in UNITS]
        for which, kind in enumerate(("percentiles", "BCa")):
            print("| " + " | ".join([name, kind, *(cell[which] for cell in cells)]) + " |", flush=True)


if __name__ == "__main__":
    main()
