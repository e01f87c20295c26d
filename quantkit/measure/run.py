"""Both models over the evaluation windows, batch by batch: everything that a report needs, summed as it comes.

Every window is scored with both models running freely. On a share of them, the probe, more is measured: errors inside the
layers, the quantised model with the baseline's routing (as more rows of its batch), and the baseline with BF16 products.
Memory is bounded by one batch; of a token a few numbers are kept, of its logits nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.calib.tokens import EvalSet
from quantkit.errors import CheckpointError
from quantkit.measure.cache import BaselineCache, BaselineRun
from quantkit.measure.divergence import TokenScores, chunks, relative_error, same_choices, score
from quantkit.measure.samples import Worst
from quantkit.measure.trace import BLOCKS, BaselineTrace, Bf16Products, OutputErrors, QuantizedTrace
from quantkit.model.blocks import Routing
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.forward import LayerTrace, forward, head
from quantkit.model.weights import Weights
from quantkit.run.model import Model

__all__ = ["BATCH_TOKENS", "Evaluation", "probe_rows"]

BATCH_TOKENS = 8192
_PROBE_WINDOWS = 16


def probe_rows(windows: int) -> Tensor:
    """bool [windows]: about 16 of them, evenly spread; all when there are fewer than 32."""
    chosen = torch.zeros(windows, dtype=torch.bool)
    chosen[:: max(1, windows // _PROBE_WINDOWS)] = True
    return chosen


@dataclass(frozen=True)
class _Batch:
    """Windows: ids int64 [b, time]; scored bool [b, time]; probe bool [b]; unit and block int64 [b]."""

    ids: Tensor
    scored: Tensor
    probe: Tensor
    unit: Tensor
    block: Tensor
    first: int

    def only(self, rows: Tensor) -> _Batch:
        parts = [x[rows] for x in (self.ids, self.scored, self.probe, self.unit, self.block)]
        return _Batch(parts[0], parts[1], parts[2], parts[3], parts[4], self.first)

    def of_scored(self, rows: Tensor) -> Tensor:
        """[b] -> [scored tokens]."""
        return rows[:, None].expand(self.scored.shape)[self.scored]


class _Layers:
    """Sums by layer: error of the hidden state on probed tokens, unchanged router choices, tokens by expert."""

    def __init__(self, layers: int, experts: int) -> None:
        self.lost, self.total = np.zeros(layers), np.zeros(layers)
        self.same, self.routed = np.zeros(layers), np.zeros(layers)
        self.sent = np.zeros((layers, experts), dtype=np.int64)

    def agreement(self, layer: int) -> float | None:
        return float(self.same[layer] / self.routed[layer]) if self.routed[layer] else None

    def error(self, layer: int) -> float | None:
        found = self.lost[layer] / self.total[layer] if self.total[layer] else 0.0
        return float(found) if np.isfinite(found) else None


class Evaluation:
    """Runs when called; its attributes are the findings.

    scores: of all scored tokens whose logits are finite. probes: of probed tokens, "free" for the quantised model, "forced"
    for it with the baseline's routing, "floor" for the baseline with BF16 products, "float_kv" for the quantised model with
    a float32 cache; all in one order, tokens left out where any is not finite. broken: tokens with logits that are not
    finite; broken_at: the first layer that gave a hidden state that is not. varied: tokens that the variants scored, each
    variant's counted; varied_broken: of these, by variant, those that are not finite although the quantised model's are.
    """

    def __init__(self, models: list[Model], data: EvalSet, store: BaselineCache | None, kv: KVFormat | None) -> None:
        self.base, self.quant = models
        self.spec = self.base.spec
        self.data, self.store, self.kv, self.device = data, store, kv, self.base.device
        self.probe = probe_rows(len(data.ids))
        units, member = np.unique(data.unit.numpy(), return_inverse=True)
        self.block = torch.from_numpy(member % min(BLOCKS, len(units)))
        self.errors = OutputErrors(min(BLOCKS, len(units)))
        widest = max((len(moe.experts) for moe in self.spec.moes()), default=0)
        self.layers, self.worst = _Layers(len(self.spec.layers), widest), Worst()
        self.broken = 0
        self.broken_at: int | None = None
        self.varied = 0
        self.varied_broken: dict[str, int] = {}
        self._parts: list[TokenScores] = []
        self._probed: dict[str, list[TokenScores]] = {}

    @torch.inference_mode()
    def run(self, step: int, progress: Callable[[int, int], None] | None) -> None:
        for start in range(0, len(self.data.ids), step):
            self._one(self._batch(start, step))
            if progress:
                progress(min(start + step, len(self.data.ids)), len(self.data.ids))
        self.scores = TokenScores.join(self._parts)
        self.probes = {name: TokenScores.join(parts) for name, parts in self._probed.items()}

    def _batch(self, start: int, step: int) -> _Batch:
        rows = slice(start, start + step)
        ids = self.data.ids[rows]
        scored = torch.arange(ids.shape[1])[None, :] < self.data.lengths[rows, None] - 1
        parts = [x.to(self.device) for x in (ids, scored, self.probe[rows], self.data.unit[rows], self.block[rows])]
        return _Batch(parts[0], parts[1], parts[2], parts[3], parts[4], start)

    def _one(self, batch: _Batch) -> None:
        stored = self.store.get(batch.first) if self.store else None
        base = stored or BaselineRun(torch.empty(0), {})
        quant, agreements = torch.empty(0), []
        live = batch if stored is None else batch.only(batch.probe)
        for before, after in self._side_by_side(batch, live):
            quant, index = after.hidden, after.index
            if before is not None:
                self._hidden_error(batch, live, before, after)
            if before is not None and stored is None:
                base.hidden = before.hidden[batch.scored]
                if before.routing is not None:
                    base.experts[index] = before.routing.experts[batch.scored.flatten()]
            if after.routing is not None:
                sent = after.routing.experts[: batch.scored.numel()][batch.scored.flatten()]
                agreements.append(self._agreement(index, base.experts[index], sent))
            earlier = self.broken_at is None or index < self.broken_at  # than in the batches before
            if earlier and not torch.isfinite(quant[: len(batch.ids)][batch.scored]).all():
                self.broken_at = index
        if self.store and stored is None:
            self.store.put(batch.first, base)
        free = quant[: len(batch.ids)][batch.scored]
        found = self._scores(batch, base.hidden, free, self.quant.weights, agreements, worst=True)
        finite = np.isfinite(found.kl)
        self.broken += int((~finite).sum())
        self._parts.append(found.where(finite))
        if batch.probe.any():
            self._probe(batch, base, quant[len(batch.ids) :], found)

    def _side_by_side(self, batch: _Batch, live: _Batch) -> Iterator[tuple[LayerTrace | None, LayerTrace]]:
        """Layer after layer: the baseline on `live`, then the quantised model on the batch and once more on its probe, with
        the baseline's routing."""
        time, probed = batch.ids.shape[1], live.probe[:, None].expand(live.ids.shape)
        block = live.block[:, None].expand(live.ids.shape).flatten()
        listening = BaselineTrace(self.base.weights, (live.scored & probed).flatten(), block)
        answering = QuantizedTrace(self.quant.weights, listening.heard, self.errors)
        again = batch.ids[batch.probe] if self.spec.moes() else batch.ids[:0]
        cache = Cache(self.kv) if self.kv else None
        base = forward(self.spec, listening, live.ids) if len(live.ids) else None
        quant = forward(self.spec, answering, torch.cat((batch.ids, again)), cache)
        for _ in self.spec.layers:
            before = next(base) if base else None
            answering.forced = None
            if before is not None and before.routing is not None and len(again):
                answering.forced = _rows(before.routing, live.probe.repeat_interleave(time))
            yield before, next(quant)

    def _hidden_error(self, batch: _Batch, live: _Batch, before: LayerTrace, after: LayerTrace) -> None:
        reference = before.hidden[live.probe][live.scored[live.probe]]
        other = after.hidden[: len(batch.ids)][batch.probe][batch.scored[batch.probe]]
        lost, total = relative_error(reference, other)
        self.layers.lost[after.index] += float(lost.sum())
        self.layers.total[after.index] += float(total.sum())

    def _agreement(self, layer: int, before: Tensor, after: Tensor) -> Tensor:
        same = same_choices(before, after)
        self.layers.same[layer] += float(same.sum())
        self.layers.routed[layer] += len(same)
        self.layers.sent[layer] += np.bincount(before.cpu().flatten().numpy(), minlength=self.layers.sent.shape[1])
        return same

    def _probe(self, batch: _Batch, base: BaselineRun, forced: Tensor, found: TokenScores) -> None:
        """Score the variants of one batch's probe against the baseline."""
        probe, rows = batch.only(batch.probe), batch.of_scored(batch.probe)
        known = BaselineRun(base.hidden[rows], {layer: experts[rows] for layer, experts in base.experts.items()})
        parts = {"free": found.where(rows.cpu().numpy())}
        rounded = Bf16Products(self.base.weights)
        parts["floor"] = self._variant(probe, known, rounded)
        if len(forced):
            parts["forced"] = self._scores(probe, known.hidden, forced[probe.scored], self.quant.weights, [])
        if self.kv:
            parts["float_kv"] = self._variant(probe, known, self.quant.weights)
        each = np.isfinite(np.stack([part.kl for part in parts.values()]))  # [variants, tokens], free first
        finite = np.asarray(each.all(axis=0))
        self.varied += each[1:].size
        for name, lost in zip(list(parts)[1:], (each[0] & ~each[1:]).sum(axis=1), strict=True):
            self.varied_broken[name] = self.varied_broken.get(name, 0) + int(lost)
        for name, part in parts.items():
            self._probed.setdefault(name, []).append(part.where(finite))

    def _variant(self, probe: _Batch, base: BaselineRun, weights: Weights) -> TokenScores:
        """The same ids through other arithmetic."""
        hidden, agreements = torch.empty(0), []
        for trace in forward(self.spec, weights, probe.ids):
            hidden = trace.hidden
            if trace.routing is not None:
                agreements.append(same_choices(base.experts[trace.index], trace.routing.experts[probe.scored.flatten()]))
        return self._scores(probe, base.hidden, hidden[probe.scored], weights, agreements)

    def _scores(
        self, batch: _Batch, base: Tensor, other: Tensor, weights: Weights, agreements: list[Tensor], worst: bool = False
    ) -> TokenScores:
        """Hidden states [n, hidden] of a batch's scored tokens, by the two heads, against each other."""
        targets = batch.ids.roll(-1, dims=1)[batch.scored]
        unit, parts = batch.of_scored(batch.unit), []
        at = batch.scored.nonzero()  # [n, 2]: row, position
        for part in chunks(len(targets), self.spec.vocab):
            logits = head(self.spec, self.base.weights, base[part]), head(self.spec, weights, other[part])
            parts.append(score(*logits, targets[part]))
            if worst:
                self.worst.see(*logits, parts[-1].kl, at[part] + torch.tensor([batch.first, 0], device=at.device))
        if not all(torch.isfinite(part.nll_baseline).all() for part in parts):
            raise CheckpointError(f"{self.base.folder}: logits of the baseline are not finite", "check that checkpoint")
        router = torch.stack(agreements).mean(0).cpu() if agreements else torch.ones(len(targets), dtype=torch.float64)
        return TokenScores.of(parts, router.numpy(), unit.cpu().numpy(), at[:, 1].cpu().numpy())


def _rows(routing: Routing, rows: Tensor) -> Routing:
    return Routing(routing.experts[rows], routing.weights[rows], routing.logits[rows])
