"""Streams: the hidden states of many windows on their way through a model, one part of a layer at a time.

Layers outside, text inside: each weight is needed once, however many windows there are. Hidden states lie on tapes, so
memory is one batch and the weights of one part. Several streams may pass a part together: calibration text and held-out
text through what is being quantized, the same held-out text through the baseline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantkit.calib.tape import MemoryTape, Tape
from quantkit.model.attention import Positions
from quantkit.model.blocks import Routing, rope_tables
from quantkit.model.cache import KV, Kept, KeptKV, KVFormat, kept
from quantkit.model.layer import attention_inner, mlp_input, routes
from quantkit.model.spec import MLP, Layer, Linear, ModelSpec, MoE
from quantkit.model.weights import Weights, gated

__all__ = ["AttentionPart", "MLPPart", "Part", "Place", "Span", "Stream"]

_BATCH_TOKENS = 4096
_LONGEST_WHOLE = 8192  # positions; longer windows pass in pieces that read K and V of what came before from their tape


@dataclass(frozen=True)
class Span:
    """Rows start..stop of a tape: whole windows, or (batch is 1) a piece of one from position `first` on."""

    start: int
    stop: int
    batch: int
    first: int

    @property
    def window(self) -> int:
        """The row where its first window begins."""
        return self.start - self.first


@dataclass(frozen=True)
class Place:
    """Where a stream works: the model, the device, a folder for tapes, and what their names begin with. in_memory: up to so
    many bytes a tape is not worth a file."""

    spec: ModelSpec
    device: torch.device
    scratch: Path
    name: str = ""
    in_memory: int = 0

    def tape(self, name: str, rows: int, width: int) -> Tape:
        if rows * width * 4 <= self.in_memory:
            return MemoryTape(rows, width)
        return Tape.create(self.scratch / f"{self.name}{name}.f32", rows, width)


class Stream:
    """windows: how many, and their length. weights: what it runs on. source: hidden states before a layer, [tokens, hidden];
    target: those after it (the same tape, where they need not be kept). kv_format: how it keeps K and V; None: as they are.
    """

    def __init__(
        self,
        place: Place,
        windows: tuple[int, int],
        weights: Weights,
        source: Tape,
        target: Tape,
        kv_format: KVFormat | None = None,
    ) -> None:
        self.place, self.windows, self.weights, self.kv_format = place, windows, weights, kv_format
        self.source, self.target = source, target
        self.rows = windows[0] * windows[1]
        self.tables = rope_tables(place.spec.rope, torch.arange(windows[1], device=place.device))
        self.routing: Routing | None = None  # of the layer that it is in, by row; on the CPU
        self.kv: Tape | None = None
        self.kv_shape: list[tuple[int, int]] = []  # heads and width of K and of V
        self._inputs: Tape | None = None
        layers = place.spec.layers
        self.lenders = {layer.attention.kv_from for layer in layers if layer.attention.kv_from != layer.index}

    @property
    def cut(self) -> bool:
        """Whether windows are too long to pass whole."""
        return self.windows[1] > _LONGEST_WHOLE

    def spans(self) -> Iterator[Span]:
        length = self.windows[1]
        if self.cut:
            for start in range(0, self.rows, length):
                for first in range(0, length, _BATCH_TOKENS):
                    yield Span(start + first, start + min(first + _BATCH_TOKENS, length), 1, first)
            return
        step = max(1, _BATCH_TOKENS // length) * length
        for start in range(0, self.rows, step):
            stop = min(start + step, self.rows)
            yield Span(start, stop, (stop - start) // length, 0)

    def embed(self, ids: Tensor) -> None:
        """Fill `target` with the embeddings of int64 ids [windows, length]."""
        table, flat = self.weights.tensor(self.place.spec.embedding), ids.flatten()
        for span in self.spans():
            self.target.write(span.start, table[flat[span.start : span.stop].to(table.device)].float())
        self.source = self.target

    def take(self, other: Stream) -> None:
        """Stand where another stream of as many tokens stands, between two layers: its hidden states, and its K and V."""
        for span in self.spans():
            self.target.write(span.start, other.source.read(span.start, span.stop))
        self.source, self.kv_shape = self.target, other.kv_shape
        if other.kv is not None:
            self.kv = self.place.tape("kv", self.rows, other.kv.shape[1])
            for span in self.spans():
                self.kv.write(span.start, other.kv.read(span.start, span.stop))

    def attention(self, layer: Layer) -> AttentionPart:
        return AttentionPart(self, layer)

    def mlps(self, layer: Layer, given: Routing | None = None) -> list[MLPPart]:
        """The layer's MLPs after its attention: the dense one; or all tokens routed once, none dropped, the shared expert on
        all of them, and each expert on its own. given: a routing by row to use instead of the stream's own."""
        self._inputs = self.place.tape("mlp_in", self.rows, self.place.spec.hidden)
        routings = []
        for span in self.spans():
            x = mlp_input(layer, self.target.read(span.start, span.stop).to(self.place.device), self.weights)
            self._inputs.write(span.start, x)
            if given is None and (routing := routes(layer, x, self.weights)) is not None:
                routings.append(Routing(routing.experts.cpu(), routing.weights.cpu(), routing.logits.cpu()))
        self.routing = given or (_joined(routings) if routings else None)
        return self.parts(layer)

    def parts(self, layer: Layer) -> list[MLPPart]:
        """What `mlps` gave: parts of the layer whose MLPs it is before."""
        assert self._inputs is not None
        every = torch.arange(self.rows)
        if not isinstance(layer.mlp, MoE):
            return [MLPPart(self, layer.mlp, self._inputs, every, None)]
        assert self.routing is not None
        shared = [MLPPart(self, layer.mlp.shared, self._inputs, every, None)] if layer.mlp.shared else []
        experts, closeness = [], self.routing.logits.log_softmax(-1)
        for index, expert in enumerate(layer.mlp.experts):
            rows, slot = (self.routing.experts == index).nonzero(as_tuple=True)
            experts.append(MLPPart(self, expert, self._inputs, rows, self.routing.weights[rows, slot], closeness[:, index]))
        return [*shared, *experts]

    def kept_kv(self, rows: Tensor, batch: int) -> KeptKV:
        """K and V of `batch` windows, as the layer that owns them has left them; rows: int64, of all their tokens."""
        assert self.kv is not None
        values = self.kv.gather(rows).to(self.place.device).unflatten(0, (batch, -1))
        (k_heads, k_width), (v_heads, v_width) = self.kv_shape
        key, value = values.split((k_heads * k_width, v_heads * v_width), dim=-1)
        heads = (key.unflatten(-1, (k_heads, k_width)), value.unflatten(-1, (v_heads, v_width)))
        return Kept(heads[0].transpose(1, 2)), Kept(heads[1].transpose(1, 2))

    def close(self) -> None:
        """The layer is done: what comes next reads what it left."""
        if self._inputs is not None:
            self._inputs.remove()
        self._inputs, self.routing, self.source = None, None, self.target

    def remove(self) -> None:
        """Remove what only this stream's present group of layers needed."""
        if self.kv is not None:
            self.kv.remove()
        self.kv = None


def _joined(parts: Sequence[Routing]) -> Routing:
    fields = ([getattr(part, name) for part in parts] for name in ("experts", "weights", "logits"))
    return Routing(*(torch.cat(values) for values in fields))


class _OnTape:
    """K and V of one span, and of its window before it: a `KVStore`."""

    def __init__(self, stream: Stream, span: Span) -> None:
        self.stream, self.span, self.for_later = stream, span, stream.kv_format is not None

    def append(self, layer: int, kv: KV) -> KeptKV:
        stream, span = self.stream, self.span
        form = stream.kv_format
        key, value = (Kept(x) if form is None else kept(x, form) for x in kv)
        if stream.cut or layer in stream.lenders:
            stream.kv_shape = [(x.shape[1], x.shape[3]) for x in kv]
            if stream.kv is None:
                stream.kv = stream.place.tape("kv", stream.rows, sum(heads * width for heads, width in stream.kv_shape))
            rows = [x.decode().transpose(1, 2).flatten(2).flatten(0, 1) for x in (key, value)]
            stream.kv.write(span.start, torch.cat(rows, dim=1))
        return (key, value) if span.first == 0 else self.borrow(layer)

    def borrow(self, layer: int) -> KeptKV:
        stream, span = self.stream, self.span
        if stream.kv is None:
            raise ValueError(f"K/V are borrowed from layer {layer}, which has not run")
        return stream.kept_kv(torch.arange(span.window, span.stop), span.batch)


class Part(ABC):
    """Linears of one layer that add to the hidden states together: its attention, an MLP, or one expert on its tokens.

    waves: its linears in groups that read one input; what a wave reads is made by the waves before it, and the last wave is
    the one linear whose output is added.
    """

    stream: Stream
    waves: list[list[tuple[Linear, ...]]]

    @property
    def last(self) -> Linear:
        return self.waves[-1][0][0]

    @abstractmethod
    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Where a batch lies, and what the part reads there."""

    def lent(self) -> Iterator[Tensor]:
        """The same for tokens that are lent to the part to learn from; it adds nothing there."""
        return iter(())

    @abstractmethod
    def inner(self, where: Any, x: Tensor, weights: Weights) -> Tensor:
        """What the last linear reads, [n, in_features]."""

    @abstractmethod
    def add(self, where: Any, y: Tensor) -> None:
        """Add the last linear's output [n, hidden] to the hidden states."""

    @abstractmethod
    def keep(self, where: Any, inner: Tensor) -> None:
        """Keep `inner` until the part has run, if making it again would cost more."""

    @abstractmethod
    def kept(self, where: Any) -> Tensor | None:
        """What was kept there."""

    def run(self) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """Add the part's output, batch by batch: where it lies, what the part read there and what it gave."""
        weights = self.stream.weights
        for where, x in self.batches():
            inner = self.kept(where)
            y = weights.linear(self.last, self.inner(where, x, weights) if inner is None else inner)
            self.add(where, y)
            yield where, x, y
        self.close()

    def finish(self) -> None:
        """`run` to its end."""
        for _ in self.run():
            pass

    @abstractmethod
    def close(self) -> None:
        """Remove what was kept."""


class AttentionPart(Part):
    def __init__(self, stream: Stream, layer: Layer) -> None:
        self.stream, self.layer, self.waves = stream, layer, layer.attention.waves()
        self._core: Tape | None = None

    def batches(self) -> Iterator[tuple[Span, Tensor]]:
        for span in self.stream.spans():
            yield span, self.stream.source.read(span.start, span.stop)

    def inner(self, where: Span, x: Tensor, weights: Weights) -> Tensor:
        h = x.to(self.stream.place.device).unflatten(0, (where.batch, -1))
        at = Positions((self._tables(0, where), self._tables(1, where)))
        return attention_inner(self.layer, h, weights, at, _OnTape(self.stream, where)).flatten(0, 1)

    def _tables(self, which: int, span: Span) -> Tensor:
        return self.stream.tables[which][span.first : span.first + (span.stop - span.start) // span.batch]

    def add(self, where: Span, y: Tensor) -> None:
        self.stream.target.write(where.start, self.stream.source.read(where.start, where.stop) + y.cpu())

    def keep(self, where: Span, inner: Tensor) -> None:
        if self._core is None:
            self._core = self.stream.place.tape("attention", self.stream.rows, self.last.in_features)
        self._core.write(where.start, inner)

    def kept(self, where: Span) -> Tensor | None:
        return None if self._core is None else self._core.read(where.start, where.stop).to(self.stream.place.device)

    def close(self) -> None:
        if self._core is not None:
            self._core.remove()
        self._core = None


class MLPPart(Part):
    """rows: int64 [n], the tokens that it reads. weight: the router's, [n]; None for 1. closeness: the log of the router's
    probability for every token, of an expert: by it tokens are lent."""

    def __init__(
        self, stream: Stream, mlp: MLP, inputs: Tape, rows: Tensor, weight: Tensor | None, closeness: Tensor | None = None
    ) -> None:
        self.stream, self.mlp, self.waves = stream, mlp, mlp.waves()
        self.inputs, self.rows, self.weight, self.closeness = inputs, rows, weight, closeness

    def batches(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.rows), _BATCH_TOKENS):
            part = slice(start, start + _BATCH_TOKENS)
            yield part, self.inputs.gather(self.rows[part]).to(self.stream.place.device)

    def lent(self) -> Iterator[Tensor]:
        """An expert with fewer tokens than its gate has inputs is lent those that came nearest to being routed to it, as
        many as it lacks; down, which may have more inputs, gets the same."""
        if self.closeness is None:
            return
        lacking = min(max(0, self.mlp.gate.in_features - len(self.rows)), len(self.closeness) - len(self.rows))
        others = self.closeness.clone()
        others[self.rows] = -torch.inf
        for part in others.topk(lacking).indices.sort().values.split(_BATCH_TOKENS):
            yield self.inputs.gather(part).to(self.stream.place.device)

    def inner(self, where: slice, x: Tensor, weights: Weights) -> Tensor:
        return gated(self.mlp, x, weights)

    def weighted(self, where: slice | Tensor, y: Tensor) -> Tensor:
        """The MLP's output [n, hidden] there, as it is added: times the router's weight."""
        return y if self.weight is None else y * self.weight[where, None].to(y.device)

    def add(self, where: slice, y: Tensor) -> None:
        self.stream.target.add(self.rows[where], self.weighted(where, y))

    def keep(self, where: slice, inner: Tensor) -> None:
        """Not: it is wider than the hidden states."""

    def kept(self, where: slice) -> Tensor | None:
        return None

    def close(self) -> None:
        """Nothing was kept."""
