"""Rounding to nearest, some rows of a weight at a time: codes, scales and error are those of the whole at once, and no more
than a piece of it is ever in float32."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkit import rowwise
from quantkit.qtensor import QuantizedTensor, expand
from quantkit.quant.grid import minmax_scale
from quantkit.quant.loops import encode
from quantkit.scheme import Scheme, Strategy
from quantkit.stats import WeightError

__all__ = ["Rounding", "by_rows", "rtn"]

_ELEMENTS = 1 << 18  # of a piece: in float32, with what is made of it, it stays in a core's cache
_WORD = 8  # rows that a packed word of zero points may hold


def by_rows(scheme: Scheme) -> bool:
    """Whether rows can be rounded without the others: not under one scale for the whole weight."""
    return scheme.weight.strategy is not Strategy.TENSOR


def rtn(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Round weight [out, in], a float, to the nearest code under min-max scales."""
    weight, grid, shape = weight.float(), scheme.weight, (weight.shape[0], weight.shape[1])
    scale, zero = minmax_scale(weight, grid)
    step = expand(scale.float(), grid, shape)
    offset = None if zero is None else expand(zero.float(), grid, shape)
    return QuantizedTensor(encode(weight, step, offset, grid), scale, zero, grid)


class Rounding:
    """One weight, given in pieces of `at_once` rows, the last of what is left. error: `stats.weight_error` of it.

    Raises ValueError for a scheme that is not `by_rows`.
    """

    def __init__(self, scheme: Scheme, in_features: int) -> None:
        if not by_rows(scheme):
            raise ValueError(f"{scheme.name} has one scale for a whole weight")
        self.scheme, self._error = scheme, WeightError()
        whole = math.lcm(_WORD, scheme.weight.block[0] if scheme.weight.block else 1)
        self.at_once = max(1, _ELEMENTS // max(1, in_features) // whole) * whole

    def rows(self, weight: Tensor) -> QuantizedTensor:
        """Any float [rows, in] -> its codes and scales."""
        weight = weight.float()
        if (done := rowwise.round_rows(weight, self.scheme.weight)) is not None:
            rounded, lost, whole = done
            self._error.add_sums(lost.tolist(), whole.tolist())
            return rounded
        rounded = rtn(weight, self.scheme)
        self._error.add(weight, rounded.dequantize())
        return rounded

    def whole(self, weight: Tensor) -> QuantizedTensor:
        """All of it: float [out, in], a piece at a time."""
        parts = [self.rows(part) for part in weight.split(self.at_once)]
        codes = torch.cat([part.codes.view(torch.int8) for part in parts]).view(parts[0].codes.dtype)
        zeros = [part.zero for part in parts if part.zero is not None]
        scale, zero = torch.cat([part.scale for part in parts]), torch.cat(zeros) if zeros else None
        return QuantizedTensor(codes, scale, zero, self.scheme.weight)

    @property
    def error(self) -> float:
        return self._error.value
