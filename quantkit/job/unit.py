"""One commit unit of a run: its shards open for writing, its layers quantized part by part on the tokens that pass through,
or simply rounded; or passed once more as they were committed, to get hidden states back that are lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calib import streams
from quantkit.calib.fit import Ahead, ReadOnce
from quantkit.calib.lockstep import Lockstep, Pair, Track
from quantkit.calib.replay import Applied, Listening
from quantkit.calib.streams import Stream
from quantkit.checkpoint import by_name
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.shard import OpenShard, read_header, tensor_of
from quantkit.checkpoint.writer import ShardWriter
from quantkit.dtypes import Entry
from quantkit.errors import CalibrationError
from quantkit.formats import compressed_tensors
from quantkit.host import every
from quantkit.job import rows
from quantkit.job.fisher import LayerMetrics
from quantkit.job.group import GroupJob
from quantkit.job.learning import Learning
from quantkit.job.makers import Committed, Group, Made, Maker, Quantizing
from quantkit.job.methods import needs_tokens
from quantkit.job.placement import Unit
from quantkit.job.plan import Plan
from quantkit.job.tapes import Passage
from quantkit.model.spec import Layer, Linear
from quantkit.model.weights import PlainWeights, Weights
from quantkit.qtensor import QuantizedTensor
from quantkit.quant import rounding
from quantkit.quant.solve import Outcome
from quantkit.stats import LinearStats

__all__ = ["AHEAD", "Outcomes", "Place", "UnitRun"]

AHEAD = "ahead"  # the kind of the BF16 stream's tapes; the quantized one's is "tape"
Outcomes = dict[str, dict[str, Any]]  # of linears, by name: scheme, `Outcome`, and a fixed input_scale


@dataclass(frozen=True)
class Place:
    """Where a run works. ids: int64 [windows, seq_len] if it is calibrated. shares: whether a baseline passes too, which
    reads the weights that are quantized. metrics: by which rounding is learned; None: plain squared error."""

    reader: CheckpointReader
    plan: Plan
    ids: Tensor | None
    device: torch.device
    partial: Path
    work: Path
    shares: bool = False
    metrics: LayerMetrics | None = None
    _read: dict[str, Tensor] = field(default_factory=dict)  # by the present part

    def weight(self, ref: Linear) -> Tensor:
        """Of the source, as it is stored; read once, also where the baseline reads it too."""
        if self.shares and ref.weight not in self._read:
            self._read[ref.weight] = self.reader.tensor(ref.weight)
        return self._read[ref.weight] if self.shares else self.reader.tensor(ref.weight)

    def tensor(self, key: str) -> Tensor:
        """Of the source, on the device; read once for all that passes through a part."""
        if key not in self._read:
            self._read[key] = self.reader.tensor(key)
        return self._read[key].to(self.device)

    @cached_property
    def weights(self) -> Listening:
        return Listening(self.tensor)

    @property
    def pair(self) -> Pair:
        """The source, and what it becomes."""

        def release() -> None:
            self.weights.forget()
            self._read.clear()

        return Pair(self.plan.model, PlainWeights(self.tensor), self.weights, self.plan.schemes, self.device, release)


class UnitRun:
    """Called once, by `run`, `again` or `show`. done: is called after each layer that was quantized, with all outcomes."""

    def __init__(self, place: Place, unit: Unit, done: Callable[[Layer | by_name.Part, Outcomes], None]) -> None:
        self.place, self.unit, self.plan, self.done = place, unit, place.plan, done
        self.outcomes: Outcomes = {}
        self.weights = place.weights
        self._headers: dict[Path, dict[str, Entry]] = {}  # of its shards, once they are committed
        self.shard_of = {t.name: i for i, shard in enumerate(unit.shards) for t in shard.tensors}

    def run(self, passages: Mapping[str, Passage], lockstep: Lockstep | None = None) -> Outcomes:
        """Write the unit's shards. passages: of the streams of calibration text, by kind. lockstep: what else passes through
        it."""
        with ExitStack() as stack:
            self.writers = [stack.enter_context(ShardWriter(self.place.partial, s)) for s in self.unit.shards]
            every(self._carry, self.unit.kept)
            if passages or lockstep is not None:
                self._quantize(passages, lockstep)
            else:
                self._round()
        return self.outcomes

    def _carry(self, key: str) -> None:
        rows.carry(self.place.reader, self._writer(key), key)

    def _round(self) -> None:
        """Without a text: rows of linears that can be rounded so, the others whole."""
        for layer in self.unit.layers:
            streamed, carried = list[Linear](), list[str]()
            for group in layer.same_input():
                scheme = self.plan.schemes[group[0].key]
                if scheme is None:
                    carried += [ref.weight for ref in group]
                elif rounding.by_rows(scheme):
                    streamed += group
                else:
                    self.write(group, self.solve(group, None))
            every(self._carry, carried)
            for ref, outcome in zip(streamed, every(self._round_one, streamed), strict=True):
                self._record(ref, outcome)
            self.done(layer, self.outcomes)

    def _round_one(self, ref: Linear) -> Outcome:
        scheme = self.plan.schemes[ref.key]
        assert scheme is not None
        return rows.round_rows(self.place.reader, self._writer, ref, scheme, self.place.device)

    def _writer(self, name: str) -> ShardWriter:
        return self.writers[self.shard_of[name]]

    def _record(self, ref: Linear, outcome: Outcome, **more: float) -> None:
        scheme = self.plan.schemes[ref.key]
        assert scheme is not None
        self.outcomes[ref.key] = {"scheme": scheme.name, **asdict(outcome), **more}

    def again(self, passage: Passage) -> None:
        """Leave the hidden states that `run` left, to the bit, by the weights in the unit's shards."""
        self._pass(self._stream(passage, self.weights), None, Committed(self))

    @torch.no_grad()
    def ahead_again(self, passage: Passage) -> None:
        """The same of the BF16 stream."""
        ahead = self._ahead(passage)
        for layer in self.layers:
            ahead.attention(layer)
            ahead.mlps(layer, None)
            ahead.done()
        ahead.remove()

    def show(self, lockstep: Lockstep) -> None:
        """Let what else passes through the unit pass, by the weights in its shards."""
        self._pass(None, lockstep, Committed(self))

    def _quantize(self, passages: Mapping[str, Passage], lockstep: Lockstep | None) -> None:
        stream = self._stream(passages["tape"], self.weights) if passages else None
        learns = stream is not None and AHEAD in passages
        maker = Learning(self, self._ahead(passages[AHEAD]), self.place.metrics) if learns else Quantizing(self)
        self._pass(stream, lockstep, maker, lambda layer: self.done(layer, self.outcomes))

    @property
    def layers(self) -> list[Layer]:
        """None in the unit around the layers: there texts begin."""
        return [layer for layer in self.unit.layers if isinstance(layer, Layer)]

    def _stream(self, passage: Passage, weights: Weights, name: str = "") -> Stream:
        ids, (source, target) = self.place.ids, passage
        assert ids is not None
        where = streams.Place(self.plan.model, self.place.device, self.place.work, name)
        stream = Stream(where, (ids.shape[0], ids.shape[1]), weights, source or target, target)
        if source is None and not self.layers:
            stream.embed(ids)
        return stream

    def _ahead(self, passage: Passage) -> Ahead:
        weights = ReadOnce(lambda key: self.place.reader.tensor(key).to(self.place.device))
        ahead = Ahead(self._stream(passage, weights, "ahead-"), weights)
        weights.forget()
        return ahead

    @torch.no_grad()
    def _pass(
        self, stream: Stream | None, lockstep: Lockstep | None, maker: Maker, done: Callable[[Layer], None] = lambda _: None
    ) -> None:
        """All texts through the unit's layers; maker makes each part's weights."""
        loop = lockstep or Lockstep(self.place.pair, self.place.work)
        if stream is not None:
            assert self.place.ids is not None
            maker.tracks = [Track(stream, self.place.ids)]
        if not self.layers:
            loop.embed()
            return
        loop.run(self.layers, maker, done=done)
        maker.close()

    def store(self, name: str, tensor: Tensor) -> None:
        self._writer(name).write(name, tensor)

    def statistics(self, group: Group) -> LinearStats | None:
        """Empty ones of what these linears need: none, the range, or the Hessian too."""
        key = group[0].key
        scheme, method = self.plan.schemes[key], self.plan.methods.get(key)
        if method is None or not needs_tokens(scheme, method):
            return None
        return LinearStats.empty(group[0].in_features, self.place.device, method.hessian)

    def solve(self, group: Group, stats: LinearStats | None) -> Made:
        """What linears that read one input become."""
        scheme = self.plan.schemes[group[0].key]
        if stats is not None and not math.isfinite(max(stats.amax, stats.lent_amax)):
            problem = f"the input of '{group[0].key}' is not finite on the calibration text"
            raise CalibrationError(problem, "check the source model: its hidden states overflow before this layer")
        weights = tuple(self.place.weight(ref) for ref in group)
        if scheme is None:
            return list(weights)
        return list(GroupJob(weights, stats, scheme, self.plan.methods[group[0].key]).run(self.place.device))

    def write(self, group: Group, solutions: Made) -> None:
        """Write it, and what happened to each."""
        for ref, one in zip(group, solutions, strict=True):
            if isinstance(one, Tensor):
                self.store(ref.weight, one)
                continue
            q, scheme = one.quantized, self.plan.schemes[ref.key]
            assert scheme is not None
            for name, tensor in compressed_tensors.encode(ref, scheme, q).items():
                self.store(name, tensor)
            scale = {} if q.input_scale is None else {"input_scale": float(q.input_scale)}
            self._record(ref, one.outcome, **scale)

    def apply(self, group: Group, stored: Sequence[Tensor | QuantizedTensor]) -> None:
        """Let what passes through the part meet these."""
        scheme, device = self.plan.schemes[group[0].key], self.place.device
        self.weights.apply(
            group,
            [
                Applied(one.dequantize(), scheme, one.input_scale)
                if isinstance(one, QuantizedTensor)
                else Applied(one.to(device).float())
                for one in stored
            ],
        )

    def written(self, ref: Linear) -> Tensor | QuantizedTensor:
        """A linear as it was committed."""
        scheme = self.plan.schemes[ref.key]
        if scheme is None:
            return self.place.tensor(ref.weight)
        tensors = {plan.name: self.stored(plan.name) for plan in compressed_tensors.planned(ref, scheme)}
        return compressed_tensors.FORMAT.decode(ref, scheme, tensors)

    def stored(self, name: str) -> Tensor:
        path = self.place.partial / self.unit.shards[self.shard_of[name]].file
        if path not in self._headers:
            self._headers[path] = read_header(path).tensors
        entry, file = self._headers[path][name], OpenShard(path)
        try:
            return tensor_of(file, name, entry).to(self.place.device)
        finally:
            file.close()
