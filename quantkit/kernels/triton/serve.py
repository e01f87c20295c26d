"""Packed weights that choose their kernel by the number of tokens: CUDA for few, Triton, and a scratch for many."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from quantkit.kernels.cuda import decode
from quantkit.kernels.cuda.build import Library
from quantkit.kernels.triton import ops
from quantkit.kernels.triton.layout import Packed, PackedInt
from quantkit.kernels.triton.tiles import CUDA_UP_TO, SCRATCH_FROM

__all__ = ["Experts", "Linear"]


@dataclass(frozen=True)
class Linear:
    """A linear. library: the CUDA kernel, if it is ever ahead, can be built here and reads such weights."""

    weight: Packed
    library: Library | None

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.numel() // x.shape[-1]
        if isinstance(self.weight, PackedInt):
            if self.library and rows <= CUDA_UP_TO:
                return decode.linear(x, self.weight, self.library)
            if rows >= SCRATCH_FROM:
                return ops.linear_by_scratch(x, self.weight)
        return ops.linear(x, self.weight)


@dataclass(frozen=True)
class Experts:
    """A layer's experts, gate stacked on up. library: as in Linear."""

    gate_up: Packed
    down: Packed
    library: Library | None

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        rows = ids.numel() / self.gate_up.experts
        if isinstance(self.gate_up, PackedInt) and isinstance(self.down, PackedInt):
            if self.library and rows <= CUDA_UP_TO:
                return decode.moe(x, self.gate_up, self.down, ids, weights, self.library)
            if rows >= SCRATCH_FROM:
                return ops.moe_by_scratch(x, self.gate_up, self.down, ids, weights)
        return ops.moe(x, self.gate_up, self.down, ids, weights)
