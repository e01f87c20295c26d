"""One commit unit of a run: its shards open for writing, its layers walked or simply rounded; or walked once more as they
were committed, to get hidden states back that are lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.calib.tape import Tape
from quantkit.calib.walk import Apply, Walk, embed, walk_layer
from quantkit.checkpoint.by_name import Part
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.shard import OpenShard, read_header, tensor_of
from quantkit.checkpoint.writer import ShardWriter
from quantkit.dtypes import Entry
from quantkit.errors import CalibrationError
from quantkit.formats import compressed_tensors
from quantkit.job.methods import needs_tokens
from quantkit.job.placement import Unit
from quantkit.job.plan import Plan
from quantkit.kernels.reference import round_activation
from quantkit.model.spec import Layer, Linear
from quantkit.qtensor import QuantizedTensor
from quantkit.quant import gptq
from quantkit.quant.solve import solve
from quantkit.scheme import Scheme
from quantkit.stats import LinearStats

__all__ = ["Outcomes", "Place", "UnitRun"]

Outcomes = dict[str, dict[str, Any]]  # of linears, by name: scheme, `Outcome`, and a fixed input_scale
Quantise = Callable[[Sequence[Linear], LinearStats | None], list[Apply]]


@dataclass(frozen=True)
class Place:
    """Where a run works. ids: int64 [windows, seq_len] if it is calibrated."""

    reader: CheckpointReader
    plan: Plan
    ids: Tensor | None
    device: torch.device
    partial: Path
    work: Path


class UnitRun:
    """Called once, by `run` or `again`. done: called after each layer that was quantised, with all outcomes so far."""

    def __init__(self, place: Place, unit: Unit, done: Callable[[Layer | Part, Outcomes], None]) -> None:
        self.place, self.unit, self.plan, self.done = place, unit, place.plan, done
        self.outcomes: Outcomes = {}
        self._headers: dict[Path, dict[str, Entry]] = {}  # of its shards, once they are committed
        self.shard_of = {t.name: i for i, shard in enumerate(unit.shards) for t in shard.tensors}

    def run(self, tape: Tape | None, following: Tape | None) -> Outcomes:
        """Write the unit's shards. tape: the hidden states that it reads; following: where it leaves its own."""
        with ExitStack() as stack:
            self.writers = [stack.enter_context(ShardWriter(self.place.partial, s)) for s in self.unit.shards]
            for key in self.unit.kept:
                self._write(key, self.place.reader.tensor(key))
            if following is None:
                for layer in self.unit.layers:
                    for group in layer.same_input():
                        self.store(group, None)
                    self.done(layer, self.outcomes)
            else:
                self._walk(tape, following, self.quantise, self.wants)
        return self.outcomes

    def again(self, tape: Tape | None, following: Tape) -> None:
        """Leave the hidden states that `run` left, to the bit, by the weights in the unit's shards."""
        self._walk(tape, following, self._committed, lambda refs: None)

    def _walk(
        self, tape: Tape | None, following: Tape, quantise: Quantise, wants: Callable[[Sequence[Linear]], bool | None]
    ) -> None:
        ids = self.place.ids
        assert ids is not None
        walk = Walk(
            spec=self.plan.model,
            weights=self.place.reader,
            windows=(ids.shape[0], ids.shape[1]),
            device=self.place.device,
            scratch=self.place.work,
            quantise=quantise,
            wants=wants,
        )
        if tape is None:
            embed(walk, ids, following)
            return
        kv = walk.tape("kv", self.plan.model.layers[0].attention.kv_width)
        for layer in self.unit.layers:
            assert isinstance(layer, Layer)
            walk_layer(walk, layer, tape, following, kv)
            if quantise == self.quantise:
                self.done(layer, self.outcomes)
            tape = following
        kv.remove()

    def _write(self, name: str, tensor: Tensor) -> None:
        self.writers[self.shard_of[name]].write(name, tensor)

    def wants(self, refs: Sequence[Linear]) -> bool | None:
        """What statistics these linears need: none (None), the range (False), or the Hessian too (True)."""
        scheme, method = self.plan.schemes[refs[0].key], self.plan.methods.get(refs[0].key)
        return method.hessian if method and needs_tokens(scheme, method) else None

    @torch.inference_mode()
    def quantise(self, refs: Sequence[Linear], stats: LinearStats | None) -> list[Apply]:
        """Quantise linears that read one input, write them, and return how to apply each as an engine would."""
        scheme, stored = self.plan.schemes[refs[0].key], self.store(refs, stats)
        if scheme is None:
            device = self.place.device
            return [_apply(weight.to(device).float(), None, None) for weight in stored if isinstance(weight, Tensor)]
        return [_apply(q.dequantize(), scheme, q.input_scale) for q in stored if isinstance(q, QuantizedTensor)]

    @torch.inference_mode()
    def store(self, refs: Sequence[Linear], stats: LinearStats | None) -> list[Tensor] | list[QuantizedTensor]:
        """Quantise linears that read one input, and write them; what was written of each."""
        scheme = self.plan.schemes[refs[0].key]
        if stats is not None and not math.isfinite(max(stats.amax, stats.lent_amax)):
            seen = f"the input of '{refs[0].key}' is not finite on the calibration text"
            raise CalibrationError(seen, "check the source model: its hidden states overflow before this layer")
        stored = [self.place.reader.tensor(ref.weight) for ref in refs]
        if scheme is None:
            for ref, weight in zip(refs, stored, strict=True):
                self._write(ref.weight, weight)
            return stored
        weights = [weight.to(self.place.device).float() for weight in stored]
        solved = solve(weights, scheme, self.plan.methods[refs[0].key], stats, repair_on(self.place.device))
        for ref, (q, outcome) in zip(refs, solved, strict=True):
            for name, tensor in compressed_tensors.encode(ref, scheme, q).items():
                self._write(name, tensor)
            scale = {} if q.input_scale is None else {"input_scale": float(q.input_scale)}
            self.outcomes[ref.key] = {"scheme": scheme.name, **asdict(outcome), **scale}
        return [q for q, _ in solved]

    @torch.inference_mode()
    def _committed(self, refs: Sequence[Linear], stats: LinearStats | None) -> list[Apply]:
        """As `quantise`, with what was written then."""
        applies = []
        for ref in refs:
            scheme = self.plan.schemes[ref.key]
            if scheme is None:
                applies.append(_apply(self.place.reader.tensor(ref.weight).to(self.place.device).float(), None, None))
                continue
            tensors = {plan.name: self._stored(plan.name) for plan in compressed_tensors.planned(ref, scheme)}
            q = compressed_tensors.FORMAT.decode(ref, scheme, tensors)
            applies.append(_apply(q.dequantize(), scheme, q.input_scale))
        return applies

    def _stored(self, name: str) -> Tensor:
        path = self.place.partial / self.unit.shards[self.shard_of[name]].file
        if path not in self._headers:
            self._headers[path] = read_header(path).tensors
        entry, file = self._headers[path][name], OpenShard(path)
        try:
            return tensor_of(file, name, entry).to(self.place.device)
        finally:
            file.close()


def repair_on(device: torch.device) -> gptq.Repair:
    """GPTQ's block of columns, in one launch where the device is a GPU with Triton."""
    if device.type == "cuda" and find_spec("triton"):
        from quantkit.kernels.triton.repair import repair

        return repair
    return gptq.repair


def _apply(weight: Tensor, scheme: Scheme | None, input_scale: Tensor | None) -> Apply:
    activation = scheme.activation if scheme else None

    def run(x: Tensor) -> Tensor:
        return F.linear(x if activation is None else round_activation(x, activation, input_scale), weight)

    return run
