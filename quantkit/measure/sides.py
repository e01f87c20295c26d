"""Two models side by side over any number of texts, layer by layer: each weight of either is read once.

A track is one text through one model, or a variant of it. All tracks pass a part of a layer together, so memory is the
weights of that part in both models and one batch; hidden states lie on tapes in a scratch folder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from quantkit.calib.streams import MLPPart, Part, Place, Stream
from quantkit.model.blocks import Routing
from quantkit.model.cache import KVFormat
from quantkit.model.spec import Layer, ModelSpec
from quantkit.model.weights import Weights
from quantkit.run.model import Model

__all__ = ["Observer", "SideBySide", "Track"]


class Track:
    """One text through one model. ids: int64 [windows, length]. looks_at: bool [windows, length], the tokens whose hidden
    states must be finite; broken_at: the first layer after which one of them is not. given: a track whose routing this one
    takes, and which of its windows (bool [windows]) this one reads."""

    def __init__(
        self, stream: Stream, ids: Tensor, looks_at: Tensor | None = None, given: tuple[Track, Tensor] | None = None
    ) -> None:
        self.stream, self.ids, self.given = stream, ids, given
        self.looks_at = None if looks_at is None else looks_at.flatten()
        self.broken_at: int | None = None

    def hidden(self, windows: slice) -> Tensor:
        """Of whole windows after the last layer that ran: float32 [windows, length, hidden], on the device."""
        length = self.ids.shape[1]
        start, stop, _ = windows.indices(len(self.ids))
        rows = self.stream.target.read(start * length, stop * length).to(self.stream.place.device)
        cut: Tensor = rows.unflatten(0, (-1, length))
        return cut

    def routing(self) -> Routing | None:
        """What `given` says for this track's windows."""
        if self.given is None or self.given[0].stream.routing is None:
            return None
        other, windows = self.given[0].stream.routing, self.given[1]
        rows = windows.cpu().repeat_interleave(self.ids.shape[1])
        return Routing(other.experts[rows], other.weights[rows], other.logits[rows])

    def done(self, layer: Layer) -> None:
        """The layer has been passed."""
        self.stream.close()
        if self.looks_at is None or self.broken_at is not None:
            return
        for span in self.stream.spans():
            rows = self.stream.target.read(span.start, span.stop)[self.looks_at[span.start : span.stop]]
            if not torch.isfinite(rows).all():
                self.broken_at = layer.index
                return


class Observer(ABC):
    """Looks at its tracks while they pass a layer."""

    tracks: list[Track]

    @abstractmethod
    def prepare(self, sides: SideBySide, step: int) -> None:
        """Set up `tracks`. step: evaluation windows that are scored at once."""

    @abstractmethod
    def finish(self, step: int) -> None:
        """The tracks have passed the last layer, and lie there still."""

    @abstractmethod
    def routed(self, layer: Layer) -> None:
        """Its tracks have been routed (`stream.routing`)."""

    @abstractmethod
    def passed(self, part: MLPPart, x: Tensor, y: Tensor, rows: Tensor) -> None:
        """An MLP of a track read x and gave y, [n, hidden] each, before router weights; at rows int64 [n]."""

    @abstractmethod
    def after(self, parts: Sequence[Part]) -> None:
        """All tracks have passed the attention, or one MLP, of a layer; its weights are still at hand."""

    @abstractmethod
    def done(self, layer: Layer) -> None:
        """All tracks have passed the layer."""


class SideBySide:
    """models: baseline, quantised. scratch: a folder for tapes."""

    def __init__(self, models: Sequence[Model], scratch: Path) -> None:
        self.models, self.scratch, self.device = models, scratch, models[0].device
        self.spec: ModelSpec = models[0].spec
        self._count = 0

    def stream(self, weights: Weights, ids: Tensor, kv_format: KVFormat | None = None) -> Stream:
        """Of int64 ids [windows, length]."""
        self._count += 1
        place = Place(self.spec, self.device, self.scratch, f"{self._count}-")
        tape = place.tape("hidden", ids.numel(), self.spec.hidden)
        return Stream(place, (ids.shape[0], ids.shape[1]), weights, tape, tape, kv_format)

    def run(self, observers: Sequence[Observer], progress: Callable[[int, int], None] | None = None) -> None:
        """All tracks of all observers through all layers. progress: (layers done, layers in all)."""
        tracks = [track for observer in observers for track in observer.tracks]
        for track in tracks:
            track.stream.embed(track.ids)
        self.release()
        layers = self.spec.layers
        for at, layer in enumerate(layers):
            self._layer(layer, tracks, observers)
            if at + 1 == len(layers) or layers[at + 1].attention.kv_from != layer.attention.kv_from:
                for track in tracks:
                    track.stream.remove()
            if progress:
                progress(at + 1, len(layers))

    def _layer(self, layer: Layer, tracks: Sequence[Track], observers: Sequence[Observer]) -> None:
        attentions = [track.stream.attention(layer) for track in tracks]
        for attention in attentions:
            attention.finish()
        for observer in observers:
            observer.after(attentions)
        self.release()
        parts = [track.stream.mlps(layer, track.routing()) for track in tracks]
        self.release()
        for observer in observers:
            observer.routed(layer)
        for together in zip(*parts, strict=True):
            self._mlp(together, observers)
            self.release()
        for track in tracks:
            track.done(layer)
        for observer in observers:
            observer.done(layer)

    def _mlp(self, parts: Sequence[MLPPart], observers: Sequence[Observer]) -> None:
        for part in parts:
            (owner,) = (o for o in observers if any(track.stream is part.stream for track in o.tracks))
            for where, x, y in part.run():
                owner.passed(part, x, y, part.rows[where])
        for observer in observers:
            observer.after(parts)

    def release(self) -> None:
        """Let go of the weights that were read."""
        for model in self.models:
            model.weights.release()
