"""The loops of quantization, compiled: `quantkit.quant.loops` says what they compute, and both give the same codes."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from quantkit.kernels.checks import check
from quantkit.kernels.cpu import build
from quantkit.scheme import Grid, Kind

__all__ = ["MOST", "least", "library", "repair"]

MOST = 128  # columns of a block
SOURCE = build.SOURCE.with_name("solve.cpp")


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | str:
    """The loaded library, or the reason why there is none. Built on first use, once a machine."""
    if isinstance(loops := build.library(SOURCE, build.EXACT), str):
        return loops
    pointer, size, value, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
    loops.quantkit_least.argtypes = [*[pointer] * 5, *[size] * 4, value, value, whole, whole]
    loops.quantkit_repair.argtypes = [*[pointer] * 9, size, size, value, value, whole]
    loops.quantkit_least.restype = loops.quantkit_repair.restype = None
    return loops


def _loaded(grid: Grid, *tensors: Tensor | None) -> ctypes.CDLL:
    """Raises ValueError for what the library does not take, RuntimeError where there is none."""
    check(grid.kind is Kind.INT, f"these loops round to integers, not to {grid.kind.value} codes")
    for tensor in (tensor for tensor in tensors if tensor is not None):
        check(tensor.dtype is torch.float32 and tensor.device.type == "cpu", f"a {tensor.dtype} tensor on {tensor.device}")
        check(tensor.is_contiguous(), "a tensor is not contiguous")
    loops = library()
    if isinstance(loops, str):
        raise RuntimeError(f"the loops of quantization are not compiled: {loops}")
    return loops


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def least(cells: Tensor, importance: Tensor, steps: Tensor, offsets: Tensor | None, grid: Grid) -> Tensor:
    """`quantkit.quant.loops.least` of integers: int64 [rows, cells]. All tensors float32, contiguous, on the CPU. Raises
    ValueError, and RuntimeError where nothing is compiled."""
    loops = _loaded(grid, cells, importance, steps, offsets)
    rows, count, span = cells.shape
    check(span > 0 and importance.shape == (count, span), f"importance {tuple(importance.shape)} does not fit the weight")
    check(
        all(t.shape == (len(steps), rows, count) for t in (steps, offsets) if t is not None), "steps do not fit the weight"
    )
    best = torch.empty(rows, count, dtype=torch.int64)
    arrays = (cells, importance, steps, offsets, best)
    sizes = (rows, count, span, len(steps), grid.qmin, grid.qmax, int(grid.signed), torch.get_num_threads())
    loops.quantkit_least(*map(_address, arrays), *sizes)
    return best


def repair(
    left: Tensor, weight: Tensor, factor: Tensor, step: Tensor, offset: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantkit.quant.loops.repair` to integers, of at most MOST columns: codes, errors and lost; left becomes what was
    rounded. left, weight, step, offset: float32, contiguous, on the CPU. Raises ValueError, RuntimeError as `least`."""
    columns, rows = left.shape
    check(0 < columns <= MOST, f"{columns} columns are no block: it has 1 to {MOST}")
    check(factor.shape == (columns, columns), f"the factor is {tuple(factor.shape)}, not [{columns}, {columns}]")
    check(
        all(t.shape == left.shape for t in (weight, step, offset) if t is not None), "step or weight do not fit what is left"
    )
    diagonal = factor.diagonal()
    ratios, squares = (factor / diagonal[:, None]).contiguous(), diagonal * diagonal
    loops = _loaded(grid, left, weight, ratios, squares, step, offset)
    codes, errors, lost = torch.empty(left.shape, dtype=torch.int8), torch.empty_like(left), left.new_empty(rows)
    arrays = (left, weight, ratios, squares, step, offset, codes, errors, lost)
    loops.quantkit_repair(*map(_address, arrays), columns, rows, grid.qmin, grid.qmax, torch.get_num_threads())
    return codes, errors, lost
