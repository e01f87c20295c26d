"""The integer programme against trying everything, and how losses combine."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from quantkit.allocate.programme import Option, fewest_bytes, least_loss
from quantkit.allocate.sensitivity import combined, exponent_of


def options(seed: int, groups: int, most: int = 3) -> list[list[Option]]:
    draw = random.Random(seed)
    return [[Option(draw.randrange(100, 9000), draw.uniform(1e-6, 1e-2)) for _ in range(most)] for _ in range(groups)]


def totals(groups: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    picked = [row[i] for row, i in zip(groups, chosen, strict=True)]
    return sum(o.nbytes for o in picked), sum(o.loss for o in picked)


@pytest.mark.parametrize("seed", range(6))
def test_the_least_of_all(seed: int) -> None:
    groups = options(seed, 6)
    every = [totals(groups, chosen) for chosen in itertools.product(range(3), repeat=6)]
    budget = sorted(size for size, _ in every)[len(every) // 3]
    chosen = least_loss(groups, budget)
    assert chosen is not None
    size, loss = totals(groups, chosen)
    assert size <= budget and loss <= min(lost for nbytes, lost in every if nbytes <= budget) * 1.0002
    bound = sorted(lost for _, lost in every)[len(every) // 3]
    chosen = fewest_bytes(groups, bound)
    assert chosen is not None
    size, loss = totals(groups, chosen)
    assert loss <= bound and size <= min(nbytes for nbytes, lost in every if lost <= bound) * 1.0002


def test_what_cannot_be_met() -> None:
    groups = options(0, 4)
    least = sum(min(o.nbytes for o in row) for row in groups)
    assert least_loss(groups, least - 1) is None and least_loss(groups, least) is not None
    assert fewest_bytes(groups, sum(min(o.loss for o in row) for row in groups) * 0.999) is None


def test_losses_combine_between_adding_and_adding_squares() -> None:
    assert combined([1e-3, 3e-3], 1.0) == pytest.approx(4e-3) and combined([3e-3, 4e-3], 2.0) == pytest.approx(5e-3)
    alone = [1e-3, 2e-3, 5e-4, 4e-3]
    together = math.fsum(x**1.2 for x in alone) ** (1 / 1.2)
    assert exponent_of([(alone, together), ([x / 9 for x in alone], together / 9)]) == pytest.approx(1.2, abs=0.005)
    assert exponent_of([]) == exponent_of([([0.0], 0.0)]) == 1.0
