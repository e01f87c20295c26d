"""Losses that only show far into a context: perplexity by position, and recall of something said early.

The needles here are a probe of the cache that rides along in the same pass: teacher-forced, nothing is asked and nothing
written. A benchmark of needles is RULER's, through lm-evaluation-harness (tasks/needles.py).

Long windows pass the layers beside the others, in pieces that find K and V of what came before on a tape, so that memory is
that of one piece and one window's K and V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkit.calib.lockstep import Lockstep, Observer, Track
from quantkit.errors import CheckpointError
from quantkit.measure.divergence import TokenScores, chunks, score
from quantkit.measure.sides import side_by_side
from quantkit.model.cache import KVFormat
from quantkit.report.intervals import Resampler, figure, wilson
from quantkit.report.schema import Context, ContextBucket, Figure, Needle
from quantkit.run.model import Model

__all__ = ["LongContext", "buckets", "long_context"]

_DEPTHS = (0.1, 0.5, 0.9)
_NEEDLE = 4  # tokens, of which the first is the cue
_SHORTEST = 64


def buckets(scores: TokenScores) -> list[ContextBucket]:
    """By position in the window, edges at 0, 32, 64, 128, ... Empty ones are left out."""
    top, edges = int(scores.position.max()) + 1, [0, 32]
    while edges[-1] < top:
        edges.append(2 * edges[-1])
    rows = []
    for start, stop in zip(edges, edges[1:], strict=False):
        part = scores.where((scores.position >= start) & (scores.position < stop))
        if len(part):
            base, quant = (float(np.exp(min(x.mean(), 700))) for x in (part.nll_baseline, part.nll_quantized))
            rows.append(
                ContextBucket(
                    start=start,
                    stop=min(stop, top),
                    tokens=len(part),
                    perplexity_baseline=base,
                    perplexity_quantized=quant,
                    kl=float(part.kl.mean()),
                )
            )
    return rows


class LongContext(Observer):
    """ids: int64 [windows, length]. The quantized model keeps K and V in `kv`, the baseline in float32. `context` is the
    finding. Raises CheckpointError when the baseline's logits are not finite."""

    def __init__(self, models: Sequence[Model], ids: Tensor, kv: KVFormat) -> None:
        self.models, self.ids, self.kv, self.tracks = models, ids, kv, list[Track]()
        self.context: Context
        self._needles = [_plant(ids, models[0].spec.vocab, depth) for depth in _DEPTHS] if ids.shape[1] >= _SHORTEST else []

    def prepare(self, lockstep: Lockstep) -> None:
        """Text through both models; the windows with needles too, and those without them through the baseline."""
        base, quant = lockstep.pair.baseline, lockstep.pair.quantized
        texts = [(base, self.ids[:, :-1], None), (quant, self.ids[:, :-1], self.kv)]
        if self._needles:
            planted, bare = (torch.cat([getattr(needle, name) for needle in self._needles]) for name in ("planted", "bare"))
            texts += [(base, torch.cat((planted, bare)), None), (quant, planted, self.kv)]
        self.tracks = [Track(lockstep.stream(weights, ids, kv), ids, torch.ones_like(ids) > 0) for weights, ids, kv in texts]

    def finish(self) -> None:
        every = self._by_position()
        scores = every.where(np.isfinite(every.kl))
        far = scores.where(scores.position >= self.ids.shape[1] // 2)
        needles = self._recalled() if self._needles else []
        self.context = Context(
            length=self.ids.shape[1],
            windows=len(self.ids),
            kv_cache=self.kv.value,
            tokens=len(every),
            not_finite=len(every) - len(scores),
            not_finite_layer=self.tracks[1].broken_at,
            positions=buckets(scores) if len(scores) else [],
            last_ratio=_last_ratio(far) if len(far) else None,
            needles=[needle for needle, *_ in needles],
            needle_recall=_kept([both for _, both, _ in needles], [base for *_, base in needles]),
        )

    def _by_position(self) -> TokenScores:
        """Scores of all tokens, also those that are not finite."""
        parts: list[TokenScores] = []
        base, quant = self.models
        for window, row in enumerate(self.ids):
            hidden = [track.hidden(slice(window, window + 1))[0] for track in self.tracks[:2]]
            targets, at = row[1:].to(hidden[0].device), np.arange(len(row) - 1)
            for part in chunks(len(targets), base.spec.vocab):
                scored = score(base.head(hidden[0][part]), quant.head(hidden[1][part]), targets[part])
                if not torch.isfinite(scored.nll_baseline).all():
                    raise _baseline_broken(base, len(row))
                parts.append(TokenScores.of([scored], np.ones(len(scored.kl)), np.full(len(scored.kl), window), at[part]))
        return TokenScores.join(parts)

    def _recalled(self) -> list[tuple[Needle, int, int]]:
        """Each depth's needle; of how many windows both models, and the baseline, recall all three tokens."""
        base, quant = self.models
        windows, expected = len(self.ids), torch.cat([needle.expected for needle in self._needles])
        right, hits = _recall(base, self.tracks[2], 0, expected)
        without, _ = _recall(base, self.tracks[2], len(expected), expected)
        quant_right, quant_hits = _recall(quant, self.tracks[3], 0, expected)
        if np.isnan(right).any() or np.isnan(without).any():
            raise _baseline_broken(base, self.ids.shape[1])
        rows = []
        for index, depth in enumerate(_DEPTHS):
            of = slice(index * windows, (index + 1) * windows)
            needle = Needle(
                depth=depth,
                n=windows,
                baseline_without=float(without[of].mean()),
                baseline=float(right[of].mean()),
                quantized=float(np.nan_to_num(quant_right[of]).mean()),
                baseline_hits=float(hits[of].mean()),
                quantized_hits=float(quant_hits[of].mean()),
                not_finite=int(np.isnan(quant_right[of]).sum()),
            )
            recalled = hits[of].all(axis=1)
            rows.append((needle, int((recalled & quant_hits[of].all(axis=1)).sum()), int(recalled.sum())))
        return rows


def long_context(models: Sequence[Model], ids: Tensor, kv: KVFormat) -> Context:
    """`LongContext` in a pass of its own."""
    measurement = LongContext(models, ids, kv)
    side_by_side(models, [measurement])
    return measurement.context


def _last_ratio(far: TokenScores) -> Figure:
    sample, difference = Resampler(far.unit), far.nll_quantized - far.nll_baseline
    resampled = np.exp(np.minimum(sample.means(difference), 700))
    return figure(float(np.exp(min(difference.mean(), 700))), sample.interval(resampled))


def _kept(both: Sequence[int], baseline: Sequence[int]) -> Figure | None:
    """Of the needles that the baseline recalls, the share that the quantized model recalls too; None where there are none.
    Wilson's interval, which does not shrink to a point where all are."""
    recalled = sum(baseline)
    return figure(sum(both) / recalled, wilson(sum(both), recalled)) if recalled else None


def _baseline_broken(model: Model, length: int) -> CheckpointError:
    problem = f"{model.folder}: logits of the baseline are not finite in windows of {length} tokens"
    return CheckpointError(problem, "check that checkpoint, or lower --context")


def _rare(ids: Tensor, vocab: int, count: int) -> Tensor:
    """int64 [count]: of the ids that the text uses, those it uses least, in an order that a seed decides."""
    counts = torch.bincount(ids.flatten(), minlength=vocab)
    used = counts.nonzero().flatten()
    least = used[counts[used].argsort(stable=True)][: 4 * count]
    chosen = least[torch.randperm(len(least), generator=torch.Generator().manual_seed(0))]
    return chosen.repeat(-(-count // len(chosen)))[:count]


@dataclass(frozen=True)
class _Planted:
    """planted, bare: int64 [windows, length], with and without the run of rare tokens; expected [windows, 3]."""

    planted: Tensor
    bare: Tensor
    expected: Tensor


def _plant(ids: Tensor, vocab: int, depth: float) -> _Planted:
    """Plant rare tokens a b c d at `depth` of each window and end it with a b c: the probability of b, c, d after a, a b,
    a b c is what an induction head recalls, and a damaged cache forgets."""
    windows, length = ids.shape
    needles = _rare(ids, vocab, windows * _NEEDLE).view(windows, _NEEDLE)
    at = int(depth * (length - 3 * _NEEDLE))
    text = torch.cat((ids[:, :at], needles, ids[:, at:]), dim=1)
    planted, bare = (torch.cat((x[:, : length - _NEEDLE + 1], needles[:, :-1]), dim=1) for x in (text, ids))
    return _Planted(planted, bare, needles[:, 1:])


def _recall(model: Model, track: Track, first: int, expected: Tensor) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Probability of `expected` [n, k] after the last k positions of a track's windows from `first` on, and whether it is
    the likeliest; [n, k] each. Where logits are not finite, the probability is NaN and nothing is the likeliest."""
    chance, likeliest = [], []
    for window, targets in enumerate(expected, first):
        logits = model.head(track.hidden(slice(window, window + 1))[0, -len(targets) :])
        finite = torch.isfinite(logits).all(-1)
        p = logits.double().softmax(-1).gather(-1, targets.to(logits.device)[:, None])[:, 0]
        chance.append(p.masked_fill(~finite, torch.nan))
        likeliest.append((logits.argmax(-1) == targets.to(logits.device)) & finite)
    return torch.stack(chance).cpu().numpy(), torch.stack(likeliest).cpu().numpy()
