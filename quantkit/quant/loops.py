"""The two loops that take an element-wise method's time, as plain torch: the specification of what a kernel does instead.

Sums are taken in an order that is stated, products and sums are rounded one by one, so that a kernel gives the same codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.scheme import Grid, Kind

__all__ = ["PLAIN", "Block", "Loops", "encode", "least", "repair"]


Block = tuple[Tensor, Tensor, Tensor]  # codes, errors, lost: of `repair`


@dataclass(frozen=True)
class Loops:
    """least, repair: as here. feedback: in which dtype errors are multiplied by the factor; sums are float32."""

    least: Callable[[Tensor, Tensor, Tensor, Tensor | None, Grid], Tensor]
    repair: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, Grid], Block]
    feedback: torch.dtype


def encode(weight: Tensor, step: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    """Round to the nearest code. step and offset are float32 and broadcast against weight. int8 or float8_e4m3fn."""
    codes = weight / step
    if grid.kind is Kind.FLOAT:
        return codes.clamp(grid.qmin, grid.qmax).to(torch.float8_e4m3fn)
    codes = codes.round() if offset is None else codes.round() + offset
    return codes.clamp(grid.qmin, grid.qmax).to(torch.int8)


def least(cells: Tensor, importance: Tensor, steps: Tensor, offsets: Tensor | None, grid: Grid) -> Tensor:
    """Which step loses least under each scale: int64 [rows, cells], an index into steps; of a grid that is `signed` twice
    that, and one more where the step is to be negative. Where no loss is a number it is -1.

    cells: float32 [rows, cells, inputs of a scale]. importance: float32 [cells, inputs of a scale] >= 0. steps: float32
    [n, rows, cells] > 0; offsets likewise, of zero points. A loss is the sum of importance * (weight - value)^2, by halves.
    """
    best = torch.full(cells.shape[:2], -1, dtype=torch.int64, device=cells.device)
    lowest = torch.full(cells.shape[:2], torch.inf, device=cells.device)
    scaled, value = torch.empty_like(cells), torch.empty_like(cells)
    ranges = [(grid.qmin, grid.qmax), *([(-grid.qmax, -grid.qmin)] if grid.signed else [])]
    for i, step in enumerate(steps.unsqueeze(-1)):
        offset = None if offsets is None else offsets[i].unsqueeze(-1)
        torch.mul(cells, 1 / step, out=scaled)
        if grid.kind is Kind.INT:
            scaled.round_()
        for j, (low, high) in enumerate(ranges):
            if grid.kind is Kind.FLOAT:
                value.copy_(scaled.clamp(low, high).to(torch.float8_e4m3fn))
            elif offset is None:
                torch.clamp(scaled, low, high, out=value)
            else:
                torch.add(scaled, offset, out=value).clamp_(low, high).sub_(offset)
            torch.sub(cells, value.mul_(step), out=value)
            loss = _by_halves(value.square_().mul_(importance))
            better = loss < lowest
            lowest = torch.where(better, loss, lowest)
            best = torch.where(better, len(ranges) * i + j, best)
    return best


def _by_halves(values: Tensor) -> Tensor:
    """The sum over the last dimension, which is overwritten: the later half is added to the earlier, until one is left."""
    count = values.shape[-1]
    while count > 1:
        half = (count + 1) // 2
        values[..., : count - half] += values[..., half:count]
        count = half
    return values[..., 0]


def repair(left: Tensor, weight: Tensor, factor: Tensor, step: Tensor, offset: Tensor | None, grid: Grid) -> Block:
    """Round a block of columns from the last to the first, each after what the later ones have lost is added to it.

    left: float32 [columns, rows], the weight and what the columns before this block have lost; it becomes what was rounded.
    weight, step, offset: float32 of that shape. factor: float32 [columns, columns], upper: row i over its diagonal says how
    much of each later column's error is added to column i. What is below its diagonal is not read.

    Returns codes of the grid [columns, rows]; errors, the weight minus its new value, float32 likewise; and lost, the sum
    over columns of diagonal^2 (left - value)^2, float32 [rows].
    """
    columns, rows = left.shape
    diagonal = factor.diagonal()
    ratios = factor / diagonal[:, None]
    codes = torch.empty(
        columns, rows, dtype=torch.float8_e4m3fn if grid.kind is Kind.FLOAT else torch.int8, device=left.device
    )
    errors, lost = torch.empty_like(left), left.new_zeros(rows)
    for i in reversed(range(columns)):
        s, z = step[i], None if offset is None else offset[i]
        codes[i] = encode(left[i], s, z, grid)
        value = codes[i].float() * s if z is None else (codes[i].float() - z) * s
        torch.sub(weight[i], value, out=errors[i])
        lost += (left[i] - value).square_().mul_(diagonal[i] * diagonal[i])
        left[:i] += ratios[:i, i, None] * errors[i]
    return codes, errors, lost


PLAIN = Loops(least, repair, torch.float32)
