"""From a weight, its scheme and what calibration saw to codes, and a record of what was really done."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.quant.gptq import NotPositive, gptq
from quantkit.quant.loops import PLAIN, Loops
from quantkit.quant.method import Method
from quantkit.quant.rounding import Rounding, by_rows, rtn
from quantkit.scheme import Scheme, Strategy
from quantkit.stats import LinearStats, weight_error

__all__ = ["Outcome", "Solution", "solutions", "solve"]

_ROWS = 1024  # of a weight multiplied by the Hessian at once
_SAMPLE = 128  # rows that stand for all
_STANDARD_ERRORS = 4


@dataclass(frozen=True)
class Outcome:
    """What happened to one weight; goes into run.json.

    weight_error: of `stats.weight_error`.

    method: what was really used. fallback: why it is not what was asked for, or that damping had to be raised ('' if
    neither). GPTQ is not used where rounding loses less, in sum over the weights that are solved together. error:
    ||(W - Q) x||^2 / ||W x||^2 over the calibration tokens, or over the plain weights without any; of GPTQ the numerator is
    the solve's own, and of more than 128 rows 128 stand for all in the denominator.
    coverage: routed calibration tokens per input feature, None without calibration. lent: tokens lent, see LinearStats.
    """

    method: str
    fallback: str
    error: float
    coverage: float | None
    lent: int
    weight_error: float


@dataclass(frozen=True)
class _Solved:
    """lost: e H e^T of each row's error e, [out]; None without a Hessian that is finite. latent: of `gptq`."""

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


def _one(weight: Tensor, scheme: Scheme, method: Method, hessian: Tensor | None, loops: Loops) -> _Solved:
    """By the method, or by rounding where it cannot do better: repairing column by column is greedy, and a repaired weight
    may lie beyond the range that its scale was made for, so that with few rows rounding sometimes loses less."""
    if not method.hessian:
        return _Solved(rtn(weight, scheme), "rtn", "", None)
    if hessian is None:
        return _Solved(rtn(weight, scheme), "rtn", "no calibration token reached this weight", None)
    try:
        solved = gptq(weight, hessian, scheme.weight, loops, method.dampings, keep_latent=method.name == "learned")
    except NotPositive:
        rounded = rtn(weight, scheme)
        finite = bool(hessian.diagonal().isfinite().all())  # bounds all of it, by Cauchy and Schwarz
        lost = _lost(weight, rounded, hessian) if finite else None
        return _Solved(rounded, "rtn", "Hessian not positive definite under any damping", lost)
    lost = solved.lost
    if not _surely_better(weight, scheme, hessian, lost):
        rounded = rtn(weight, scheme)
        lost, by_rounding = (_lost(weight, q, hessian) for q in (solved.quantized, rounded))
        if by_rounding.sum() < lost.sum():
            return _Solved(rounded, "rtn", "rounding loses less than GPTQ here", by_rounding)
    raised = f"damping raised to {solved.damping}" if solved.damping > method.damping else ""
    return _Solved(solved.quantized, "gptq", raised, lost, solved.latent)


def _lost(weight: Tensor, quantized: QuantizedTensor, hessian: Tensor) -> Tensor:
    """e H e^T of each row's error e, float32 [out], by a product of 2 out in^2."""
    difference = weight.float() - quantized.dequantize()
    return torch.cat([_by_row(rows, hessian) for rows in difference.split(_ROWS)])


def _by_row(rows: Tensor, hessian: Tensor) -> Tensor:
    """m H m^T of each row m of a float [n, in]: what it does to the output, float32 [n]."""
    rows = rows.float()
    return (rows @ hessian * rows).sum(1)


def _surely_better(weight: Tensor, scheme: Scheme, hessian: Tensor, lost: Tensor) -> bool:
    """Whether GPTQ, which has lost this much of each row, loses less than rounding beyond doubt: in a sample of the rows the
    mean of the difference is far more than its standard error. What a sample cannot tell apart differs little."""
    sample = _sample(len(weight), weight.device)
    if len(sample) == len(weight) or scheme.weight.strategy not in (Strategy.GROUP, Strategy.CHANNEL):
        return False  # few rows, or scales that are not a row's own: it is looked at whole
    rows = weight[sample].float()
    gain = _by_row(rows - rtn(rows, scheme).dequantize(), hessian) - lost[sample]
    return bool(gain.mean() > _STANDARD_ERRORS * gain.std() / math.sqrt(len(sample)))


def _sample(count: int, device: torch.device) -> Tensor:
    """At most _SAMPLE of so many rows, evenly: int64."""
    return torch.arange(0, count, -(-count // _SAMPLE), device=device)


def _relative(lost: Tensor, weight: Tensor, hessian: Tensor) -> float:
    """What was lost of the output, of which a sample of the rows says how large it is."""
    whole = _by_row(weight[_sample(len(weight), weight.device)], hessian)
    return float(lost.mean() / whole.mean().clamp(min=1e-30))


def _with_input_scale(quantized: QuantizedTensor, scheme: Scheme, stats: LinearStats | None) -> QuantizedTensor:
    if not scheme.static:
        return quantized
    amax = (stats.amax or stats.lent_amax if stats is not None else 0.0) or scheme.weight.qmax
    scale = torch.tensor([amax / scheme.weight.qmax]).bfloat16()
    return QuantizedTensor(quantized.codes, quantized.scale, quantized.zero, quantized.grid, input_scale=scale)


def solve(
    weights: list[Tensor], scheme: Scheme, method: Method, stats: LinearStats | None, loops: Loops = PLAIN
) -> list[tuple[QuantizedTensor, Outcome]]:
    """As `solutions`, without what only learning needs."""
    return [(one.quantized, one.outcome) for one in solutions(weights, scheme, method, stats, loops)]


def solutions(
    weights: list[Tensor], scheme: Scheme, method: Method, stats: LinearStats | None, loops: Loops = PLAIN
) -> list[Solution]:
    """Quantize weights [out_i, in], floats, that read the same input (q, k, v; or gate and up).

    They are stacked, as engines stack them: one solve serves all, and a per-tensor scale is shared, which an engine
    that fuses them would otherwise force upon them by requantizing. Blocks are cut per weight. loops: who runs them.
    """
    if scheme.weight.strategy is Strategy.BLOCK and len(weights) > 1:
        return [result for weight in weights for result in solutions([weight], scheme, method, stats, loops)]
    if not method.hessian and by_rows(scheme):
        return [_rounded(weight, scheme, stats) for weight in weights]
    hessian = stats.whole_hessian() if stats is not None else None
    solved = _one(torch.cat(weights), scheme, method, hessian, loops)
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


def _rounded(weight: Tensor, scheme: Scheme, stats: LinearStats | None) -> Solution:
    """To nearest, where no row needs another."""
    rounding = Rounding(scheme, weight.shape[1])
    quantized = rounding.whole(weight)
    fallback = "input scale not from tokens routed here" if scheme.static and (stats is None or not stats.tokens) else ""
    coverage, lent = (None, 0) if stats is None else (round(stats.coverage, 4), stats.lent)
    outcome = Outcome("rtn", fallback, rounding.error**2, coverage, lent, rounding.error)
    return Solution(_with_input_scale(quantized, scheme, stats), outcome)


def _split(stacked: QuantizedTensor, sizes: list[int]) -> list[QuantizedTensor]:
    if len(sizes) == 1:
        return [stacked]
    whole = stacked.grid.strategy is Strategy.TENSOR
    scales = [stacked.scale] * len(sizes) if whole else list(stacked.scale.split(sizes))
    zeros = [None] * len(sizes) if stacked.zero is None else list(stacked.zero.split(sizes))
    parts = zip(stacked.codes.split(sizes), scales, zeros, strict=True)
    return [QuantizedTensor(c.contiguous(), s.contiguous(), z, stacked.grid) for c, s, z in parts]
