"""Both models over the evaluation windows: everything that a report needs, summed as it comes.

Every window is scored with both models running freely. On a share of them, the probe, more is measured: errors inside the
layers, the quantized model with the baseline's routing, and the baseline with BF16 products. Of a token a few numbers are
kept, of its logits nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.calib.lockstep import Lockstep, Observer, Pair, Track
from quantkit.calib.streams import MLPPart, Part
from quantkit.calib.tokens import EvalSet
from quantkit.errors import CheckpointError
from quantkit.measure.cache import BaselineCache, BaselineRun
from quantkit.measure.divergence import TokenScores, chunks, relative_error, same_choices, score
from quantkit.measure.samples import Worst
from quantkit.measure.trace import BLOCKS, Bf16Products, Heard, OutputErrors
from quantkit.model.cache import KVFormat
from quantkit.model.forward import head
from quantkit.model.spec import Layer, Linear, ModelSpec, MoE
from quantkit.model.weights import Weights
from quantkit.report.intervals import Floats

__all__ = ["BATCH_TOKENS", "Evaluation", "probe_rows"]

BATCH_TOKENS = 8192
_PROBE_WINDOWS = 16
_OVERFLOWN = 1e30  # error of weights that are not finite once dequantized: JSON has no infinity


def probe_rows(windows: int) -> Tensor:
    """bool [windows]: about 16 of them, evenly spread; all when there are fewer than 32."""
    chosen = torch.zeros(windows, dtype=torch.bool)
    chosen[:: max(1, windows // _PROBE_WINDOWS)] = True
    return chosen


class _Layers:
    """Sums by layer: error of the hidden state on probed tokens, unchanged router choices, tokens by expert."""

    def __init__(self, layers: int, experts: int) -> None:
        self.lost, self.total = np.zeros(layers), np.zeros(layers)
        self.same, self.routed = np.zeros(layers), np.zeros(layers)
        self.sent = np.zeros((layers, experts), dtype=np.int64)

    def agreement(self, layer: int) -> float | None:
        return float(self.same[layer] / self.routed[layer]) if self.routed[layer] else None

    def error(self, layer: int) -> float | None:
        mean = self.lost[layer] / self.total[layer] if self.total[layer] else 0.0
        return float(mean) if np.isfinite(mean) else None


@dataclass
class _Compared:
    """A track whose tokens are scored against the baseline's. windows: bool [all windows], those that it reads. weights:
    of its head. same: float64 [its scored tokens], the share of router choices that are the baseline's, summed over MoE
    layers; None for a track that is given the baseline's."""

    track: Track
    windows: Tensor
    weights: Weights
    same: Tensor | None


class Evaluation(Observer):
    """Looks at both models on held-out text; when they have passed, its attributes are the findings.

    step: windows that are scored at once, and stored together. baseline: what to call it in a message.

    scores: of all scored tokens whose logits are finite. probes: of probed tokens, "free" for the quantized model, "forced"
    for it with the baseline's routing, "floor" for the baseline with BF16 products, "float_kv" for the quantized model with
    a float32 cache; all in one order, tokens left out where any is not finite. broken: tokens with logits that are not
    finite; broken_at: the first layer that gave a hidden state that is not. weight_errors: of quantized linears, by key.
    varied: tokens that the variants scored, each variant's counted; varied_broken: of these, by variant, those that are not
    finite although the quantized model's are.
    """

    pair: Pair

    def __init__(
        self,
        spec: ModelSpec,
        data: EvalSet,
        step: int,
        baseline: str | Path,
        store: BaselineCache | None = None,
        kv: KVFormat | None = None,
    ) -> None:
        self.baseline = baseline
        self.spec, self.data, self.step, self.store, self.kv = spec, data, step, store, kv
        self.probe = probe_rows(len(data.ids))
        self.scored = torch.arange(data.ids.shape[1])[None, :] < data.lengths[:, None] - 1  # bool [windows, length]
        units, member = np.unique(data.unit.numpy(), return_inverse=True)
        self.block = torch.from_numpy(member % min(BLOCKS, len(units)))
        self.errors = OutputErrors(min(BLOCKS, len(units)))
        widest = max((len(moe.experts) for moe in self.spec.moes()), default=0)
        self.layers, self.worst = _Layers(len(self.spec.layers), widest), Worst()
        self.broken = self.varied = 0
        self.ran = False
        self.varied_broken: dict[str, int] = {}
        self.scores: TokenScores
        self.probes: dict[str, TokenScores] = {}
        self.tracks: list[Track] = []
        self.moes = [layer.index for layer in self.spec.layers if isinstance(layer.mlp, MoE)]
        self.weight_errors: dict[str, float] = {}
        self._heard: list[Heard] = []
        self._experts: dict[int, Tensor] = {}  # the baseline's choices by MoE layer, int16 [scored tokens, k]

    @property
    def broken_at(self) -> int | None:
        return self._compared["free"].track.broken_at

    # Before the pass

    def prepare(self, lockstep: Lockstep) -> None:
        self.pair = lockstep.pair
        ids, starts = self.data.ids, range(0, len(self.data.ids), self.step)
        self._stored = self.store is not None and all(self.store.has(start) for start in starts)
        if self._stored and self.store is not None:
            runs = [self.store.get(start) for start in starts]
            self._experts = {i: torch.cat([run.experts[i].short().cpu() for run in runs if run]) for i in self.moes}
        every = torch.ones(len(ids), dtype=torch.bool)
        self._live = self.probe if self._stored else every  # windows that the baseline reads
        kv, quantized = self.kv, self.pair.quantized
        self._base = base = Track(lockstep.stream(self.pair.baseline, ids[self._live]), ids[self._live])
        probed, rounded = ids[self.probe], Bf16Products(self.pair.baseline)
        free = Track(lockstep.stream(quantized, ids, kv), ids, self.scored)
        self._compared = {
            "free": self._against(free, every, quantized),
            "floor": self._against(Track(lockstep.stream(rounded, probed), probed), self.probe, rounded),
        }
        if self.moes:
            track = Track(lockstep.stream(quantized, probed, kv), probed, given=(base, self.probe[self._live]))
            self._compared["forced"] = _Compared(track, self.probe, quantized, None)
        if kv:
            track = Track(lockstep.stream(quantized, probed), probed)
            self._compared["float_kv"] = self._against(track, self.probe, quantized)
        self.tracks = [base, *(compared.track for compared in self._compared.values())]

    def _against(self, track: Track, windows: Tensor, weights: Weights) -> _Compared:
        return _Compared(track, windows, weights, torch.zeros(int(self.scored[windows].sum()), dtype=torch.float64))

    def _scored_of(self, windows: Tensor, among: Tensor) -> Tensor:
        """bool [scored tokens of `among`]: those of `windows`; both bool [all windows]."""
        return windows[among].repeat_interleave(self.scored[among].sum(1))

    # While the tracks pass

    def routed(self, layer: Layer) -> None:
        self._heard = []
        base = self._base.stream.routing
        if base is None:
            return
        if not self._stored:
            self._experts[layer.index] = base.experts[self.scored[self._live].flatten()].short()
        chosen = self._experts[layer.index]
        for name, compared in self._compared.items():
            routing = compared.track.stream.routing
            if routing is None or compared.same is None:
                continue
            before = chosen[self._scored_of(compared.windows, torch.ones_like(compared.windows))].long()
            same = same_choices(before, routing.experts[self.scored[compared.windows].flatten()])
            compared.same += same
            if name == "free":
                self.layers.same[layer.index] += float(same.sum())
                self.layers.routed[layer.index] += len(same)
                sent = self.layers.sent[layer.index]
                sent += np.bincount(before.flatten().numpy(), minlength=len(sent))

    def passed(self, part: Part, x: Tensor, y: Tensor, rows: Tensor) -> None:
        """What the baseline's MLP reads and gives on probed tokens is kept for the quantized one."""
        if part.stream is not self._base.stream:
            return
        probed = (self.scored & self.probe[:, None])[self._live].flatten()[rows]
        if probed.any():
            block = self.block[self._live].repeat_interleave(self.data.ids.shape[1])[rows][probed]
            on_device = probed.to(x.device)
            self._heard.append(Heard(x[on_device], y[on_device], block))

    def after(self, parts: Sequence[Part]) -> None:
        """Play what was kept to the quantized MLP, whose answer then differs by its own error alone, not by what earlier
        layers lost: so a damaged expert stands out by itself. Compare the weights themselves."""
        for heard in self._heard:
            assert isinstance(parts[0], MLPPart)
            answer = self.pair.quantized.mlp(parts[0].mlp, heard.x)
            self.errors.add(parts[0].mlp.gate.key, heard.block, *relative_error(heard.y, answer))
        self._heard = []
        for ref in (ref for wave in parts[0].waves for group in wave for ref in group):
            if (error := self._weight_error(ref)) is not None:
                self.weight_errors[ref.key] = error

    def _weight_error(self, ref: Linear) -> float | None:
        """||Q - W|| / ||W||; None for a linear that is not quantized."""
        if self.pair.schemes[ref.key] is None:
            return None
        weight = self.pair.baseline.matrix(ref).double()
        difference = self.pair.quantized.matrix(ref).to(weight.device) - weight
        return min(float(difference.norm() / weight.norm().clamp(min=1e-30)), _OVERFLOWN)

    def done(self, layer: Layer) -> None:
        """Errors of the probe's hidden states, window by window."""
        free, every = self._compared["free"], torch.zeros_like(self.probe)
        for window in self.probe.nonzero().flatten().tolist():
            one = every.index_fill(0, torch.tensor([window]), True)
            reference, other = self._hidden(self._base, self._live, one), self._hidden(free.track, free.windows, one)
            lost, total = relative_error(reference, other)
            self.layers.lost[layer.index] += float(lost.sum())
            self.layers.total[layer.index] += float(total.sum())

    # After the pass

    def finish(self) -> None:
        parts: list[TokenScores] = []
        probed: dict[str, list[TokenScores]] = {}
        for start in range(0, len(self.data.ids), self.step):
            windows = torch.zeros(len(self.data.ids), dtype=torch.bool)
            windows[start : start + self.step] = True
            base = self._baseline(start, windows)
            scores = self._score("free", windows, base.hidden, worst=True)
            finite = np.isfinite(scores.kl)
            self.broken += int((~finite).sum())
            parts.append(scores.where(finite))
            if (windows & self.probe).any():
                self._probe(windows, base.hidden, scores, probed)
        self.scores = TokenScores.join(parts)
        self.probes = {name: TokenScores.join(pieces) for name, pieces in probed.items()}
        self.ran = True

    def _baseline(self, start: int, windows: Tensor) -> BaselineRun:
        """Its hidden states on scored tokens of some windows, and its choices; from the store, or into it."""
        if self._stored and self.store is not None:
            run = self.store.get(start)
            assert run is not None
            return run
        hidden = self._hidden(self._base, self._live, windows)
        rows = self._scored_of(windows, torch.ones_like(windows))
        run = BaselineRun(hidden, {layer: experts[rows].long() for layer, experts in self._experts.items()})
        if self.store is not None:
            self.store.put(start, run)
        return run

    def _hidden(self, track: Track, reads: Tensor, windows: Tensor) -> Tensor:
        """[scored tokens of `windows`, hidden] of a track that reads the windows `reads`; windows follow each other."""
        at = windows[reads].nonzero().flatten().tolist()
        return track.hidden(slice(at[0], at[-1] + 1))[self.scored[windows & reads].to(self.pair.device)]

    def _probe(self, windows: Tensor, base: Tensor, free: TokenScores, probed: dict[str, list[TokenScores]]) -> None:
        """Score the variants of one batch's probe against the baseline."""
        rows = self._scored_of(windows & self.probe, windows)
        parts = {"free": free.where(rows.numpy())}
        for name in self._compared:
            if name != "free":
                parts[name] = self._score(name, windows & self.probe, base[rows.to(base.device)])
        each = np.isfinite(np.stack([part.kl for part in parts.values()]))  # [variants, tokens], free first
        finite = np.asarray(each.all(axis=0))
        self.varied += each[1:].size
        for name, lost in zip(list(parts)[1:], (each[0] & ~each[1:]).sum(axis=1), strict=True):
            self.varied_broken[name] = self.varied_broken.get(name, 0) + int(lost)
        for name, part in parts.items():
            probed.setdefault(name, []).append(part.where(finite))

    def _score(self, name: str, windows: Tensor, base: Tensor, worst: bool = False) -> TokenScores:
        """A track's scored tokens of some windows against the baseline's hidden states there, [n, hidden]."""
        compared = self._compared[name]
        other = self._hidden(compared.track, compared.windows, windows)
        return self._scores(windows, base, other, compared.weights, self._agreement(compared, windows), worst)

    def _agreement(self, compared: _Compared, windows: Tensor) -> Floats:
        rows = self._scored_of(windows, compared.windows)
        if compared.same is None or not self.moes:
            return np.ones(int(rows.sum()))
        return (compared.same[rows] / len(self.moes)).numpy()

    def _scores(
        self, windows: Tensor, base: Tensor, other: Tensor, weights: Weights, router: Floats, worst: bool
    ) -> TokenScores:
        at = (self.scored & windows[:, None]).nonzero()  # [n, 2]: window, position
        targets = self.data.ids.roll(-1, dims=1)[at[:, 0], at[:, 1]].to(self.pair.device)
        parts = []
        for part in chunks(len(targets), self.spec.vocab):
            logits = head(self.spec, self.pair.baseline, base[part]), head(self.spec, weights, other[part])
            parts.append(score(*logits, targets[part]))
            if worst:
                self.worst.see(*logits, parts[-1].kl, at[part])
        if not all(torch.isfinite(part.nll_baseline).all() for part in parts):
            raise CheckpointError(f"{self.baseline}: logits of the baseline are not finite", "check that checkpoint")
        return TokenScores.of(parts, router, self.data.unit[at[:, 0]].numpy(), at[:, 1].numpy())
