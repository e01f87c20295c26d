"""GPTQ's compiled loops beside their specification in torch: the same codes, errors and sums, bit by bit."""

from __future__ import annotations

import pytest
import torch

from quantkit.kernels.cpu import solve as compiled
from quantkit.quant import loops
from quantkit.scheme import Grid, Kind, Strategy, scheme_named, weight_only
from tests.helpers.compiler import compiles
from tests.helpers.kernels import check_repair, poison

INTEGERS = {"W4A16": True, "W4A16_ASYM": False, "W8A16": True}


def grid_of(name: str) -> Grid:
    scheme = scheme_named(name)
    assert scheme
    return scheme.weight


@compiles
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(("columns", "rows"), [(128, 64), (128, 100), (1, 1), (37, 17), (64, 257)])
def test_compiled_repair(name: str, columns: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    check_repair(compiled.repair, grid_of(name), columns, rows)


@compiles
@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize(
    ("rows", "count", "span"), [(5, 3, 128), (1, 1, 1), (3, 2, 8), (2, 3, 40), (2, 1, 1000), (4, 1, 17)]
)
def test_compiled_search(name: str, rows: int, count: int, span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)
    grid = grid_of(name)
    cells, importance = torch.randn(rows, count, span), torch.rand(count, span)
    steps = (torch.rand(23, rows, count) + 0.1) * 3 / grid.qmax
    offsets = None if grid.symmetric else torch.randint(-8, 8, steps.shape).float()
    found = compiled.least(cells, importance, steps, offsets, grid)
    assert torch.equal(found, loops.least(cells, importance, steps, offsets, grid))
    assert found.min() >= 0 and found.max() < 23 * (1 + grid.signed)


def test_the_sum_by_halves_is_a_sum() -> None:
    for count in (1, 2, 3, 8, 37, 128):
        values = torch.randint(-100, 100, (2, 3, count)).float()
        assert torch.equal(loops._by_halves(values.clone()), values.sum(-1))


@compiles
def test_losses_that_are_no_numbers() -> None:
    cells = torch.tensor([[[float("nan")] * 8, [1e30] * 8]])
    for least in (loops.least, compiled.least):
        assert least(cells, torch.ones(2, 8), torch.ones(3, 1, 2), None, grid_of("W4A16")).tolist() == [[-1, -1]]


@compiles
def test_what_the_compiled_loops_refuse() -> None:
    x = torch.ones(4, 8)
    grid = weight_only(4, True, None).weight
    with pytest.raises(ValueError, match="no block"):
        compiled.repair(torch.ones(129, 2), torch.ones(129, 2), torch.eye(129), torch.ones(129, 2), None, grid)
    with pytest.raises(ValueError, match="float64"):
        compiled.repair(x.double(), x.double(), torch.eye(4).double(), x.double(), None, grid)
    with pytest.raises(ValueError, match="not contiguous"):
        compiled.repair(torch.ones(8, 4).T, x, torch.eye(4), x, None, grid)
    with pytest.raises(ValueError, match="float codes"):
        compiled.repair(x, x, torch.eye(4), x, None, Grid(Kind.FLOAT, 8, Strategy.CHANNEL))
    with pytest.raises(ValueError, match="does not fit"):
        compiled.least(torch.ones(2, 1, 8), torch.ones(1, 9), torch.ones(3, 2, 1), None, grid)
