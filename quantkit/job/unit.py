"""One commit unit of a run: its shards open for writing, its layers quantised part by part on the tokens that pass through,
or simply rounded; or passed once more as they were committed, to get hidden states back that are lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calib import streams
from quantkit.calib.replay import Apply, Listening, gather
from quantkit.calib.streams import Part, Stream
from quantkit.calib.tape import Tape
from quantkit.checkpoint import by_name
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.shard import OpenShard, read_header, tensor_of
from quantkit.checkpoint.writer import ShardWriter
from quantkit.dtypes import Entry
from quantkit.errors import CalibrationError
from quantkit.formats import compressed_tensors
from quantkit.job.group import GroupJob, applied
from quantkit.job.placement import Unit
from quantkit.job.plan import Plan, needs_tokens
from quantkit.model.spec import Layer, Linear
from quantkit.qtensor import QuantizedTensor
from quantkit.stats import LinearStats

__all__ = ["Outcomes", "Place", "UnitRun"]

Outcomes = dict[str, dict[str, Any]]  # of linears, by name: scheme, `Outcome`, and a fixed input_scale
Group = Sequence[Linear]


@dataclass(frozen=True)
class Place:
    """Where a run works. ids: int64 [windows, seq_len] if it is calibrated."""

    reader: CheckpointReader
    plan: Plan
    ids: Tensor | None
    device: torch.device
    partial: Path
    work: Path

    def tensor(self, key: str) -> Tensor:
        return self.reader.tensor(key).to(self.device)


class UnitRun:
    """Called once, by `run` or `again`. done: called after each layer that was quantised, with all outcomes so far."""

    def __init__(self, place: Place, unit: Unit, done: Callable[[Layer | by_name.Part, Outcomes], None]) -> None:
        self.place, self.unit, self.plan, self.done = place, unit, place.plan, done
        self.outcomes: Outcomes = {}
        self.weights = Listening(place.tensor)
        self._headers: dict[Path, dict[str, Entry]] = {}  # of its shards, once they are committed
        self.shard_of = {t.name: i for i, shard in enumerate(unit.shards) for t in shard.tensors}

    def run(self, tape: Tape | None, following: Tape | None) -> Outcomes:
        """Write the unit's shards. tape: the hidden states that it reads; following: where it leaves its own."""
        with ExitStack() as stack:
            self.writers = [stack.enter_context(ShardWriter(self.place.partial, s)) for s in self.unit.shards]
            for key in self.unit.kept:
                self._write(key, self.place.reader.tensor(key))
            if following is not None:
                self._pass(tape, following, self._quantise)
                return self.outcomes
            for layer in self.unit.layers:
                for group in layer.same_input():
                    self._store(group, None)
                self.done(layer, self.outcomes)
        return self.outcomes

    def again(self, tape: Tape | None, following: Tape) -> None:
        """Leave the hidden states that `run` left, to the bit, by the weights in the unit's shards."""
        self._pass(tape, following, self._committed)

    @torch.inference_mode()
    def _pass(self, tape: Tape | None, following: Tape, prepare: Callable[[Part], None]) -> None:
        """The hidden states through the unit's layers. prepare: makes a part's linears ready to be applied."""
        ids, device = self.place.ids, self.place.device
        assert ids is not None
        where = streams.Place(self.plan.model, device, self.place.work)
        stream = Stream(where, (ids.shape[0], ids.shape[1]), self.weights, tape or following, following)
        if tape is None:
            stream.embed(ids)
            return
        for layer in self.unit.layers:
            assert isinstance(layer, Layer)
            self._parts([stream.attention(layer)], prepare)
            self._parts(stream.mlps(layer), prepare)
            stream.close()
            if prepare == self._quantise:
                self.done(layer, self.outcomes)
        stream.remove()

    def _parts(self, parts: Sequence[Part], prepare: Callable[[Part], None]) -> None:
        for part in parts:
            prepare(part)
            part.finish()
            self.weights.forget()

    def _quantise(self, part: Part) -> None:
        """Quantise the part's linears, write them, and have them applied as an engine would."""
        for wave in part.waves:
            self._solve(part, wave)

    def _solve(self, part: Part, wave: Sequence[tuple[Linear, ...]]) -> None:
        statistics = {group: self._statistics(group) for group in wave}
        gather(part, self.weights, statistics)
        for group in wave:
            self.weights.apply(group, self._store(group, statistics.pop(group)))  # a Hessian is not kept longer than that

    def _committed(self, part: Part) -> None:
        """The same with what was written then."""
        for group in (group for wave in part.waves for group in wave):
            self.weights.apply(group, [self._written(ref) for ref in group])

    def _write(self, name: str, tensor: Tensor) -> None:
        self.writers[self.shard_of[name]].write(name, tensor)

    def _statistics(self, group: Group) -> LinearStats | None:
        """Empty ones of what these linears need: none, the range, or the Hessian too."""
        scheme = self.plan.schemes[group[0].key]
        if scheme is None or not needs_tokens(self.plan.recipe, scheme):
            return None
        with_hessian = self.plan.recipe.method_of(scheme) == "gptq"
        return LinearStats.empty(group[0].in_features, self.place.device, with_hessian)

    def _store(self, group: Group, stats: LinearStats | None) -> list[Apply]:
        """Quantise linears that read one input, and write them; how each is applied."""
        scheme = self.plan.schemes[group[0].key]
        if stats is not None and not math.isfinite(max(stats.amax, stats.lent_amax)):
            seen = f"the input of '{group[0].key}' is not finite on the calibration text"
            raise CalibrationError(seen, "check the source model: its hidden states overflow before this layer")
        weights = tuple(self.place.reader.tensor(ref.weight) for ref in group)
        if scheme is None:
            for ref, weight in zip(group, weights, strict=True):
                self._write(ref.weight, weight)
            return [applied(weight.to(self.place.device).float()) for weight in weights]
        applies = []
        solved = GroupJob(weights, stats, scheme, self.plan.recipe.method_of(scheme)).run(self.place.device)
        for ref, (q, outcome) in zip(group, solved, strict=True):
            for name, tensor in compressed_tensors.encode(ref, scheme, q).items():
                self._write(name, tensor)
            scale = {} if q.input_scale is None else {"input_scale": float(q.input_scale)}
            self.outcomes[ref.key] = {"scheme": scheme.name, **asdict(outcome), **scale}
            applies.append(applied(q.dequantize(), scheme, q.input_scale))
        return applies

    def _written(self, ref: Linear) -> Apply:
        scheme = self.plan.schemes[ref.key]
        if scheme is None:
            return applied(self.place.tensor(ref.weight).float())
        tensors = {plan.name: self._stored(plan.name) for plan in compressed_tensors.planned(ref, scheme)}
        q: QuantizedTensor = compressed_tensors.FORMAT.decode(ref, scheme, tensors)
        return applied(q.dequantize(), scheme, q.input_scale)

    def _stored(self, name: str) -> Tensor:
        path = self.place.partial / self.unit.shards[self.shard_of[name]].file
        if path not in self._headers:
            self._headers[path] = read_header(path).tensors
        entry, file = self._headers[path][name], OpenShard(path)
        try:
            return tensor_of(file, name, entry).to(self.place.device)
        finally:
            file.close()
