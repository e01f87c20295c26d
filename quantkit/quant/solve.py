"""From a weight, its scheme and what calibration saw to codes, and a record of what was really done."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor, expand
from quantkit.quant.gptq import NotPositive, Repair, gptq, repair
from quantkit.quant.grid import encode, minmax_scale
from quantkit.quant.method import Method
from quantkit.scheme import Scheme, Strategy
from quantkit.stats import LinearStats, weight_error

__all__ = ["Outcome", "Solution", "rtn", "solutions", "solve"]


@dataclass(frozen=True)
class Outcome:
    """What happened to one weight; goes into run.json.

    weight_error: of `stats.weight_error`.

    method: what was really used. fallback: why it is not what was asked for, or that damping had to be raised ('' if
    neither). GPTQ is not used where rounding loses less, in sum over the weights that are solved together. error:
    ||(W - Q) x||^2 / ||W x||^2 over the calibration tokens, or over the plain weights without any.
    coverage: routed calibration tokens per input feature, None without calibration. lent: tokens lent, see LinearStats.
    """

    method: str
    fallback: str
    error: float
    coverage: float | None
    lent: int
    weight_error: float


def rtn(weight: Tensor, scheme: Scheme) -> QuantizedTensor:
    """Round float32 weight [out, in] to the nearest code under min-max scales."""
    grid, shape = scheme.weight, (weight.shape[0], weight.shape[1])
    scale, zero = minmax_scale(weight, grid)
    step = expand(scale.float(), grid, shape)
    offset = None if zero is None else expand(zero.float(), grid, shape)
    return QuantizedTensor(encode(weight, step, offset, grid), scale, zero, grid)


def _by_row(matrix: Tensor, hessian: Tensor) -> Tensor:
    """m H m^T of each row m of a matrix [out, in]: what it does to the output, [out]."""
    return (matrix @ hessian * matrix).sum(1)


def _relative(lost: Tensor, weight: Tensor, hessian: Tensor) -> float:
    return float(lost.sum() / _by_row(weight, hessian).sum().clamp(min=1e-30))


@dataclass(frozen=True)
class _Solved:
    """lost: `_by_row` of what was lost, [out]; None without a Hessian that is finite. latent: of `gptq`."""

    quantized: QuantizedTensor
    method: str
    fallback: str
    lost: Tensor | None
    latent: Tensor | None = None


@dataclass(frozen=True)
class Solution:
    """Of one weight. latent: what was rounded to its codes (see `gptq`), where rounding is learned from there."""

    quantized: QuantizedTensor
    outcome: Outcome
    latent: Tensor | None = None


def _one(weight: Tensor, scheme: Scheme, method: Method, hessian: Tensor | None, how: Repair) -> _Solved:
    """By the method, or by rounding where it cannot do better: repairing column by column is greedy, and a repaired weight
    may lie beyond the range that its scale was made for, so that with few rows rounding sometimes loses less."""
    lost = None
    if hessian is not None and hessian.isfinite().all():
        lost = _by_row(weight - rtn(weight, scheme).dequantize(), hessian)
    if not method.hessian:
        return _Solved(rtn(weight, scheme), "rtn", "", lost)
    if hessian is None:
        return _Solved(rtn(weight, scheme), "rtn", "no calibration token reached this weight", None)
    try:
        solved = gptq(weight, hessian, scheme.weight, how, method.dampings, keep_latent=method.name == "learned")
    except NotPositive:
        return _Solved(rtn(weight, scheme), "rtn", "Hessian not positive definite under any damping", lost)
    repaired = _by_row(weight - solved.quantized.dequantize(), hessian)
    if lost is not None and lost.sum() < repaired.sum():
        return _Solved(rtn(weight, scheme), "rtn", "rounding loses less than GPTQ here", lost)
    raised = f"damping raised to {solved.damping}" if solved.damping > method.damping else ""
    return _Solved(solved.quantized, "gptq", raised, repaired, solved.latent)


def _with_input_scale(quantized: QuantizedTensor, scheme: Scheme, stats: LinearStats | None) -> QuantizedTensor:
    if not scheme.static:
        return quantized
    amax = (stats.amax or stats.lent_amax if stats is not None else 0.0) or scheme.weight.qmax
    scale = torch.tensor([amax / scheme.weight.qmax]).bfloat16()
    return QuantizedTensor(quantized.codes, quantized.scale, quantized.zero, quantized.grid, input_scale=scale)


def solve(
    weights: list[Tensor], scheme: Scheme, method: Method, stats: LinearStats | None, how: Repair = repair
) -> list[tuple[QuantizedTensor, Outcome]]:
    """As `solutions`, without what only learning needs."""
    return [(one.quantized, one.outcome) for one in solutions(weights, scheme, method, stats, how)]


def solutions(
    weights: list[Tensor], scheme: Scheme, method: Method, stats: LinearStats | None, how: Repair = repair
) -> list[Solution]:
    """Quantize float32 weights [out_i, in] that read the same input (q, k, v; or gate and up).

    They are stacked, as engines stack them: one solve serves all, and a per-tensor scale is shared, which an engine
    that fuses them would otherwise force upon them by requantizing. Blocks are cut per weight. how: see `gptq`'s repair.
    """
    if scheme.weight.strategy is Strategy.BLOCK and len(weights) > 1:
        return [result for weight in weights for result in solutions([weight], scheme, method, stats, how)]
    hessian = stats.mean_hessian() if stats is not None else None
    solved = _one(torch.cat(weights), scheme, method, hessian, how)
    fallback = solved.fallback
    if scheme.static and (stats is None or not stats.tokens):
        fallback = "; ".join(filter(None, (fallback, "input scale not from tokens routed here")))
    results = []
    sizes = [len(weight) for weight in weights]
    losses = [None] * len(sizes) if solved.lost is None else list(solved.lost.split(sizes))
    latents = [None] * len(sizes) if solved.latent is None else list(solved.latent.split(sizes))
    for weight, part, lost, latent in zip(weights, _split(solved.quantized, sizes), losses, latents, strict=True):
        own = weight_error(weight, part.dequantize())
        outcome = Outcome(
            method=solved.method,
            fallback=fallback,
            error=own**2 if lost is None or hessian is None else _relative(lost, weight, hessian),
            coverage=None if stats is None else round(stats.coverage, 4),
            lent=0 if stats is None else stats.lent,
            weight_error=own,
        )
        results.append(Solution(_with_input_scale(part, scheme, stats), outcome, latent))
    return results


def _split(stacked: QuantizedTensor, sizes: list[int]) -> list[QuantizedTensor]:
    if len(sizes) == 1:
        return [stacked]
    whole = stacked.grid.strategy is Strategy.TENSOR
    scales = [stacked.scale] * len(sizes) if whole else list(stacked.scale.split(sizes))
    zeros = [None] * len(sizes) if stacked.zero is None else list(stacked.zero.split(sizes))
    parts = zip(stacked.codes.split(sizes), scales, zeros, strict=True)
    return [QuantizedTensor(c.contiguous(), s.contiguous(), z, stacked.grid) for c, s, z in parts]
