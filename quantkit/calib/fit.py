"""What a part of a layer is fitted to: the hidden states of the BF16 model, one layer ahead of the quantized one's.

The attention is held against the BF16 stream after its attention, and its router's probabilities; an MLP or expert against
the BF16 stream after the layer, less what all other parts add on the same tokens: as they are by now, quantized or not yet.
So parts are learned one by one, each for the whole of the layer, with one part's weights in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.calib.extent import APART, STEP_TOKENS
from quantkit.calib.replay import Applied
from quantkit.calib.streams import AttentionPart, MLPPart, Part, Stream
from quantkit.calib.tape import Tape
from quantkit.model.attention import Positions
from quantkit.model.blocks import Routing
from quantkit.model.cache import KV, Kept, KeptKV
from quantkit.model.layer import attention_half, mlp_input, routes
from quantkit.model.spec import Layer, Linear, MoE
from quantkit.model.weights import PlainWeights, Weights

__all__ = [
    "Ahead",
    "AttentionFit",
    "Error",
    "Fit",
    "MLPFit",
    "ReadOnce",
    "SoftWeights",
    "batches",
    "fit_of",
    "looked_at",
    "windows_apart",
]

_FEWEST = 128  # tokens of a step of an expert that few reach: it reads them more than once
_HELD = 2**28  # bytes of what an MLP reads and should add, that are held in memory; of more, blocks are read from tapes
_BLOCK = 32  # tokens that are read from a tape together


class ReadOnce(PlainWeights):
    """Keeps what was read until it is told to forget. read: gives a tensor by name, on the device."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        self._held: dict[str, Tensor] = {}
        self._read = read
        super().__init__(self._once)

    def _once(self, key: str) -> Tensor:
        if key not in self._held:
            self._held[key] = self._read(key)
        return self._held[key]

    def forget(self) -> None:
        self._held.clear()


class SoftWeights(Weights):
    """Some linears as they are being learned, the others as they are applied. soft: by key, the scheme's rounding of what
    the linear reads, and its weight with a gradient."""

    def __init__(self, others: Weights, soft: dict[str, Applied]) -> None:
        self._others, self._soft = others, soft

    def tensor(self, key: str) -> Tensor:
        return self._others.tensor(key)

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        if ref.key not in self._soft:
            return self._others.linear(ref, x)
        return F.linear(self.read(ref, x), self._soft[ref.key].weight)

    def matrix(self, ref: Linear) -> Tensor:
        return self._soft[ref.key].weight if ref.key in self._soft else self._others.matrix(ref)

    def absorbs(self, ref: Linear) -> bool:
        return False

    def is_plain(self, ref: Linear) -> bool:
        return ref.key not in self._soft and self._others.is_plain(ref)

    def read(self, ref: Linear, x: Tensor) -> Tensor:
        """The gradient passes the rounding as if it were not there."""
        if ref.key not in self._soft:
            return self._others.read(ref, x)
        return x + (self._soft[ref.key].read(x) - x).detach()


class Ahead:
    """The BF16 stream, a layer ahead of the quantized one. rest: what the layer's parts leave on the quantized stream's
    tokens, parts that are quantized as they are then, the others not yet."""

    def __init__(self, stream: Stream, weights: ReadOnce) -> None:
        self.stream, self.weights = stream, weights
        self.rest: Tape | None = None
        self._parts: list[MLPPart] = []

    def attention(self, layer: Layer) -> None:
        """Past the layer's attention, and route."""
        self.stream.attention(layer).finish()
        self._parts = self.stream.mlps(layer)
        self.weights.forget()

    def mlps(self, layer: Layer, own: Stream | None) -> None:
        """To the end of the layer. own: the quantized stream, before its MLPs: the rest begins with none quantized."""
        if own is not None:
            self.rest = own.place.tape("rest", own.rows, own.place.spec.hidden)
            for span in own.spans():
                self.rest.write(span.start, own.target.read(span.start, span.stop))
        for index, part in enumerate(self._parts):
            part.finish()
            if own is not None:
                self.add(own.parts(layer)[index], self.weights, 1.0)
            self.weights.forget()
        self._parts = []

    def add(self, part: MLPPart, weights: Weights, sign: float) -> None:
        """A part to the rest, or away from it."""
        assert self.rest is not None
        for where, x in part.batches():
            self.rest.add(part.rows[where], sign * part.weighted(where, weights.mlp(part.mlp, x)))

    def done(self) -> None:
        """The layer is done."""
        self.stream.close()
        if self.rest is not None:
            self.rest.remove()
        self.rest = None

    def remove(self) -> None:
        """The group of layers is done."""
        self.stream.remove()


@dataclass(frozen=True)
class Error:
    """Of n tokens: what the output is off, [n, hidden], and the sum of KL(BF16 router || router), None without one."""

    output: Tensor
    router: Tensor | None = None


class Fit(ABC):
    """items: what can be drawn: windows, or tokens. each: how many tokens one has. together: how many of them, one after the
    other, are drawn at once."""

    each: int
    together = 1
    learned_from: Tensor
    held_out: Tensor

    @abstractmethod
    def error(self, items: Tensor, weights: Weights) -> Error:
        """Of the items int64 [n] under these weights."""

    @property
    def tokens(self) -> int:
        """Those that are learned from."""
        return len(self.learned_from) * self.each


def batches(fit: Fit, steps: int, seed: list[int]) -> Iterator[Tensor]:
    """Items of each step: in random order, all once before any comes again."""
    items, generator = fit.learned_from, np.random.default_rng(seed)
    per_step = min(STEP_TOKENS, max(_FEWEST, -(-fit.tokens // steps)))
    blocks = items.split(fit.together)
    size = min(len(blocks), max(1, per_step // (fit.each * fit.together)))
    order, start = np.empty(0, dtype=np.int64), 0
    while True:
        if start + size > len(order):
            order, start = generator.permutation(len(blocks)), 0
        yield torch.cat([blocks[index] for index in np.sort(order[start : start + size])])
        start += size


def looked_at(fit: Fit) -> Iterator[Tensor]:
    """The items that are not learned from."""
    yield from fit.held_out.split(max(1, STEP_TOKENS // fit.each))


def windows_apart(windows: int) -> Tensor:
    """bool [windows]: which of them are not learned from."""
    every = min(APART, windows)
    return torch.arange(windows) % every == every - 1


class AttentionFit(Fit):
    """Of the windows of the stream; the BF16 stream is past the same attention."""

    def __init__(self, part: AttentionPart, ahead: Ahead) -> None:
        self.part, self.ahead, self.each = part, ahead, part.stream.windows[1]
        apart = windows_apart(part.stream.windows[0])
        self.learned_from, self.held_out = (~apart).nonzero().flatten(), apart.nonzero().flatten()

    def error(self, items: Tensor, weights: Weights) -> Error:
        stream, layer, length = self.part.stream, self.part.layer, self.each
        rows = (items[:, None] * length + torch.arange(length)).flatten()
        h = stream.source.gather(rows).to(stream.place.device).unflatten(0, (len(items), length))
        out = attention_half(layer, h, weights, Positions(stream.tables), _Drawn(stream, rows, len(items)))
        target = self.ahead.stream.target.gather(rows).to(out.device)
        router = None
        if isinstance(layer.mlp, MoE):
            new = routes(layer, mlp_input(layer, out, weights).flatten(0, 1), weights)
            assert new is not None and self.ahead.stream.routing is not None
            router = _divergence(self.ahead.stream.routing, rows, new)
        return Error(out.flatten(0, 1) - target, router)


def _divergence(reference: Routing, rows: Tensor, new: Routing) -> Tensor:
    p = reference.logits[rows].to(new.logits.device).log_softmax(-1)
    return (p.exp() * (p - new.logits.log_softmax(-1))).sum()


class _Drawn:
    """K and V of whole windows that were drawn, and of those that a layer before them has left: a `KVStore`."""

    for_later = False

    def __init__(self, stream: Stream, rows: Tensor, windows: int) -> None:
        self.stream, self.rows, self.windows = stream, rows, windows

    def append(self, layer: int, kv: KV) -> KeptKV:
        return Kept(kv[0]), Kept(kv[1])

    def borrow(self, layer: int) -> KeptKV:
        return self.stream.kept_kv(self.rows, self.windows)


class MLPFit(Fit):
    """Of the tokens that an MLP or expert reads. The rest must be without it."""

    each = 1

    def __init__(self, part: MLPPart, ahead: Ahead) -> None:
        self.part, self.ahead = part, ahead
        apart = windows_apart(part.stream.windows[0])[part.rows // part.stream.windows[1]]
        self.learned_from, self.held_out = (~apart).nonzero().flatten(), apart.nonzero().flatten()
        self._held: tuple[Tensor, Tensor] | None = None
        if 2 * len(part.rows) * part.stream.place.spec.hidden * 4 <= _HELD:
            self._held = self._read(part.rows)
        else:
            self.together = _BLOCK

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What the part reads there, and what its output is off by without it."""
        assert self.ahead.rest is not None
        off = self.ahead.rest.gather(rows).sub_(self.ahead.stream.target.gather(rows))
        return self.part.inputs.gather(rows), off

    def error(self, items: Tensor, weights: Weights) -> Error:
        part, device = self.part, self.part.stream.place.device
        x, off = self._read(part.rows[items]) if self._held is None else (tensor[items] for tensor in self._held)
        return Error(part.weighted(items, weights.mlp(part.mlp, x.to(device))) + off.to(device))


def fit_of(part: Part, ahead: Ahead) -> Fit:
    """What a part of the quantized stream is fitted to."""
    if isinstance(part, AttentionPart):
        return AttentionFit(part, ahead)
    assert isinstance(part, MLPPart)
    return MLPFit(part, ahead)
