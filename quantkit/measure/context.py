"""Losses that only show far into a context: perplexity by position, and recall of something said early.

Long windows run through the cache one after another, in pieces, so that memory is that of one piece and one window's cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.errors import CheckpointError
from quantkit.measure.divergence import TokenScores, chunks, score
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.forward import forward
from quantkit.report.intervals import Resampler, figure, wilson
from quantkit.report.schema import Context, ContextBucket, Figure, Needle
from quantkit.run.model import Model

__all__ = ["buckets", "long_context"]

_PIECE_TOKENS = 2048
_DEPTHS = (0.1, 0.5, 0.9)
_NEEDLE = 4  # tokens, of which the first is the cue
_SHORTEST = 64


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
    """ids: int64 [windows, length]. The quantised model keeps K and V in `kv`, the baseline in float32. Raises
    CheckpointError when the baseline's logits are not finite."""
    every, layer = _by_position(models, ids, kv)
    scores = every.where(np.isfinite(every.kl))
    far = scores.where(scores.position >= ids.shape[1] // 2)
    needles = [_needle(models, ids, depth, kv) for depth in _DEPTHS] if ids.shape[1] >= _SHORTEST else []
    return Context(
        length=ids.shape[1],
        windows=len(ids),
        kv_cache=kv.value,
        tokens=len(every),
        not_finite=len(every) - len(scores),
        not_finite_layer=layer,
        positions=buckets(scores) if len(scores) else [],
        last_ratio=_last_ratio(far) if len(far) else None,
        needles=[needle for needle, *_ in needles],
        needle_recall=_kept([both for _, both, _ in needles], [base for *_, base in needles]),
    )


def _last_ratio(far: TokenScores) -> Figure:
    sample, difference = Resampler(far.unit), far.nll_quantized - far.nll_baseline
    resampled = np.exp(np.minimum(sample.means(difference), 700))
    return figure(float(np.exp(min(difference.mean(), 700))), sample.interval(resampled))


def _kept(both: Sequence[int], baseline: Sequence[int]) -> Figure | None:
    """Of the needles that the baseline recalls, the share that the quantised model recalls too; None where there are none.
    Wilson's interval, which does not shrink to a point where all are."""
    found = sum(baseline)
    return figure(sum(both) / found, wilson(sum(both), found)) if found else None


def _by_position(models: list[Model], ids: Tensor, kv: KVFormat) -> tuple[TokenScores, int | None]:
    """Scores of all tokens, also those that are not finite, and the first layer after which the quantised model was not."""
    parts: list[TokenScores] = []
    layers: list[int] = []
    for window, row in enumerate(ids):
        caches = Cache(), Cache(kv)
        for start in range(0, len(row) - 1, _PIECE_TOKENS):
            piece = row[start : min(start + _PIECE_TOKENS, len(row) - 1)]
            (base, _), (quant, layer) = (_hidden(m, piece[None], cache) for m, cache in zip(models, caches, strict=True))
            layers += [] if layer is None else [layer]
            targets = row[start + 1 : start + 1 + len(piece)].to(base.device)
            at = np.arange(start, start + len(piece))
            for part in chunks(len(piece), models[0].spec.vocab):
                found = score(models[0].head(base[0, part]), models[1].head(quant[0, part]), targets[part])
                if not torch.isfinite(found.nll_baseline).all():
                    raise _baseline_broken(models[0], len(row))
                parts.append(TokenScores.of([found], np.ones(len(found.kl)), np.full(len(found.kl), window), at[part]))
    return TokenScores.join(parts), min(layers, default=None)


def _baseline_broken(model: Model, length: int) -> CheckpointError:
    seen = f"{model.folder}: logits of the baseline are not finite in windows of {length} tokens"
    return CheckpointError(seen, "check that checkpoint, or lower --context")


def _hidden(model: Model, ids: Tensor, cache: Cache) -> tuple[Tensor, int | None]:
    """After the last layer, and the first layer after which it is not finite."""
    hidden, broken = torch.empty(0), None
    for trace in forward(model.spec, model.weights, ids.to(model.device), cache):
        hidden = trace.hidden
        if broken is None and not torch.isfinite(hidden).all():
            broken = trace.index
    return hidden, broken


def _rare(ids: Tensor, vocab: int, count: int) -> Tensor:
    """int64 [count]: of the ids that the text uses, those it uses least, in an order that a seed decides."""
    counts = torch.bincount(ids.flatten(), minlength=vocab)
    used = counts.nonzero().flatten()
    least = used[counts[used].argsort(stable=True)][: 4 * count]
    chosen = least[torch.randperm(len(least), generator=torch.Generator().manual_seed(0))]
    return chosen.repeat(-(-count // len(chosen)))[:count]


def _needle(models: list[Model], ids: Tensor, depth: float, kv: KVFormat) -> tuple[Needle, int, int]:
    """Plant rare tokens a b c d at `depth` of each window, end it with a b c, and read the probability of b, c, d after
    a, a b, a b c: what an induction head recalls, and a damaged cache forgets. Also of how many windows both models, and
    the baseline, recall all three."""
    windows, length = ids.shape
    needles = _rare(ids, models[0].spec.vocab, windows * _NEEDLE).view(windows, _NEEDLE)
    at = int(depth * (length - 3 * _NEEDLE))
    text = torch.cat((ids[:, :at], needles, ids[:, at:]), dim=1)[:, : length - _NEEDLE + 1]
    planted, bare = (torch.cat((x[:, : length - _NEEDLE + 1], needles[:, :-1]), dim=1) for x in (text, ids))
    (right, hits), (quant_right, quant_hits) = (
        _recall(m, planted, needles[:, 1:], how) for m, how in zip(models, (KVFormat.FLOAT32, kv), strict=True)
    )
    without, _ = _recall(models[0], bare, needles[:, 1:], KVFormat.FLOAT32)
    if np.isnan(right).any() or np.isnan(without).any():
        raise _baseline_broken(models[0], length)
    needle = Needle(
        depth=depth,
        n=windows,
        baseline_without=float(without.mean()),
        baseline=float(right.mean()),
        quantized=float(np.nan_to_num(quant_right).mean()),
        baseline_hits=float(hits.mean()),
        quantized_hits=float(quant_hits.mean()),
        not_finite=int(np.isnan(quant_right).sum()),
    )
    recalled = hits.all(axis=1)
    return needle, int((recalled & quant_hits.all(axis=1)).sum()), int(recalled.sum())


def _recall(model: Model, ids: Tensor, wanted: Tensor, kv: KVFormat) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Probability of `wanted` [n, k] after the last k positions of ids, and whether it is the likeliest; [n, k] each. Where
    logits are not finite, the probability is NaN and nothing is the likeliest."""
    chance, likeliest = [], []
    for row, targets in zip(ids, wanted, strict=True):
        cache, last = Cache(kv), len(targets)
        tail: list[Tensor] = []
        for piece in row[None].split(max(last, _PIECE_TOKENS), dim=1):
            tail = [*tail[-1:], _hidden(model, piece, cache)[0][0, -last:]]
        logits = model.head(torch.cat(tail)[-last:])
        finite = torch.isfinite(logits).all(-1)
        p = logits.double().softmax(-1).gather(-1, targets.to(logits.device)[:, None])[:, 0]
        chance.append(p.masked_fill(~finite, torch.nan))
        likeliest.append((logits.argmax(-1) == targets.to(logits.device)) & finite)
    return torch.stack(chance).cpu().numpy(), torch.stack(likeliest).cpu().numpy()
