"""Losses that only show far into a context: perplexity by position, and recall of something said early.

Long windows run through the cache in pieces, so that memory is that of one piece and the cache.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.evals.divergence import Interval, Resampler, TokenScores, chunks, score
from quantkit.evals.schema import Context, ContextBucket, Figure, Needle
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.forward import forward
from quantkit.runtime import Model

__all__ = ["buckets", "figure", "long_context"]

_PIECE_TOKENS = 2048
_DEPTHS = (0.1, 0.5, 0.9)
_NEEDLE = 4  # tokens, of which the first is the cue
_SHORTEST = 64


def figure(value: float, interval: Interval | None) -> Figure:
    low, high = interval or (None, None)
    return Figure(value=value, low=low, high=high)


def buckets(scores: TokenScores) -> list[ContextBucket]:
    """By position in the window, edges at 0, 32, 64, 128, ... Empty ones are left out."""
    top, edges = int(scores.position.max()) + 1, [0, 32]
    while edges[-1] < top:
        edges.append(2 * edges[-1])
    found = []
    for start, stop in zip(edges, edges[1:], strict=False):
        part = scores.where((scores.position >= start) & (scores.position < stop))
        if len(part):
            base, quant = (float(np.exp(min(x.mean(), 700))) for x in (part.nll_baseline, part.nll_quantized))
            found.append(
                ContextBucket(
                    start=start,
                    stop=min(stop, top),
                    tokens=len(part),
                    perplexity_baseline=base,
                    perplexity_quantized=quant,
                    kl=float(part.kl.mean()),
                )
            )
    return found


@torch.inference_mode()
def long_context(models: list[Model], ids: Tensor, kv: KVFormat) -> Context:
    """ids: int64 [windows, length]. The quantised model keeps K and V in `kv`, the baseline in float32."""
    scores = _by_position(models, ids, kv)
    sample = Resampler(scores.unit)
    far = scores.where(scores.position >= ids.shape[1] // 2)
    late = Resampler(far.unit)
    ratio = float(np.exp(min((far.nll_quantized - far.nll_baseline).mean(), 700)))
    resampled = np.exp(np.minimum(late.means(far.nll_quantized - far.nll_baseline), 700))
    return Context(
        length=ids.shape[1],
        windows=sample.units,
        kv_cache=kv.value,
        positions=buckets(scores),
        last_ratio=figure(ratio, late.interval(resampled)),
        needles=[_needle(models, ids, depth, kv) for depth in _DEPTHS] if ids.shape[1] >= _SHORTEST else [],
    )


def _by_position(models: list[Model], ids: Tensor, kv: KVFormat) -> TokenScores:
    windows, length = ids.shape
    caches = [Cache(), Cache(kv)]
    parts: list[TokenScores] = []
    step = max(1, _PIECE_TOKENS // windows)
    for start in range(0, length - 1, step):
        piece = ids[:, start : min(start + step, length - 1)]
        hidden = [_hidden(model, piece, cache) for model, cache in zip(models, caches, strict=True)]
        targets = ids[:, start + 1 : start + 1 + piece.shape[1]].to(hidden[0].device)
        at = np.broadcast_to(np.arange(start, start + piece.shape[1]), piece.shape).flatten()
        unit = np.repeat(np.arange(windows), piece.shape[1])
        for part in chunks(piece.numel(), models[0].spec.vocab):
            base, quant = (model.head(h.flatten(0, 1)[part]) for model, h in zip(models, hidden, strict=True))
            found = score(base, quant, targets.flatten()[part])
            parts.append(TokenScores.of([found], np.ones(len(found.kl)), unit[part], at[part]))
    scores = TokenScores.join(parts)
    return scores.where(np.isfinite(scores.kl))


def _hidden(model: Model, ids: Tensor, cache: Cache) -> Tensor:
    hidden = torch.empty(0)
    for trace in forward(model.spec, model.weights, ids.to(model.device), cache):
        hidden = trace.hidden
    return hidden


def _rare(ids: Tensor, vocab: int, count: int) -> Tensor:
    """int64 [count]: of the ids that the text uses, those it uses least, in an order that a seed decides."""
    counts = torch.bincount(ids.flatten(), minlength=vocab)
    used = counts.nonzero().flatten()
    least = used[counts[used].argsort(stable=True)][: 4 * count]
    chosen = least[torch.randperm(len(least), generator=torch.Generator().manual_seed(0))]
    return chosen.repeat(-(-count // len(chosen)))[:count]


def _needle(models: list[Model], ids: Tensor, depth: float, kv: KVFormat) -> Needle:
    """Plant rare tokens a b c d at `depth` of each window, end it with a b c, and read the probability of b, c, d after
    a, a b, a b c: what an induction head recalls, and a damaged cache forgets."""
    windows, length = ids.shape
    needles = _rare(ids, models[0].spec.vocab, windows * _NEEDLE).view(windows, _NEEDLE)
    at = int(depth * (length - 3 * _NEEDLE))
    text = torch.cat((ids[:, :at], needles, ids[:, at:]), dim=1)[:, : length - _NEEDLE + 1]
    planted, bare = (torch.cat((x[:, : length - _NEEDLE + 1], needles[:, :-1]), dim=1) for x in (text, ids))
    right, hits = zip(
        *(_recall(m, planted, needles[:, 1:], how) for m, how in zip(models, (KVFormat.FLOAT32, kv), strict=True)),
        strict=True,
    )
    return Needle(
        depth=depth,
        n=windows,
        baseline_without=float(_recall(models[0], bare, needles[:, 1:], KVFormat.FLOAT32)[0].mean()),
        baseline=float(right[0].mean()),
        quantized=float(right[1].mean()),
        baseline_hits=float(hits[0].mean()),
        quantized_hits=float(hits[1].mean()),
    )


def _recall(model: Model, ids: Tensor, wanted: Tensor, kv: KVFormat) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probability of `wanted` [n, k] after the last k positions of ids, and whether it is the likeliest; [n, k] each. A
    probability that is not finite counts as 0."""
    cache, last = Cache(kv), wanted.shape[1]
    tail: list[Tensor] = []
    for piece in ids.split(max(last, _PIECE_TOKENS // len(ids)), dim=1):
        tail = [*tail[-1:], _hidden(model, piece, cache)[:, -last:]]
    logits = model.head(torch.cat(tail, dim=1)[:, -last:])
    wanted = wanted.to(logits.device)
    p = logits.double().softmax(-1).gather(-1, wanted[..., None])[..., 0].nan_to_num(nan=0.0)
    return p.cpu().numpy(), (logits.argmax(-1) == wanted).double().cpu().numpy()
