"""Flips, McNemar's p and the interval of the recovery, each against another way to the same number."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from quantkit.report.task_stats import compare, mcnemar, paired_ratio


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (5, 2), (2, 5), (9, 9), (30, 11)])
def test_mcnemar_counts_coin_throws(lost: int, gained: int) -> None:
    flips = lost + gained
    far = abs(lost - gained)
    if flips <= 12:  # every sequence of throws
        throws = [sum(t) for t in product((0, 1), repeat=flips)]
        expected = sum(abs(2 * heads - flips) >= far for heads in throws) / len(throws)
    else:
        expected = sum(math.comb(flips, k) for k in range(flips + 1) if abs(2 * k - flips) >= far) / 2**flips
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-12)


def test_compare_counts_each_item() -> None:
    base, quant = np.array([1.0, 1, 1, 0, 0, 1]), np.array([1.0, 0, 1, 1, 0, 0])
    got = compare(base, quant)
    assert got["baseline"] == pytest.approx(4 / 6) and got["quantized"] == pytest.approx(3 / 6)
    assert got["recovery"] == pytest.approx(3 / 4)
    assert (got["right_to_wrong"], got["wrong_to_right"], got["n"]) == (2, 1, 6)
    low, high = got["ci95"]
    assert low < 3 / 4 < high


def test_nothing_to_recover() -> None:
    got = compare(np.zeros(5), np.array([0.0, 1, 0, 0, 0]))
    assert got["recovery"] is None and got["ci95"] is None and got["wrong_to_right"] == 1


def test_equal_answers_are_not_proof() -> None:
    """Without flips the interval narrows with the number of right answers, and holds 1."""
    widths = []
    for right in (10, 100, 1000):
        low, high = paired_ratio(right, 0, 0)
        assert low < 1 < high
        widths.append(high - low)
    assert widths[0] > 0.2 and widths[2] < 0.01 and widths == sorted(widths, reverse=True)


def test_swapping_the_models_inverts_the_interval() -> None:
    low, high = paired_ratio(40, 7, 3)
    other_low, other_high = paired_ratio(40, 3, 7)
    assert (low, high) == pytest.approx((1 / other_high, 1 / other_low))


@pytest.mark.parametrize("cells", [(0.6, 0.05, 0.03, 0.32), (0.3, 0.1, 0.02, 0.58), (0.85, 0.04, 0.04, 0.07)])
def test_the_interval_covers_the_truth(cells: tuple[float, ...]) -> None:
    """4000 tests of 100 items drawn from known probabilities (both right, lost, gained, both wrong): 95 % hold the ratio."""
    truth = (cells[0] + cells[2]) / (cells[0] + cells[1])
    drawn = np.random.default_rng(0).multinomial(100, cells, size=4000)
    held = [low <= truth <= high for low, high in (paired_ratio(int(a), int(b), int(c)) for a, b, c, _ in drawn)]
    assert 0.935 <= np.mean(held) <= 0.98


def test_scores_between_0_and_1_are_resampled() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(400)
    quant = np.clip(base * 0.9, 0, 1)
    low, high = compare(base, quant)["ci95"]
    assert 0.88 < low < 0.9 < high < 0.92  # every resample has that ratio; 400 items are not proof of it
    low, high = compare(base, rng.random(400))["ci95"]
    assert low < 1 < high and high - low < 0.3


def test_a_few_scores_between_0_and_1_give_no_interval() -> None:
    assert compare(np.array([0.7]), np.array([0.7]))["ci95"] is None
    assert compare(np.full(19, 0.7), np.full(19, 0.7))["ci95"] is None
    low, high = compare(np.full(20, 0.7), np.full(20, 0.7))["ci95"]
    assert low < 0.9 and high > 1.1


def test_scores_between_0_and_1_are_covered() -> None:
    """1,000 tests of 20 items of a score like F1, 0, 1 or between: about 95 % of the intervals hold the ratio of means."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(1000):
        base = rng.choice([0, 1, 0.5, 0.8], size=20, p=[0.2, 0.4, 0.2, 0.2])
        quant = np.where(rng.random(20) < 0.2, rng.choice([0, 1, 0.5, 0.8], size=20), base)
        low, high = compare(base, quant)["ci95"]
        held.append(low <= (0.8 * 0.66 + 0.2 * 0.575) / 0.66 <= high)
    assert 0.93 <= np.mean(held) <= 0.99


def test_bad_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="give \\[n\\] twice"):
        compare(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match="no right answer"):
        paired_ratio(0, 0, 3)
