"""How far two next-token distributions lie apart, token by token, and how sure one can be of the averages."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["TokenScores", "bootstrap", "chunks", "relative_error", "same_choices", "score", "summary"]

_QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TokenScores:
    """One value per scored token, all [n]: KL in nats, both negative log-likelihoods in nats, whether top-1 agrees, the
    share of router choices that did not change (mean over layers), and the unit (document) that the token is from."""

    kl: Floats
    nll_baseline: Floats
    nll_quantized: Floats
    same_top1: Floats
    same_router: Floats
    unit: NDArray[np.int64]


def score(baseline: Tensor, quantized: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """KL(baseline || quantized), nll of both, and top-1 equality, each float64 [n], from float32 logits [n, vocab].

    KL = sum_v p_v (log p_v - log q_v), over the whole vocabulary, in float64, so that equal logits give exactly 0.
    """
    p, q = baseline.double().log_softmax(-1), quantized.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1)
    nll = [-x.gather(-1, targets[:, None])[:, 0] for x in (p, q)]
    return kl, nll[0], nll[1], (p.argmax(-1) == q.argmax(-1)).double()


def summary(scores: TokenScores) -> dict[str, object]:
    """The report's figures, under the JSON keys that `quantkit eval` documents."""
    base, quant = scores.nll_baseline.mean(), scores.nll_quantized.mean()
    kl = {name: float(np.quantile(scores.kl, q)) for name, q in _QUANTILES.items()}
    return {
        "perplexity": {"baseline": math.exp(base), "quantized": math.exp(quant), "ratio": math.exp(quant - base)},
        "kl": {"mean": float(scores.kl.mean()), **kl, "max": float(scores.kl.max())},
        "top1_agreement": float(scores.same_top1.mean()),
        "router_agreement": float(scores.same_router.mean()),
    }


def bootstrap(scores: TokenScores, resamples: int = 2000, seed: int = 0) -> dict[str, list[float]]:
    """95 % confidence intervals: units are resampled whole and jointly for both models (paired, clustered).

    Tokens of one document are not independent, so resampling tokens would promise too much.
    """
    units, member = np.unique(scores.unit, return_inverse=True)
    drawn = np.random.default_rng(seed).multinomial(len(units), np.full(len(units), 1 / len(units)), size=resamples)

    def means(values: Floats) -> Floats:
        sums = np.bincount(member, weights=values, minlength=len(units))
        sizes = np.bincount(member, minlength=len(units))
        return np.asarray((drawn @ sums) / (drawn @ sizes))

    def interval(values: Floats) -> list[float]:
        return [float(v) for v in np.quantile(values, (0.025, 0.975))]

    base, quant = means(scores.nll_baseline), means(scores.nll_quantized)
    return {
        "perplexity.baseline": interval(np.exp(base)),
        "perplexity.quantized": interval(np.exp(quant)),
        "perplexity.ratio": interval(np.exp(quant - base)),
        "kl.mean": interval(means(scores.kl)),
        "kl.p99": interval(_resampled_quantile(scores.kl, member, drawn, 0.99)),
        "top1_agreement": interval(means(scores.same_top1)),
        "router_agreement": interval(means(scores.same_router)),
    }


def _resampled_quantile(values: Floats, member: NDArray[np.int64], drawn: NDArray[np.int64], q: float) -> Floats:
    """The quantile of each resample: the value at which the drawn tokens' cumulative count passes q."""
    order = np.argsort(values)
    result = np.empty(len(drawn))
    for i, counts in enumerate(drawn):
        cumulative = np.cumsum(counts[member[order]])
        result[i] = values[order[np.searchsorted(cumulative, q * cumulative[-1])]]
    return result


def chunks(rows: int, vocab: int) -> list[slice]:
    """Slices of rows such that float64 logits of one slice stay below 128 MB."""
    step = max(1, 16_000_000 // vocab)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def same_choices(a: Tensor, b: Tensor) -> Tensor:
    """Share of the k experts in a that are also in b, whatever the order: int64 [n, k] twice -> float64 [n]."""
    return (a[:, :, None] == b[:, None, :]).any(-1).double().mean(-1)


def relative_error(reference: Tensor, other: Tensor) -> tuple[float, float]:
    """(sum of squared differences, sum of squares of the reference), to be added up over batches."""
    difference = torch.sub(other, reference).double().square().sum()
    return float(difference), float(reference.double().square().sum())
