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

__all__ = ["Outcome", "rtn", "solve"]


@dataclass(frozen=True)
class Outcome:
    """What happened to one weight; goes into run.json.

    weight_error: of `stats.weight_error`.

    method: what was really used. fallback: why it is not what was asked for, or that damping had to be raised ('' if
    neither). error: ||(W - Q) x||^2 / ||W x||^2 over the calibration tokens, or over the plain weights without any.
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


def _output_error(weight: Tensor, value: Tensor, hessian: Tensor) -> float:
    difference = weight - value
    lost = (difference @ hessian * difference).sum()
    return float(lost / (weight @ hessian * weight).sum().clamp(min=1e-30))


def _one(
    weight: Tensor, scheme: Scheme, method: Method, stats: LinearStats | None, how: Repair
) -> tuple[QuantizedTensor, str, str]:
    """(quantised, method used, fallback)."""
    if not method.hessian:
        return rtn(weight, scheme), "rtn", ""
    hessian = stats.mean_hessian() if stats is not None else None
    if hessian is None:
        return rtn(weight, scheme), "rtn", "no calibration token reached this weight"
    try:
        solved = gptq(weight, hessian, scheme.weight, how, method.dampings)
    except NotPositive:
        return rtn(weight, scheme), "rtn", "Hessian not positive definite under any damping"
    raised = f"damping raised to {solved.damping}" if solved.damping > method.damping else ""
    return solved.quantized, "gptq", raised


def _with_input_scale(quantized: QuantizedTensor, scheme: Scheme, stats: LinearStats | None) -> QuantizedTensor:
    if not scheme.static:
        return quantized
    amax = (stats.amax or stats.lent_amax if stats is not None else 0.0) or scheme.weight.qmax
    scale = torch.tensor([amax / scheme.weight.qmax]).bfloat16()
    return QuantizedTensor(quantized.codes, quantized.scale, quantized.zero, quantized.grid, input_scale=scale)


def solve(
    weights: list[Tensor], scheme: Scheme, method: Method, stats: LinearStats | None, how: Repair = repair
) -> list[tuple[QuantizedTensor, Outcome]]:
    """Quantise float32 weights [out_i, in] that read the same input (q, k, v; or gate and up).

    They are stacked, as engines stack them: one solve serves all, and a per-tensor scale is shared, which an engine
    that fuses them would otherwise force upon them by requantising. Blocks are cut per weight. how: see `gptq`'s repair.
    """
    if scheme.weight.strategy is Strategy.BLOCK and len(weights) > 1:
        return [result for weight in weights for result in solve([weight], scheme, method, stats, how)]
    stacked, used, fallback = _one(torch.cat(weights), scheme, method, stats, how)
    hessian = stats.mean_hessian() if stats is not None else None
    if hessian is not None and not hessian.isfinite().all():
        hessian = None
    if scheme.static and (stats is None or not stats.tokens):
        fallback = "; ".join(filter(None, (fallback, "input scale not from tokens routed here")))
    results = []
    sizes = [len(weight) for weight in weights]
    for weight, part in zip(weights, _split(stacked, sizes), strict=True):
        value = part.dequantize()
        lost = weight_error(weight, value)
        outcome = Outcome(
            method=used,
            fallback=fallback,
            error=lost**2 if hessian is None else _output_error(weight, value, hessian),
            coverage=None if stats is None else round(stats.coverage, 4),
            lent=0 if stats is None else stats.lent,
            weight_error=lost,
        )
        results.append((_with_input_scale(part, scheme, stats), outcome))
    return results


def _split(stacked: QuantizedTensor, sizes: list[int]) -> list[QuantizedTensor]:
    if len(sizes) == 1:
        return [stacked]
    whole = stacked.grid.strategy is Strategy.TENSOR
    scales = [stacked.scale] * len(sizes) if whole else list(stacked.scale.split(sizes))
    zeros = [None] * len(sizes) if stacked.zero is None else list(stacked.zero.split(sizes))
    parts = zip(stacked.codes.split(sizes), scales, zeros, strict=True)
    return [QuantizedTensor(c.contiguous(), s.contiguous(), z, stacked.grid) for c, s, z in parts]
