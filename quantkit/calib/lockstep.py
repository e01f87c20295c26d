"""The one loop: layers outside, text inside. All texts pass a part of a layer together, so each weight is needed once.

A track is one text through one model, or through a variant of it. An observer has tracks and looks at them on their way;
calibration is an observer that makes a part's weights before the others pass through it. Memory is the weights of one part
and one batch; hidden states lie on tapes in a scratch folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.calib.streams import MLPPart, Part, Place, Stream
from quantkit.model.blocks import Routing
from quantkit.model.cache import KVFormat
from quantkit.model.spec import Layer, ModelSpec
from quantkit.model.weights import Weights
from quantkit.scheme import Scheme

__all__ = ["Lockstep", "Observer", "Pair", "Track"]

_IN_MEMORY = 64_000_000  # bytes of a tape of hidden states: rows of a small model cost more calls than bytes


@dataclass(frozen=True)
class Pair:
    """The two models that texts pass through. schemes: of the quantized one's linears. release: lets go of the weights that
    were read for one part."""

    spec: ModelSpec
    baseline: Weights
    quantized: Weights
    schemes: Mapping[str, Scheme | None]
    device: torch.device
    release: Callable[[], None]


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


class Observer:
    """Has tracks, and is told what they meet. A subclass overrides what it wants to know."""

    tracks: Sequence[Track] = ()

    def prepare(self, lockstep: Lockstep) -> None:
        """Set up `tracks`."""

    def before(self, parts: Sequence[Part]) -> None:
        """All tracks are about to pass these parts: one and the same attention or MLP for each of them."""

    def routed(self, layer: Layer) -> None:
        """The tracks have been routed (`stream.routing`)."""

    def passed(self, part: Part, x: Tensor, y: Tensor, rows: Tensor) -> None:
        """An MLP of one of its tracks read x and gave y, [n, hidden] each, before router weights; at rows int64 [n]."""

    def after(self, parts: Sequence[Part]) -> None:
        """All tracks have passed; the part's weights are still at hand."""

    def done(self, layer: Layer) -> None:
        """All tracks have passed the layer."""

    def finish(self) -> None:
        """The tracks have passed the last layer, and lie there still."""


class Lockstep:
    """scratch: a folder for tapes. in_memory: up to so many bytes a tape is kept in memory."""

    def __init__(self, pair: Pair, scratch: Path, observers: Sequence[Observer] = (), in_memory: int = _IN_MEMORY) -> None:
        self.pair, self.scratch, self.observers, self.in_memory = pair, scratch, observers, in_memory
        self._count = 0
        for observer in observers:
            observer.prepare(self)

    def stream(self, weights: Weights, ids: Tensor, kv_format: KVFormat | None = None) -> Stream:
        """Of int64 ids [windows, length]."""
        self._count += 1
        place = Place(self.pair.spec, self.pair.device, self.scratch, f"{self._count}-", self.in_memory)
        tape = place.tape("hidden", ids.numel(), self.pair.spec.hidden)
        return Stream(place, (ids.shape[0], ids.shape[1]), weights, tape, tape, kv_format)

    def fork(self, track: Track, weights: Weights) -> Track:
        """A track that goes on from where this one stands between two layers, by other weights."""
        stream = self.stream(weights, track.ids, track.stream.kv_format)
        stream.take(track.stream)
        return Track(stream, track.ids)

    def embed(self) -> None:
        """Start all tracks."""
        for observer in self.observers:
            for track in observer.tracks:
                track.stream.embed(track.ids)
        self.pair.release()

    def run(self, layers: Sequence[Layer], *more: Observer, done: Callable[[Layer], None] = lambda layer: None) -> None:
        """All tracks through a group of layers that share K and V. more: observers for these layers alone; they come first.
        done: called after each layer."""
        observers = [*more, *self.observers]
        for layer in layers:
            self._layer(layer, observers)
            done(layer)
        for observer in observers:
            for track in observer.tracks:
                track.stream.remove()

    def _layer(self, layer: Layer, observers: Sequence[Observer]) -> None:
        tracks = [(track, observer) for observer in observers for track in observer.tracks]
        self._pass([(track.stream.attention(layer), observer) for track, observer in tracks], observers)
        parts = [(track.stream.mlps(layer, track.routing()), observer) for track, observer in tracks]
        self.pair.release()
        for observer in observers:
            observer.routed(layer)
        for index in range(len(parts[0][0])):
            self._pass([(own[index], observer) for own, observer in parts], observers)
        for track, _ in tracks:
            track.done(layer)
        for observer in observers:
            observer.done(layer)

    def _pass(self, owned: Sequence[tuple[Part, Observer]], observers: Sequence[Observer]) -> None:
        parts = [part for part, _ in owned]
        for observer in observers:
            observer.before(parts)
        for part, owner in owned:
            for where, x, y in part.run():
                if isinstance(part, MLPPart):
                    owner.passed(part, x, y, part.rows[where])
        for observer in observers:
            observer.after(parts)
        self.pair.release()

    def finish(self) -> None:
        for observer in self.observers:
            observer.finish()
        self.pair.release()
