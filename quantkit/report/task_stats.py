"""Two models on the same items: flips, McNemar's exact test, and an interval of the recovery (quantized / baseline)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkit.report.intervals import Floats, Z, percentile_interval, wilson

__all__ = ["LEAST_ITEMS", "compare", "mcnemar", "paired_ratio"]

# Scores between 0 and 1 of fewer items give no interval: their spread says too little.
LEAST_ITEMS = 20


def compare(baseline: Floats, quantized: Floats, seed: int = 0) -> dict[str, Any]:
    """Scores of the same items, float64 [n] each in 0..1, item by item -> the figures that a report shows.

    An item is right from 0.5 on. recovery and ci95 are None where the baseline has no right item: there is nothing to
    recover. ci95 is None too for fewer than `LEAST_ITEMS` items with scores between 0 and 1.
    """
    if baseline.shape != quantized.shape or baseline.ndim != 1 or not len(baseline):
        raise ValueError(f"scores are {baseline.shape} and {quantized.shape}: give [n] twice, n at least 1")
    before, after = baseline >= 0.5, quantized >= 0.5
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    means = float(baseline.mean()), float(quantized.mean())
    binary = bool(np.isin(baseline, (0, 1)).all() and np.isin(quantized, (0, 1)).all())
    interval = None
    if means[0] > 0:
        both = int((before & after).sum())
        interval = paired_ratio(both, lost, gained) if binary else _bootstrap_ratio(baseline, quantized, seed)
    return {
        "baseline": means[0],
        "quantized": means[1],
        "recovery": means[1] / means[0] if means[0] > 0 else None,
        "ci95": interval,
        "right_to_wrong": lost,
        "wrong_to_right": gained,
        "mcnemar_p": mcnemar(lost, gained),
        "n": len(baseline),
    }


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p that as many flips or more would fall on one side, were both sides equally likely (McNemar 1947)."""
    flips = lost + gained
    tail = sum(math.comb(flips, i) for i in range(min(lost, gained) + 1))
    return min(1.0, float(2 * tail / 2**flips))


def paired_ratio(both: int, lost: int, gained: int) -> list[float]:
    """95 % interval of P(quantized right) / P(baseline right) from paired answers, by Bonett and Price (Statistics in
    Medicine 25, 2006, 3039-3050): Wilson intervals of both, narrowed for their covariance.

    Unlike a bootstrap it does not shrink to a point where no item flipped: 20 equal answers are weak evidence of equality.
    Needs a right answer of the baseline (both + lost > 0). Items that both get wrong say nothing about the ratio.
    """
    if both + lost == 0:
        raise ValueError("the baseline has no right answer")
    trials = both + lost + gained
    base, quant = both + lost, both + gained
    p_base, p_quant = (base + 1) / (trials + 2), (quant + 1) / (trials + 2)
    whole = math.sqrt((lost + gained + 2) / ((base + 1) * (quant + 1)))
    parts = math.sqrt((1 - p_base) / (base + 1)) + math.sqrt((1 - p_quant) / (quant + 1))
    z = Z * whole / parts
    low_base, high_base = wilson(base, trials, z)
    low_quant, high_quant = wilson(quant, trials, z)
    return [low_quant / high_base, high_quant / low_base]


def _bootstrap_ratio(baseline: Floats, quantized: Floats, seed: int, resamples: int = 2000) -> list[float] | None:
    """The same for scores between 0 and 1: items are resampled, jointly for both models. No narrower than as many right
    answers give of which none flipped; None for fewer than `LEAST_ITEMS` items."""
    items, point = len(baseline), float(quantized.sum() / baseline.sum())
    if items < LEAST_ITEMS:
        return None
    drawn: NDArray[np.int64] = np.random.default_rng(seed).integers(items, size=(resamples, items))
    base, quant = baseline[drawn].sum(1), quantized[drawn].sum(1)
    low, high = percentile_interval(point, quant[base > 0] / base[base > 0], items)
    least = paired_ratio(max(1, round(float(baseline.sum()))), 0, 0)
    return [max(0.0, min(low, point * least[0])), max(high, point * least[1])]
