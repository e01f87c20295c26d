"""How sure one can be of an average: Wilson's and bootstrap intervals over units (documents) that are drawn anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from quantkit.report.schema import Figure

__all__ = [
    *("QUANTILES", "Z", "Floats", "Integers", "Interval", "Resampler", "at_least_wilson", "bca_interval", "figure"),
    *("percentile_interval", "student", "tail_needs", "wilson"),
]

# Tokens that must lie beyond a quantile for it to have an interval. A resample holds no value above the sample's largest, so
# with few the upper bound is too low too often.
_TAIL_TOKENS = 20


_NORMAL = NormalDist()
Z = _NORMAL.inv_cdf(0.975)


Floats = NDArray[np.float64]


Integers = NDArray[np.int64]


Interval = tuple[float, float]


def tail_needs(quantile: float) -> int:
    """Tokens of which `_TAIL_TOKENS` lie beyond the quantile."""
    return round(_TAIL_TOKENS / (1 - quantile))


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, from the normal one (Abramowitz and Stegun 1964, 26.7.5): 0.03 % low at 4
    degrees of freedom, closer beyond."""
    x = Z
    terms = (
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return x + math.fsum(term / freedom**i for i, term in enumerate(terms, 1))


def percentile_interval(point: float, resampled: Floats, units: int) -> Interval:
    """95 % from a bootstrap over n units, of a figure with little skew (a ratio of scores between 0 and 1): the percentiles
    of what was resampled, stretched."""
    return _stretched(point, np.quantile(resampled, (0.025, 0.975)), units)


def bca_interval(point: float, resampled: Floats, left_out: Floats, units: int) -> Interval:
    """95 % from a bootstrap over n units by bias-corrected and accelerated percentiles (Efron 1987, Journal of the American
    Statistical Association 82, 171-185), stretched. left_out: the figure without each of the units, or of as many blocks of
    them: how unevenly these pull at it says how its spread changes with its value."""
    below = float((resampled < point).mean() + (resampled == point).mean() / 2)
    least = 0.5 / len(resampled)
    bias, pull = _NORMAL.inv_cdf(min(max(below, least), 1 - least)), left_out.mean() - left_out
    pull = pull / (np.abs(pull).max() or 1.0)  # its cubes stay finite
    squares = float((pull**2).sum())
    acceleration = float((pull**3).sum()) / (6 * squares**1.5) if squares else 0.0
    levels = [_NORMAL.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in (-Z, Z)]
    return _stretched(point, np.quantile(resampled, levels), units)


def _stretched(point: float, percentiles: Floats, units: int) -> Interval:
    """Percentiles of a resampled mean spread by sqrt((n - 1) / n) too little and know nothing of Student's t (Hesterberg
    2015, The American Statistician 69, 371-386), for both of which this makes up."""
    wider = math.sqrt(units / (units - 1)) * student(units - 1) / Z
    low, high = percentiles
    return float(point - wider * (point - low)), float(point + wider * (high - point))


def wilson(hits: float, trials: int, z: float = Z) -> Interval:
    """The score interval of a share (Wilson 1927, Journal of the American Statistical Association 22, 209-212)."""
    centre = hits + z * z / 2
    spread = z * math.sqrt(max(0.0, hits * (1 - hits / trials)) + z * z / 4)
    return max(0.0, centre - spread) / (trials + z * z), min(1.0, (centre + spread) / (trials + z * z))


def at_least_wilson(interval: Interval | None, values: Floats) -> Interval | None:
    """The interval of a share, no narrower than were its tokens (0..1 each) independent: where no token flipped, no resample
    has a flip either, and the bootstrap alone would be sure of none."""
    if interval is None:
        return None
    low, high = wilson(float(values.sum()), len(values))
    return max(0.0, min(low, interval[0])), min(1.0, max(high, interval[1]))


class Resampler:
    """The paired bootstrap: units (documents) are drawn whole, with replacement, and jointly for every figure.

    Tokens of one document are not independent, so resampling tokens would promise too much. Fewer than `LEAST_UNITS`
    units give no interval: their spread says nothing. `drawn` [rows, units] says how often each unit stands in a row: first
    once each, which is the sample; then without each of its blocks (the units, or `BLOCKS` of them); then as drawn.
    """

    LEAST_UNITS = 5
    BLOCKS = 200

    def __init__(self, unit: Integers, resamples: int = 2000, seed: int = 0) -> None:
        units, self.member = np.unique(unit, return_inverse=True)
        self.units = len(units)
        self.blocks = min(self.units, self.BLOCKS) if self.units >= self.LEAST_UNITS else 0
        block = np.arange(self.units) * self.blocks // self.units
        left_out = block != np.arange(self.blocks)[:, None]
        draw = np.random.default_rng(seed).multinomial
        drawn = draw(self.units, np.full(self.units, 1 / self.units), size=resamples)
        self.drawn = np.concatenate([np.ones((1, self.units), dtype=drawn.dtype), left_out.astype(drawn.dtype), drawn])

    def sums(self, values: Floats) -> Floats:
        return np.asarray(np.bincount(self.member, weights=values, minlength=self.units), dtype=np.float64)

    def means(self, values: Floats) -> Floats:
        """[rows]: the mean over tokens in each row."""
        sizes = np.bincount(self.member, minlength=self.units)
        return np.asarray((self.drawn @ self.sums(values)) / (self.drawn @ sizes))

    def quantiles(self, values: Floats, shares: Sequence[float]) -> list[Floats]:
        """[rows] for each: the value at which the row's tokens' cumulative count passes that share."""
        order = np.argsort(values)
        members, quantiles = self.member[order], np.empty((len(shares), len(self.drawn)))
        for i, counts in enumerate(self.drawn):
            cumulative = np.cumsum(counts[members])
            quantiles[:, i] = values[order[np.searchsorted(cumulative, np.array(shares) * cumulative[-1])]]
        return list(quantiles)

    def interval(self, figure: Floats) -> Interval | None:
        """Of a figure in each row [rows], about its first, the sample's."""
        if self.units < self.LEAST_UNITS:
            return None
        left_out, resampled = figure[1 : 1 + self.blocks], figure[1 + self.blocks :]
        return bca_interval(float(figure[0]), resampled, left_out, self.units)


def figure(value: float, interval: Interval | None) -> Figure:
    low, high = interval or (None, None)
    return Figure(value=value, low=low, high=high)


QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
