"""What a method may have made of a weight: which scales, which codes. For `verify`, from the definition of a grid alone.

Rounding: the scale covers exactly the range of its weights, and every code is a nearest one. GPTQ: the scale is that of a
part of the range, from half to a little above it, of either sign where integers are symmetric; codes are bounded by the
error that was recorded when they were made. Learned: as GPTQ's, and the scale within 0.3 of one of GPTQ's.
Tuned: within 0.1 of one that was rounded, by GPTQ or learned.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.qtensor import QuantizedTensor, expand
from quantkit.scheme import Grid, Kind, Strategy

__all__ = ["METHODS", "TIE", "Range", "may_be_negative", "misplaced_codes", "range_of", "wrong_scales"]

METHODS = ("rtn", "gptq", "learned", "tuned")
Range = tuple[Tensor, Tensor]
# Of the range: what a search of scales may choose, 0.3 of that less or more, and 0.1 of that once more.
_PARTS = {"gptq": (0.5, 1.05), "learned": (0.35, 1.365), "tuned": (0.315, 1.5015)}
_TINY = torch.finfo(torch.bfloat16).tiny
_LAST_BIT = 2.0**-7  # of a bfloat16, relative to it, at most
_DIVISION = 1e-6  # what a division in float32 may be off, relative, on any device
TIE = 1e-4  # of a step: how far from the middle between two codes either may be taken


def range_of(weight: Tensor, grid: Grid) -> Range:
    """The smallest and the largest of float32 weight [out, in] under each scale, as if 0 were among them."""
    out, inputs = weight.shape
    if grid.strategy is Strategy.TENSOR:
        cells = weight.reshape(1, -1)
        return cells.amin(1).clamp(max=0), cells.amax(1).clamp(min=0)
    height, width = grid.block or (1, grid.group_size or inputs)
    padded = F.pad(weight, (0, -inputs % width, 0, -out % height))
    cells = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [rows of cells, height, columns of cells, width]
    return cells.amin((1, 3)).clamp(max=0), cells.amax((1, 3)).clamp(min=0)


def may_be_negative(q: QuantizedTensor) -> Tensor:
    """bool of the scale's shape: where it is of symmetric integers, whichever format holds them."""
    return torch.full(q.scale.shape, q.grid.signed, device=q.scale.device) if q.zero is None else q.zero == 0


def wrong_scales(q: QuantizedTensor, span: Range, method: str) -> Tensor:
    """bool of the scale's shape: where it is none that this method gives weights of that range."""
    low, high = span
    grid, scale = q.grid, q.scale.float()
    if method in _PARTS:
        scale = torch.where(may_be_negative(q), scale.abs(), scale)
    reach = grid.qmax if grid.kind is Kind.FLOAT else (grid.qmax - grid.qmin) / 2
    symmetric = _possible(scale, torch.maximum(high, -low) / reach, method)
    if q.zero is None:
        return ~symmetric
    # Another format may hold a symmetric weight with zero points, all in the middle.
    return ~(_possible(scale, (high - low) / (grid.qmax - grid.qmin), method) | (symmetric & (q.zero == 0)))


def _possible(scale: Tensor, exact: Tensor, method: str) -> Tensor:
    if method in _PARTS:
        smallest, largest = (part * exact for part in _PARTS[method])
        none = (scale == 1) & (smallest <= _TINY)  # a range of nothing is given the scale 1
        return none | ((scale >= smallest * (1 - _LAST_BIT)) & (scale <= largest * (1 + _LAST_BIT)))
    candidates = (exact, exact * (1 - _DIVISION), exact * (1 + _DIVISION))
    scales = [torch.where(value > _TINY, value, torch.ones_like(value)).bfloat16().float() for value in candidates]
    return torch.stack([scale == value for value in scales]).any(0)


def misplaced_codes(weight: Tensor, q: QuantizedTensor, value: Tensor) -> Tensor:
    """bool [out, in]: where another code would be nearer to the weight. value: of `q.dequantize()`."""
    grid = q.grid
    step = expand(q.scale.float(), grid, q.shape)
    if grid.kind is Kind.FLOAT:
        nearest = (weight / step).clamp(grid.qmin, grid.qmax).to(torch.float8_e4m3fn).float()
    else:
        zero = 0.0 if q.zero is None else expand(q.zero.float(), grid, q.shape)
        nearest = ((weight / step).round() + zero).clamp(grid.qmin, grid.qmax) - zero
    return (weight - value).abs() > (weight - nearest * step).abs() + TIE * step.abs()
