"""Scales, zero points and rounding: from a weight in float32 to codes on a `Grid`, without any calibration algorithm."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from quantkit.qtensor import expand
from quantkit.scheme import Grid, Kind, Strategy

__all__ = ["encode", "minmax_scale", "search_scale"]

# Fractions of the min-max range tried by `search_scale`: down to half of it, one bit less of range for one bit more of
# resolution, and a little above 1, since the largest code of a symmetric grid is -8 and not 7.
# The caller's default dtype and device must not reach what is made when this is imported.
_SHRINK = torch.linspace(0.5, 1.05, 23, dtype=torch.float32, device="cpu").tolist()


def _per_scale(values: Tensor, grid: Grid, largest: bool) -> Tensor:
    """The largest (or smallest) of values [out, in] under each scale."""
    out, inputs = values.shape
    reduce = torch.amax if largest else torch.amin
    if grid.strategy is Strategy.TENSOR:
        return reduce(values, dim=(0, 1)).view(1)
    if grid.strategy is Strategy.CHANNEL:
        return reduce(values, dim=1, keepdim=True)
    if grid.strategy is Strategy.GROUP:
        assert grid.group_size
        return reduce(values.view(out, inputs // grid.group_size, grid.group_size), dim=2)
    assert grid.block
    rows, columns = grid.block
    padded = torch.nn.functional.pad(values, (0, -inputs % columns, 0, -out % rows))
    return reduce(padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns), dim=(1, 3))


def _finish(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale (bfloat16, > 0) and zero point (int8) that map [low, high] to the grid. low <= 0 <= high."""
    if grid.symmetric:
        # An n-bit integer grid spans 2^n - 1 steps, so amax lies half a step beyond its largest code.
        reach = grid.qmax if grid.kind is Kind.FLOAT else (grid.qmax - grid.qmin) / 2
        scale = torch.maximum(high, -low) / reach
    else:
        scale = (high - low) / (grid.qmax - grid.qmin)
    tiny = torch.finfo(torch.bfloat16).tiny
    scale = torch.where(scale > tiny, scale, torch.ones_like(scale)).bfloat16()
    if grid.symmetric:
        return scale, None
    zero = (grid.qmin - low / scale.float()).round().clamp(grid.qmin, grid.qmax)
    return scale, zero.to(torch.int8)


def minmax_scale(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover the whole range of float32 weight [out, in], as compressed-tensors computes them."""
    low = _per_scale(weight, grid, largest=False).clamp(max=0)
    high = _per_scale(weight, grid, largest=True).clamp(min=0)
    return _finish(low, high, grid)


def search_scale(weight: Tensor, grid: Grid, importance: Tensor) -> tuple[Tensor, Tensor | None]:
    """The scale, among shrunken min-max ranges, with the least sum of importance * (weight - rounded)^2 under it; of
    symmetric integers its sign as well.

    importance: float32 [in] >= 0, the diagonal of the Hessian: what an error in that input feature costs.
    """
    if grid.strategy not in (Strategy.GROUP, Strategy.CHANNEL):
        return minmax_scale(weight, grid)
    low = _per_scale(weight, grid, largest=False).clamp(max=0)
    high = _per_scale(weight, grid, largest=True).clamp(min=0)
    best_scale, best_zero = _finish(low, high, grid)
    best_loss = torch.full(best_scale.shape, torch.inf, device=weight.device)
    # Under a negative scale the largest code, one further from 0 than its opposite, is that of the other side.
    signs = (1, -1) if grid.signed else (1,)
    for shrink, sign in product(_SHRINK, signs):
        scale, zero = _finish(low * shrink, high * shrink, grid)
        scale = scale * sign
        error = weight - _value(weight, scale, zero, grid)
        loss = _sum_per_scale(error.square_().mul_(importance), grid)
        better = loss < best_loss
        best_loss = torch.where(better, loss, best_loss)
        best_scale = torch.where(better, scale, best_scale)
        if zero is not None and best_zero is not None:
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _sum_per_scale(values: Tensor, grid: Grid) -> Tensor:
    if grid.strategy is Strategy.CHANNEL:
        return values.sum(1, keepdim=True)
    assert grid.group_size
    return values.view(values.shape[0], -1, grid.group_size).sum(2)


def _value(weight: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    shape = (weight.shape[0], weight.shape[1])
    step = expand(scale.float(), grid, shape)
    offset = None if zero is None else expand(zero.float(), grid, shape)
    codes = encode(weight, step, offset, grid).float()
    return (codes if offset is None else codes - offset) * step


def encode(weight: Tensor, step: Tensor, offset: Tensor | None, grid: Grid) -> Tensor:
    """Round to the nearest code. step and offset are float32 and broadcast against weight. int8 or float8_e4m3fn."""
    codes = weight / step
    if grid.kind is Kind.FLOAT:
        return codes.clamp(grid.qmin, grid.qmax).to(torch.float8_e4m3fn)
    codes = codes.round() if offset is None else codes.round() + offset
    return codes.clamp(grid.qmin, grid.qmax).to(torch.int8)
