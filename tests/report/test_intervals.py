"""Bias-corrected and accelerated intervals: that they hold the truth, and that their constants are the book's."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
import torch

from quantkit.measure.trace import OutputErrors
from quantkit.report.intervals import Resampler, bca_interval


@pytest.mark.parametrize(("sigma", "least", "most_above"), [(1.0, 0.87, 0.12), (1.5, 0.78, 0.21)])
def test_skewed_documents_are_covered_better_than_by_percentiles(sigma: float, least: float, most_above: float) -> None:
    """2,000 sets of 16 lognormal documents. Stretched percentiles hold 86 and 75 %, and end below the mean in 13 and 25."""
    drawn = np.random.default_rng(1).lognormal(0, sigma, (2000, 16))
    sample, truth = Resampler(np.arange(16), resamples=500), np.exp(sigma**2 / 2)
    found = np.array([sample.interval(sample.means(x)) for x in drawn])
    assert np.mean((found[:, 0] < truth) & (truth < found[:, 1])) >= least
    assert np.mean(found[:, 1] < truth) <= most_above and np.mean(found[:, 0] > truth) < 0.025


def test_the_constants_of_bca_are_efrons() -> None:
    """Of a mean of n units the acceleration is their skewness / (6 sqrt(n)); without bias it moves both percentiles so."""
    x = np.random.default_rng(3).exponential(size=40)
    resampled = np.linspace(-3, 3, 20001)  # its median is the figure: no bias
    low, high = bca_interval(0.0, resampled, (x.sum() - x) / 39, 10**6)
    skew = ((x - x.mean()) ** 3).mean() / x.std() ** 3 / (6 * 40**0.5)
    levels = [(value + 3) / 6 for value in (low, high)]
    assert levels == pytest.approx([NormalDist().cdf(z / (1 - skew * z)) for z in (-1.96, 1.96)], abs=1e-4)
    biased = bca_interval(-0.6, resampled, np.zeros(9), 10**6)  # 40 % lie below
    levels = [(value + 3) / 6 for value in biased]
    assert levels == pytest.approx([NormalDist().cdf(2 * NormalDist().inv_cdf(0.4) + z) for z in (-1.96, 1.96)], abs=1e-4)


def test_what_does_not_vary_or_is_huge_has_an_interval_too() -> None:
    sample = Resampler(np.repeat(np.arange(6), 2), resamples=200)
    assert sample.interval(sample.means(np.full(12, 0.1))) == pytest.approx((0.1, 0.1))
    low, high = sample.interval(sample.means(np.geomspace(1e-300, 1e300, 12))) or (0, 0)
    assert np.isfinite([low, high]).all() and low < high


def test_many_documents_are_left_out_in_blocks() -> None:
    """Of 1,000 documents 200 blocks: rows stay few, and the interval is that of all 1,000 left out one by one."""
    x = np.random.default_rng(0).lognormal(0, 1, 1000)
    sample = Resampler(np.arange(1000), resamples=1000)
    assert len(sample.drawn) == 1 + 200 + 1000 and (sample.drawn[1:201].sum(1) == 995).all()
    means = sample.means(x)
    whole = bca_interval(x.mean(), means[201:], (x.sum() - x) / 999, 1000)
    assert sample.interval(means) == pytest.approx(whole, rel=2e-3)


def test_an_experts_error_has_such_an_interval() -> None:
    """1,500 experts on 12 documents of lognormal error: stretched percentiles end below the true one of 25 % of them."""
    rng, above = np.random.default_rng(0), 0
    errors = OutputErrors(12)
    for i in range(1500):
        ones = torch.ones(12, dtype=torch.float64)
        errors.add(str(i), torch.arange(12), torch.from_numpy(rng.lognormal(0, 1.5, 12)), ones)
    for row in errors.figures().values():
        assert row.low is not None and row.high is not None and row.low < row.value < row.high
        above += row.high < np.exp(1.125)
    assert above / 1500 < 0.22


def test_an_expert_that_one_document_speaks_for() -> None:
    """Without that document there is nothing to divide by."""
    errors = OutputErrors(6)
    errors.add("x", torch.arange(6), torch.tensor([1.0, 0, 0, 0, 0, 0]), torch.tensor([4.0, 0, 0, 0, 0, 0]))
    (row,) = errors.figures().values()
    assert row.value == 0.25 and row.low == pytest.approx(0.25) and row.high == pytest.approx(0.25)
