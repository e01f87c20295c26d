"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, and let the columns to come repair each error.

With H the mean of x x^T at the layer's input and U the upper Cholesky factor of H^-1, rounding column i leaves
e = (w_i - q_i) / U_ii, and the best repair of the rest is W[:, i:] -= e U[i, i:] (their Algorithm 1). Columns are visited
by falling diag(H), while scales belong to the original order ("static groups"), so the file needs no permutation.
Scales are searched before, weighted by diag(H), since the repair cannot undo a scale that is too wide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor, expand
from quantkit.quant.grid import encode, search_scale
from quantkit.quant.method import DAMPING
from quantkit.scheme import Grid, Kind

__all__ = ["DAMPING", "NotPositive", "Repair", "gptq", "repair"]

Repair = Callable[..., Tensor]  # of `repair`'s arguments
_FARTHEST = torch.finfo(torch.float16).max  # of a latent
_BLOCK = 128  # columns repaired at once; only speed depends on it, and a kernel takes no more


class NotPositive(Exception):
    """The Hessian is not positive definite under any damping, so there is nothing to solve."""


@dataclass(frozen=True)
class Solved:
    """latent: float16 [out, in], what was rounded to each code: the repaired weight over its scale, plus the zero point.
    None unless it was asked for."""

    quantized: QuantizedTensor
    damping: float
    latent: Tensor | None = None


def _inverse_factor(hessian: Tensor, dampings: tuple[float, ...]) -> tuple[Tensor, float]:
    """Upper U with U^T U = (H + damping)^-1, and the first of dampings for which there is one. Raises NotPositive."""
    mean = hessian.diagonal().mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise NotPositive
    for damping in dampings:
        damped = hessian + torch.diag((damping * mean).expand(len(hessian)))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper, damping
    raise NotPositive


def repair(
    W: Tensor, U: Tensor, step: Tensor, offset: Tensor | None, Q: Tensor, start: int, stop: int, grid: Grid
) -> Tensor:
    """Rounds columns start to stop of W into Q, the block's later ones repaired; their errors [out, stop - start]."""
    errors = torch.zeros(W.shape[0], stop - start, device=W.device)
    for i in range(start, stop):
        s, z = step[:, i], None if offset is None else offset[:, i]
        Q[:, i] = encode(W[:, i], s, z, grid)
        value = Q[:, i].float() * s if z is None else (Q[:, i].float() - z) * s
        e = (W[:, i] - value) / U[i, i]
        W[:, i:stop] -= e[:, None] * U[i, None, i:stop]
        errors[:, i - start] = e
    return errors


def gptq(
    weight: Tensor,
    hessian: Tensor,
    grid: Grid,
    repair: Repair = repair,
    dampings: tuple[float, ...] = DAMPING,
    keep_latent: bool = False,
) -> Solved:
    """Quantize float32 weight [out, in] under hessian [in, in] = mean of x x^T (float32, symmetric).

    A feature that calibration never excited has a zero row in H: it is rounded to nearest and repairs nothing.
    repair: how a block of columns is rounded; a kernel may do the same. dampings: tried in order, of mean(diag H).
    keep_latent: also return what was rounded, from which rounding can be learned. Raises NotPositive when none of the
    dampings makes H invertible.
    """
    importance = hessian.diagonal()
    # Without some importance a feature that was never seen would be free to lose, and its group's range the first tried.
    scale, zero = search_scale(weight, grid, torch.where(importance > 0, importance, DAMPING[0] * importance.mean()))
    shape = (weight.shape[0], weight.shape[1])
    order = importance.argsort(descending=True, stable=True)
    U, damping = _inverse_factor(hessian[order][:, order], dampings)
    W = weight[:, order].clone()
    step = expand(scale.float(), grid, shape).expand(shape)[:, order]
    offset = None if zero is None else expand(zero.float(), grid, shape).expand(shape)[:, order]
    latent = torch.empty(shape, dtype=torch.float16, device=weight.device) if keep_latent else None
    Q = torch.empty(shape, dtype=torch.float8_e4m3fn if grid.kind is Kind.FLOAT else torch.int8, device=weight.device)
    for start in range(0, shape[1], _BLOCK):
        stop = min(start + _BLOCK, shape[1])
        errors = repair(W, U, step, offset, Q, start, stop, grid)
        W[:, stop:] -= errors @ U[start:stop, stop:]
        if latent is not None:
            u = Q[:, start:stop].float() + errors * U.diagonal()[start:stop] / step[:, start:stop]
            latent[:, order[start:stop]] = u.clamp(-_FARTHEST, _FARTHEST).half()
    codes = torch.empty_like(Q)
    codes.view(torch.int8)[:, order] = Q.view(torch.int8)
    return Solved(QuantizedTensor(codes, scale, zero, grid), damping, latent)
