"""`QuantizedTensor`: integer codes, scales and zero points. `dequantize()` is the definition of its value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.dtypes import torch_dtype
from quantkit.scheme import Grid, Strategy

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["QuantizedTensor", "expand"]


def expand(per_scale: Tensor, grid: Grid, shape: tuple[int, int]) -> Tensor:
    """Spread one value per scale (shape `grid.scale_shape(*shape)`) to one that broadcasts against a weight [out, in]."""
    if grid.strategy is Strategy.GROUP:
        assert grid.group_size
        return per_scale.repeat_interleave(grid.group_size, dim=1)
    if grid.strategy is Strategy.BLOCK:
        assert grid.block
        rows, columns = grid.block
        return per_scale.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
    return per_scale


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight [out, in] on a grid.

    codes: `grid.codes.dtype`, [out, in]. scale: `grid.scale_dtype`, `grid.scale_shape`, finite and > 0; where the grid is
    `signed`, or all zero points under a scale are 0, it may be < 0. zero: int8 of the scale's shape when the grid is
    asymmetric, else None. input_scale: a float [1] when the scheme rounds activations with a calibrated scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    grid: Grid
    input_scale: Tensor | None = None

    def __post_init__(self) -> None:
        out, inputs = self.codes.shape
        expected = torch_dtype(self.grid.codes.dtype)
        if self.codes.dtype is not expected:
            raise ValueError(f"codes are {self.codes.dtype}, a {self.grid.kind.value} grid holds {expected}")
        if self.scale.dtype is not torch_dtype(self.grid.scale_dtype):
            raise ValueError(f"scale is {self.scale.dtype}, the grid's scales are {self.grid.scale_dtype}")
        if tuple(self.scale.shape) != self.grid.scale_shape(out, inputs):
            raise ValueError(f"scale {tuple(self.scale.shape)} does not fit {self.grid.scale_shape(out, inputs)}")
        if (self.zero is None) != self.grid.symmetric:
            raise ValueError("an asymmetric grid needs zero points and a symmetric one has none")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """(codes - zero) * scale, float32 [out, in]."""
        values = self.codes.float()
        if self.zero is not None:
            values = values - expand(self.zero.float(), self.grid, self.shape)
        return values * expand(self.scale.float(), self.grid, self.shape)
