"""How far two next-token distributions lie apart, token by token, and how sure one can be of the averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.report.intervals import QUANTILES, Floats, Integers, Interval, Resampler, at_least_wilson, tail_needs

__all__ = [
    *("Scored", "TokenScores", "bootstrap", "chunks", "log_ratio_error", "relative_error", "same_choices", "score"),
    "summary",
]

_LARGE = 80.0  # exp of it is finite in float32


@dataclass(frozen=True)
class Scored:
    """One value per token, all float64 [n]: KL and both negative log-likelihoods in nats; whether top-1 agrees, and
    whether each model's top-1 is the token that follows (0 or 1)."""

    kl: Tensor
    nll_baseline: Tensor
    nll_quantized: Tensor
    same_top1: Tensor
    right_baseline: Tensor
    right_quantized: Tensor


@dataclass(frozen=True)
class TokenScores:
    """`Scored` of all tokens as arrays [n], and for each the share of router choices that did not change (mean over
    layers), the unit (document) that the token is from, and its position in its window."""

    kl: Floats
    nll_baseline: Floats
    nll_quantized: Floats
    same_top1: Floats
    right_baseline: Floats
    right_quantized: Floats
    same_router: Floats
    unit: Integers
    position: Integers

    @classmethod
    def join(cls, parts: Sequence[TokenScores]) -> TokenScores:
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    @classmethod
    def of(cls, scored: Sequence[Scored], same_router: Floats, unit: Integers, position: Integers) -> TokenScores:
        """Scored parts in order, and the rest of their tokens' values."""
        columns = {f.name: torch.cat([getattr(s, f.name) for s in scored]).cpu().numpy() for f in fields(Scored)}
        return cls(**columns, same_router=same_router, unit=unit, position=position)

    def where(self, chosen: NDArray[np.bool_]) -> TokenScores:
        return TokenScores(**{f.name: getattr(self, f.name)[chosen] for f in fields(self)})

    def __len__(self) -> int:
        return len(self.kl)


def score(baseline: Tensor, quantized: Tensor, targets: Tensor) -> Scored:
    """Compare float32 logits [n, vocab] of two models over the whole vocabulary; targets int64 [n].

    With d = log q - log p, KL(baseline || quantized) = sum_v p (exp(d) - 1 - d), as p and q sum to 1. Every term is at
    least 0, and an error of log p or log q enters in second order only, so float32 is enough and equal logits give 0. A
    row where exp(d) could overflow is computed in float64. Not finite where a logit is not.
    """
    p, q = baseline.log_softmax(-1), quantized.log_softmax(-1)
    nll = [-x.gather(-1, targets[:, None])[:, 0].double() for x in (p, q)]
    top = [x.argmax(-1) for x in (baseline, quantized)]
    d = q.sub_(p)
    far = d.amax(-1) > _LARGE
    kl = torch.expm1(d).sub_(d).mul_(p.exp_()).sum(-1).double()
    if far.any():
        wide_p, wide_q = (x[far].double().log_softmax(-1) for x in (baseline, quantized))
        kl[far] = (wide_p.exp() * (wide_p - wide_q)).sum(-1)
    right = [(choice == targets).double() for choice in top]
    return Scored(kl, nll[0], nll[1], (top[0] == top[1]).double(), right[0], right[1])


def summary(scores: TokenScores) -> dict[str, Any]:
    """The figures of `evaluate`, under the JSON keys that `quantkit eval` documents."""
    base, quant = scores.nll_baseline.mean(), scores.nll_quantized.mean()
    kl = {name: float(np.quantile(scores.kl, q)) for name, q in QUANTILES.items()}
    return {
        "perplexity": {"baseline": _exp(base), "quantized": _exp(quant), "ratio": _exp(quant - base)},
        "kl": {"mean": float(scores.kl.mean()), **kl, "max": float(scores.kl.max())},
        "top1_agreement": float(scores.same_top1.mean()),
        "router_agreement": float(scores.same_router.mean()),
    }


def _exp(x: float) -> float:
    """exp, where a model so broken that it overflows has the largest perplexity there is."""
    return math.exp(min(x, 700.0))


def bootstrap(scores: TokenScores, resamples: int = 2000, seed: int = 0) -> dict[str, Interval]:
    """95 % confidence intervals of `summary`'s figures and of flips. kl.max has none, as a sample tells nothing of what lies
    beyond its largest, nor has a quantile that needs more tokens."""
    sample = Resampler(scores.unit, resamples, seed)
    base, quant = sample.means(scores.nll_baseline), sample.means(scores.nll_quantized)
    logs = {"perplexity.baseline": base, "perplexity.quantized": quant, "perplexity.ratio": quant - base}
    shares = {
        "top1_agreement": scores.same_top1,
        "router_agreement": scores.same_router,
        "flips.right_to_wrong": scores.right_baseline * (1 - scores.right_quantized),
        "flips.wrong_to_right": scores.right_quantized * (1 - scores.right_baseline),
    }
    told = {name: q for name, q in QUANTILES.items() if len(scores) >= tail_needs(q)}
    quantiles = sample.quantiles(scores.kl, list(told.values()))
    kl = {"kl.mean": sample.means(scores.kl), **{f"kl.{name}": x for name, x in zip(told, quantiles, strict=True)}}
    intervals: dict[str, Interval | None] = {}
    for name, values in logs.items():
        interval = sample.interval(values)
        intervals[name] = (_exp(interval[0]), _exp(interval[1])) if interval else None
    for name, values in shares.items():
        intervals[name] = at_least_wilson(sample.interval(sample.means(values)), values)
    for name, values in kl.items():
        interval = sample.interval(values)
        intervals[name] = (max(0.0, interval[0]), interval[1]) if interval else None
    return {name: interval for name, interval in intervals.items() if interval}


def log_ratio_error(scores: TokenScores) -> float | None:
    """Standard error of ln(perplexity ratio): of the token-weighted mean of paired differences, clustered by unit, so
    that the covariance of the two models is in it. None for one unit."""
    difference = scores.nll_quantized - scores.nll_baseline
    sample = Resampler(scores.unit, resamples=1)
    if sample.units < 2:
        return None
    residual = sample.sums(difference - difference.mean())
    return float(np.sqrt((residual**2).sum() * sample.units / (sample.units - 1)) / len(difference))


def chunks(rows: int, vocab: int) -> list[slice]:
    """Slices of rows such that float32 logits of one slice stay below 32 MB."""
    step = max(1, 8_000_000 // vocab)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def same_choices(a: Tensor, b: Tensor) -> Tensor:
    """Share of the k experts in a that are also in b, whatever the order: int64 [n, k] twice -> float64 [n]."""
    return (a[:, :, None] == b[:, None, :]).any(-1).double().mean(-1)


def relative_error(reference: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """[n] each, float64: squared error of a token's row, and squared length of the reference's; both [n, width]."""
    return torch.sub(other, reference).double().square().sum(-1), reference.double().square().sum(-1)
