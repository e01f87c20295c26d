"""A text passed part by part through a model's layers, as calibration passes it, with weights that listen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from quantkit.calib.replay import Applied, Listening, gather
from quantkit.calib.streams import Part, Place, Stream
from quantkit.calib.tape import Tape
from quantkit.choices import KVFormat
from quantkit.model.spec import Layer, ModelSpec
from quantkit.stats import LinearStats

__all__ = ["Replayed"]


class Replayed:
    """seen: by linear, the statistics of its input. Its files lie in `folder`; `remove` leaves the hidden states only."""

    def __init__(
        self, spec: ModelSpec, tensors: Mapping[str, Tensor], ids: Tensor, folder: Path, kv_format: KVFormat | None = None
    ) -> None:
        self.spec, self.tensors, self.ids, self.seen = spec, tensors, ids, dict[str, LinearStats]()
        self.weights, self.device = Listening(tensors.__getitem__), torch.device("cpu")
        self.tape = Tape.create(folder / "hidden", ids.numel(), spec.hidden)
        place = Place(spec, self.device, folder)
        self.stream = Stream(place, (len(ids), ids.shape[1]), self.weights, self.tape, self.tape, kv_format)

    def layers(self) -> Iterator[tuple[Layer, Tensor]]:
        """Each layer, once it has run, with the hidden states that it leaves, [tokens, hidden]."""
        self.stream.embed(self.ids)
        for layer in self.spec.layers:
            self._pass(self.stream.attention(layer))
            for part in self.stream.mlps(layer):
                self._pass(part)
            self.stream.close()
            yield layer, self.tape.read(0, self.ids.numel())

    def _pass(self, part: Part) -> None:
        for wave in part.waves:
            statistics = {group: LinearStats.empty(group[0].in_features, self.device, True) for group in wave}
            gather(part, self.weights, statistics)
            for group, stats in statistics.items():
                self.seen.update(dict.fromkeys([ref.key for ref in group], stats))
                self.weights.apply(group, [Applied(self.tensors[ref.weight]) for ref in group])
        part.finish()
        self.weights.forget()
