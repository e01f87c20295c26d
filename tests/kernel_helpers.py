"""Random quantised weights, and memory that shows what a kernel failed to write."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Grid, Kind, Scheme, Strategy


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixes the seed and fills every torch.empty with NaN (integers: their smallest value)."""
    torch.manual_seed(0)

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        value = torch.full(size, float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min, device=device)
        return value.to(dtype)

    monkeypatch.setattr(torch, "empty", empty)


def weight4(rows: int, columns: int, group: int | None, symmetric: bool) -> QuantizedTensor:
    """Group scales, or channel scales where group is None."""
    grid = Grid(Kind.INT, 4, Strategy.GROUP if group else Strategy.CHANNEL, symmetric, group)
    shape = grid.scale_shape(rows, columns)
    zero = None if symmetric else torch.randint(-8, 8, shape, dtype=torch.int8)
    codes = torch.randint(-8, 8, (rows, columns), dtype=torch.int8)
    return QuantizedTensor(codes, (torch.rand(shape) * 0.02 + 0.01).bfloat16(), zero, grid)


def weight8(rows: int, columns: int, scheme: Scheme) -> QuantizedTensor:
    shape = scheme.weight.scale_shape(rows, columns)
    codes = torch.randint(-127, 128, (rows, columns), dtype=torch.int8)
    if scheme.weight.kind is Kind.FLOAT:
        codes = (torch.randn(rows, columns) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    input_scale = torch.tensor([0.004]).bfloat16() if scheme.static else None
    return QuantizedTensor(codes, (torch.rand(shape) * 0.002 + 0.001).bfloat16(), None, scheme.weight, input_scale)
