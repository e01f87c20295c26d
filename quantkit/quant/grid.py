"""Scales, zero points and rounding: from a weight in float32 to codes on a `Grid`, without any calibration algorithm."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.quant.loops import PLAIN, Loops
from quantkit.scheme import Grid, Kind, Strategy

__all__ = ["minmax_scale", "search_scale"]

# Fractions of the min-max range tried by `search_scale`: down to half of it, one bit less of range for one bit more of
# resolution, and a little above 1, since the largest code of a symmetric grid is -8 and not 7.
# The caller's default dtype and device must not reach what is made when this is imported.
_SHRINK = torch.linspace(0.5, 1.05, 23, dtype=torch.float32, device="cpu").tolist()
_WHOLE = min(range(len(_SHRINK)), key=lambda i: abs(_SHRINK[i] - 1))
_VALUES = {False: 1 << 18, True: 1 << 26}  # of a weight searched at once, on the CPU (what its caches hold) and on a GPU


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


def search_scale(weight: Tensor, grid: Grid, importance: Tensor, loops: Loops = PLAIN) -> tuple[Tensor, Tensor | None]:
    """The scale, among shrunken min-max ranges, with the least sum of importance * (weight - rounded)^2 under it; of
    symmetric integers its sign as well, since under a negative one the code that has no opposite lies on the other side.

    weight: [out, in], a float. importance: float32 [in] >= 0, the diagonal of the Hessian: what an error in that input
    feature costs.
    """
    if grid.strategy not in (Strategy.GROUP, Strategy.CHANNEL):
        return minmax_scale(weight.float(), grid)
    pieces = [
        _search(rows.float(), grid, importance, loops)
        for rows in weight.split(max(1, _VALUES[weight.is_cuda] // weight.shape[1]))
    ]
    scales, zeros = zip(*pieces, strict=True)
    return torch.cat(scales), None if grid.symmetric else torch.cat(zeros)


def _search(weight: Tensor, grid: Grid, importance: Tensor, loops: Loops) -> tuple[Tensor, Tensor | None]:
    span = grid.group_size if grid.strategy is Strategy.GROUP else weight.shape[1]
    assert span
    cells = weight.unflatten(1, (-1, span))
    ladder = torch.tensor(_SHRINK, device=weight.device).view(-1, 1, 1)
    low, high = cells.amin(2).clamp(max=0), cells.amax(2).clamp(min=0)
    scales, zeros = _finish(low * ladder, high * ladder, grid)
    offsets = None if zeros is None else zeros.float()
    best = loops.least(cells, importance.view(-1, span), scales.float(), offsets, grid)
    ways = 2 if grid.signed else 1
    best = torch.where(best < 0, ways * _WHOLE, best)
    at = (best // ways).unsqueeze(0)
    scale = scales.gather(0, at).squeeze(0)
    return torch.where(best % ways == 1, -scale, scale), None if zeros is None else zeros.gather(0, at).squeeze(0)
