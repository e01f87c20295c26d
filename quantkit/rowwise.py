"""Rounding rows of a weight, and comparing rounded ones with it, each in one pass of C++ where there is a compiler.

What is computed is defined elsewhere, in torch: `quant.rounding` and `checkpoint.bounds`, to the last bit. Where these say
None, that is done instead.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from quantkit.dtypes import torch_dtype
from quantkit.kernels.cpu import build
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Grid, Kind, Strategy

__all__ = ["Compared", "compare_rows", "round_rows"]

_PER_ROW = (Strategy.GROUP, Strategy.CHANNEL, Strategy.BLOCK)


class _Grid(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("floating", ctypes.c_int32),
        ("symmetric", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
    )


def _grid(grid: Grid, columns: int) -> _Grid:
    rows, wide = grid.block or (1, grid.group_size or columns)
    return _Grid(grid.qmin, grid.qmax, grid.kind is Kind.FLOAT, grid.symmetric, rows, wide)


def _at(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr() if tensor is not None else None) for tensor in tensors]


def _library(weight: Tensor, grid: Grid) -> ctypes.CDLL | None:
    usable = weight.device.type == "cpu" and weight.is_contiguous() and 0 not in weight.shape and grid.strategy in _PER_ROW
    library = build.rowwise() if usable and weight.dtype is torch.float32 else ""
    return None if isinstance(library, str) else library


def round_rows(weight: Tensor, grid: Grid) -> tuple[QuantizedTensor, Tensor, Tensor] | None:
    """float32 [rows, in] to the nearest codes under min-max scales; and of each row the sum of squares of what was lost, and
    of the weight, float64 [rows]."""
    library = _library(weight, grid)
    if library is None or grid.scale_dtype != "BF16":
        return None
    rows, columns = weight.shape
    codes = torch.empty(weight.shape, dtype=torch_dtype(grid.codes.dtype))
    scale = torch.empty(grid.scale_shape(rows, columns), dtype=torch.bfloat16)
    zero = None if grid.symmetric else torch.empty(scale.shape, dtype=torch.int8)
    lost, whole = torch.empty(2, rows, dtype=torch.float64)
    size = (ctypes.c_int64(rows), ctypes.c_int64(columns))
    library.quantkit_round_rows(
        ctypes.byref(_grid(grid, columns)), *_at(weight), *size, *_at(codes, scale, zero, lost, whole)
    )
    return QuantizedTensor(codes, scale, zero, grid), lost, whole


@dataclass(frozen=True)
class Compared:
    """What codes and scales are beside their weight. misplaced: how many codes, and the flat index of the first; (0, 0) if
    not asked for. smallest, largest: of each scale's weights, float32 in the scale's shape, 0 among them. lost, whole: as of
    `round_rows`."""

    misplaced: tuple[int, int]
    smallest: Tensor
    largest: Tensor
    lost: Tensor
    whole: Tensor


@cache
def _neighbours(grid: Grid) -> Tensor:
    """float32 [3, 256]: the value of each code, by its byte, of the next below and of the next above it, on the grid."""
    every = torch.arange(256).to(torch.uint8).view(torch_dtype(grid.codes.dtype)).float()
    on_grid = every[(every >= grid.qmin) & (every <= grid.qmax)].unique()  # sorted; NaN is on none
    place = torch.searchsorted(on_grid, every.nan_to_num(0.0).clamp(grid.qmin, grid.qmax))
    around = [on_grid[(place + step).clamp(0, len(on_grid) - 1)] for step in (-1, 1)]
    return torch.stack([every, *around]).contiguous()


def compare_rows(weight: Tensor, q: QuantizedTensor, tie: float, codes: bool) -> Compared | None:
    """float32 weight [rows, in] and what it was rounded to. codes: whether to look for misplaced ones, where another code is
    nearer to the weight by more than `tie` of a step."""
    library = _library(weight, q.grid)
    if library is None or not q.codes.is_contiguous():
        return None
    rows, columns = weight.shape
    scale = q.scale.float().contiguous()
    zero = None if q.zero is None else q.zero.contiguous()
    table = _neighbours(q.grid)
    misplaced = torch.zeros(2, dtype=torch.int64)
    smallest, largest = torch.empty(2, *q.scale.shape)
    lost, whole = torch.empty(2, rows, dtype=torch.float64)
    library.quantkit_compare_rows(
        *(ctypes.byref(_grid(q.grid, columns)), *_at(weight), ctypes.c_int64(rows), ctypes.c_int64(columns)),
        *(*_at(q.codes, scale, zero, *table), ctypes.c_float(tie)),
        *_at(misplaced if codes else None, smallest, largest, lost, whole),
    )
    number, first = misplaced.tolist()
    return Compared((number, first), smallest, largest, lost, whole)
