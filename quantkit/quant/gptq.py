"""GPTQ (Frantar et al., arXiv 2210.17323) in the form of LDLQ (Chee et al., arXiv 2307.13304, which shows them equal): round
column by column, and let the columns to come repair each error.

With H the mean of x x^T at the layer's input and H = R D R^T, R unit upper and D diagonal, column i is what is nearest to
x_i = w_i + sum over j < i of R_ji (w_j - q_j), and the loss of all is sum D_i (x_i - q_i)^2. That takes one Cholesky
factorisation, of H in reverse order, and no inverse. Columns are visited by falling diag(H), while scales belong to the
original order ("static groups"), so the file needs no permutation. Scales are searched before, weighted by diag(H), since
the repair cannot undo a scale that is too wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.quant.grid import search_scale
from quantkit.quant.loops import PLAIN, Loops
from quantkit.quant.method import DAMPING
from quantkit.scheme import Grid, Kind, Strategy

__all__ = ["DAMPING", "NotPositive", "Solved", "gptq"]

_FARTHEST = torch.finfo(torch.float16).max  # of a latent
_BLOCK = 128  # columns repaired at once; only speed depends on it, and a kernel takes no more
_ROWS = {
    False: 2048,
    True: 1 << 20,
}  # of a weight solved at once, on the CPU and on a GPU; only memory and speed depend on it
_COPIED = 256  # rows of the Hessian permuted at once


class NotPositive(Exception):
    """The Hessian is not positive definite under any damping, so there is nothing to solve."""


@dataclass(frozen=True)
class Solved:
    """lost: float32 [out], e H e^T of each row's error e, as the solve knows it: to a thousandth of what damping adds to it.
    latent: float16 [out, in], what was rounded to each code: the repaired weight over its scale, plus the zero point. None
    unless it was asked for."""

    quantized: QuantizedTensor
    damping: float
    lost: Tensor
    latent: Tensor | None = None


def _factor(hessian: Tensor, order: Tensor, dampings: tuple[float, ...]) -> tuple[Tensor, float]:
    """Upper R^T, as rows of the lower Cholesky factor's transpose, of H in that order; and the first of dampings for which
    there is one. It is the only array of H's size that is made. Raises NotPositive."""
    mean = hessian.diagonal().mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise NotPositive
    factor = torch.empty_like(hessian)
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    for damping in dampings:
        for start in range(0, len(order), _COPIED):
            rows = slice(start, start + _COPIED)
            torch.index_select(hessian[order[rows]], 1, order, out=factor[rows])
        factor.diagonal().add_(damping * mean)
        lower = factor.mT  # H is symmetric, and LAPACK works in place on columns
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            return factor, damping
    raise NotPositive


@dataclass(frozen=True)
class _Steps:
    """Of some rows of a weight: step and zero point, float32 [lines, rows], of which a line serves `width` inputs."""

    grid: Grid
    step: Tensor
    offset: Tensor | None
    width: int

    @classmethod
    def of(cls, scale: Tensor, zero: Tensor | None, grid: Grid, rows: slice, shape: tuple[int, int]) -> _Steps:
        """rows: of a weight of that shape."""

        def lines(per_scale: Tensor) -> Tensor:
            if grid.strategy is Strategy.TENSOR:
                per_scale = per_scale.expand(shape[0], 1)
            elif grid.strategy is Strategy.BLOCK:
                per_scale = per_scale.repeat_interleave(height, 0)
            return per_scale[rows].float().T.contiguous()

        height, width = grid.block or (1, grid.group_size or shape[1])
        return cls(grid, lines(scale), None if zero is None else lines(zero), width)

    def at(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of these inputs: [columns, rows]."""
        line = columns // self.width
        return self.step[line], None if self.offset is None else self.offset[line]


@dataclass(frozen=True)
class _Made:
    """Of some rows. codes, latent: [rows, in], in the original order. lost: of the damped Hessian. squares: of errors."""

    codes: Tensor
    lost: Tensor
    squares: Tensor
    latent: Tensor | None


def _solve(weight: Tensor, factor: Tensor, order: Tensor, steps: _Steps, loops: Loops, keep_latent: bool) -> _Made:
    """Some rows of a weight: its columns are rows here, [in, rows], in that order, and visited from the last on."""
    columns, diagonal = weight.index_select(1, order).T.float().contiguous(), factor.diagonal()
    kind = torch.float8_e4m3fn if steps.grid.kind is Kind.FLOAT else torch.int8
    codes = torch.empty(columns.shape, dtype=kind, device=weight.device)
    errors = torch.empty(columns.shape, dtype=loops.feedback, device=weight.device)
    latent = torch.empty(columns.shape, dtype=torch.float16, device=weight.device) if keep_latent else None
    lost, squares = columns.new_zeros(len(weight)), columns.new_zeros(len(weight))
    for stop in range(len(order), 0, -_BLOCK):
        block = slice(max(0, stop - _BLOCK), stop)
        left, (step, offset) = columns[block].clone(), steps.at(order[block])
        if stop < len(order):
            left += (factor[block, stop:] / diagonal[block, None]).to(loops.feedback) @ errors[stop:]
        rounded, own, block_lost = loops.repair(left, columns[block], factor[block, block], step, offset, steps.grid)
        errors[block] = own
        codes.view(torch.int8)[order[block]] = rounded.view(torch.int8)
        lost += block_lost
        squares += own.square_().sum(0)
        if latent is not None:
            u = left / step if offset is None else left / step + offset
            latent[order[block]] = u.clamp(-_FARTHEST, _FARTHEST).half()
    return _Made(codes.T.contiguous(), lost, squares, None if latent is None else latent.T.contiguous())


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    loops: Loops = PLAIN,
    dampings: tuple[float, ...] = DAMPING,
    keep_latent: bool = False,
) -> Solved:
    """Quantize weight [out, in], a float, under hessian [in, in], any multiple of the mean of x x^T (float32, symmetric).

    A feature that calibration never excited has a zero row in H: it is rounded to nearest and repairs nothing.
    loops: who searches scales and rounds a block of columns. dampings: tried in order, of mean(diag H). keep_latent: also
    return what was rounded, from which rounding can be learned. Raises NotPositive when none of the dampings makes H
    invertible.
    """
    importance = hessian.diagonal()
    # Without some importance a feature that was never seen would be free to lose, and its group's range the first tried.
    costs = torch.where(importance > 0, importance, DAMPING[0] * importance.mean())
    scale, zero = search_scale(weight, grid, costs, loops)
    order = importance.argsort(descending=True, stable=True).flip(0)
    factor, damping = _factor(hessian, order, dampings)
    shape, at_once = (weight.shape[0], weight.shape[1]), _ROWS[weight.is_cuda]
    cuts = [slice(start, start + at_once) for start in range(0, shape[0], at_once)]
    pieces = [
        _solve(weight[rows], factor, order, _Steps.of(scale, zero, grid, rows, shape), loops, keep_latent) for rows in cuts
    ]
    quantized = QuantizedTensor(torch.cat([one.codes for one in pieces]), scale, zero, grid)
    lost = torch.cat([one.lost for one in pieces])
    lost -= damping * importance.mean() * torch.cat([one.squares for one in pieces])
    latent = torch.cat([one.latent for one in pieces if one.latent is not None]) if keep_latent else None
    return Solved(quantized, damping, lost.clamp_(min=0), latent)
