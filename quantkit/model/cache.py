"""Generation's memory: for each group of layers that share K/V (CLA), ONE key and ONE value.

The key is rotated and normalised without a weight (see `gqa.py`), so its elements are of the order of 1 whatever the
model, and FP8 loses little on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.choices import KVFormat
from quantkit.model.blocks import rope_tables
from quantkit.model.spec import Rope

__all__ = ["KV", "Cache", "KVFormat", "KVStore", "Kept", "KeptKV", "OneGroup", "kept"]

KV = tuple[Tensor, Tensor]
_BLOCK = 2**18  # elements of a block: 1 MB of float32, a core's own cache
_LEAST = 64  # positions of a block
_STEP = 256  # positions by which room grows, at least
_CPU = torch.device("cpu")
_DTYPES = {KVFormat.FLOAT32: torch.float32, KVFormat.BF16: torch.bfloat16, KVFormat.FP8: torch.float8_e4m3fn}


@dataclass(frozen=True)
class Kept:
    """Keys or values [batch, heads, time, width] as they lie in memory: floats, or E4M3 codes with a scale
    [batch, heads, time, 1]. What lies in a cache is a view of it."""

    codes: Tensor
    scale: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """All of it at once."""
        if self.scale is None:
            return self.codes.to(dtype)
        return (_plain(self.codes) * self.scale.float()).to(dtype)

    def blocks(self) -> Iterator[Tensor]:
        """Without the scale, float32, some positions after the other: what is decoded of a long cache stays small.

        float32 is given as it lies there, and so is all at once on a GPU, where a launch costs more than memory.
        """
        batch, heads, time, width = self.shape
        step = max(_LEAST, _BLOCK // (batch * heads * width))
        if self.codes.dtype is torch.float32 or self.codes.device.type != "cpu":
            step = time
        return (_plain(part) for part in self.codes.split(step, dim=2))


def _plain(codes: Tensor) -> Tensor:
    """float32. E4M3 has the bits of the upper byte of a float16 but for one bit of exponent, whose biases differ by 8: a
    shift and a factor, ten times as fast on a CPU as torch's conversion. NaN is not known here: its scale is NaN too."""
    if codes.dtype is not torch.float8_e4m3fn:
        return codes.float()
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).float().mul_(256)


KeptKV = tuple[Kept, Kept]


def kept(x: Tensor, kv_format: KVFormat) -> Kept:
    """Keys or values [batch, heads, time, width] as that format keeps them."""
    if kv_format is KVFormat.FLOAT32:
        return Kept(x.float())
    if kv_format is KVFormat.BF16:
        return Kept(x.bfloat16())
    scale = (x.float().abs().amax(-1, keepdim=True) / 448).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    return Kept((x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale)


class KVStore(Protocol):
    """Where a layer that owns K and V puts them, and layers that borrow find them.

    for_later: whether positions that come later read them too, so that they are kept as their readers round them.
    """

    for_later: bool

    def append(self, layer: int, kv: KV) -> KeptKV:
        """Add the new positions of the group that `layer` owns, each [batch, kv_heads, new, width]; all of its positions."""
        ...

    def borrow(self, layer: int) -> KeptKV:
        """All positions of the group that `layer` owns. Raises ValueError where it has not run."""
        ...


class OneGroup:
    """Without a cache: all positions are new, and K and V of one group of layers at a time are enough."""

    for_later = False

    def __init__(self) -> None:
        self._held: tuple[int, KeptKV] | None = None

    def append(self, layer: int, kv: KV) -> KeptKV:
        self._held = layer, (Kept(kv[0]), Kept(kv[1]))
        return self._held[1]

    def borrow(self, layer: int) -> KeptKV:
        if self._held is None or self._held[0] != layer:
            raise ValueError(f"K/V are borrowed from layer {layer}, which has not run")
        return self._held[1]


class _Buffer:
    """One tensor [batch, heads, time, width] that grows in time: new positions go into room that is there, and what is held
    is copied when there is none left, which happens the less often the more is held."""

    def __init__(self, kv_format: KVFormat, room: int) -> None:
        self.format, self.length, self.room = kv_format, 0, room
        self.parts: list[Tensor] = []  # codes [b, h, room, d], and for FP8 scales [b, h, room, 1]

    def view(self) -> Kept:
        return Kept(*(part[:, :, : self.length] for part in self.parts))

    def extend(self, batch: int, heads: int, new: int, width: int, device: torch.device) -> None:
        """Hold so many positions more, whose values are to be written."""
        end = self.length + new
        if not self.parts or end > self.parts[0].shape[2]:
            room = max(self.room, end + max(_STEP, end // 2) if self.parts else end + _STEP)
            sizes = (width, 1) if self.format is KVFormat.FP8 else (width,)
            dtypes = _DTYPES[self.format], torch.bfloat16
            grown = [
                torch.empty(batch, heads, room, size, dtype=dtype, device=device)
                for size, dtype in zip(sizes, dtypes, strict=False)
            ]
            for target, part in zip(grown, self.parts, strict=False):
                target[:, :, : self.length] = part[:, :, : self.length]
            self.parts = grown
        self.length = end

    def append(self, x: Tensor) -> Kept:
        """Keep x [batch, heads, new, width] after what is there; a view of the whole of it."""
        added, start = kept(x, self.format), self.length
        batch, heads, new, width = x.shape
        self.extend(batch, heads, new, width, x.device)
        for part, values in zip(self.parts, (added.codes, added.scale), strict=False):
            if values is not None:
                part[:, :, start : self.length] = values
        return self.view()

    def nbytes(self) -> int:
        return sum(part[:, :, : self.length].numel() * part.element_size() for part in self.parts)


class Cache:
    """groups maps the index of the layer that owns a group's K/V to its (key, value).

    padding: int64 [batch], how many ids at the start of each row only fill it up; None for none. Positions count from the
    first id that is real. room: positions for which memory is taken at once; it grows where they do not do.
    """

    for_later = True

    def __init__(self, kv_format: KVFormat = KVFormat.FLOAT32, padding: Tensor | None = None, room: int = 0) -> None:
        self.format, self.padding, self.room = kv_format, padding, room
        self.groups: dict[int, tuple[_Buffer, _Buffer]] = {}
        self._tables: tuple[Rope, tuple[Tensor, Tensor]] | None = None

    @property
    def length(self) -> int:
        """Positions held."""
        return next((key.length for key, _ in self.groups.values()), 0)

    def nbytes(self) -> int:
        """Bytes of what is held, scales included, room to grow not."""
        return sum(buffer.nbytes() for group in self.groups.values() for buffer in group)

    def append(self, layer: int, kv: KV) -> KeptKV:
        key, value = self._group(layer)
        return key.append(kv[0]), value.append(kv[1])

    def borrow(self, layer: int) -> KeptKV:
        key, value = self.buffers(layer)
        return key.view(), value.view()

    def extend(self, layer: int, batch: int, heads: int, new: int, width: int) -> tuple[_Buffer, _Buffer]:
        """The buffers of the group that `layer` owns, on the CPU, with room for new positions that the caller writes."""
        group = self._group(layer)
        for buffer in group:
            buffer.extend(batch, heads, new, width, _CPU)
        return group

    def buffers(self, layer: int) -> tuple[_Buffer, _Buffer]:
        """Key and value of the group that `layer` owns, as they lie in memory. Raises ValueError where it has not run."""
        if layer not in self.groups:
            raise ValueError(f"K/V are borrowed from layer {layer}, which has not run")
        return self.groups[layer]

    def _group(self, layer: int) -> tuple[_Buffer, _Buffer]:
        if layer not in self.groups:
            self.groups[layer] = _Buffer(self.format, self.room), _Buffer(self.format, self.room)
        return self.groups[layer]

    def tables(self, rope: Rope, time: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin of the next `time` positions, each [time, dim], or with padding [batch, 1, time, dim]. They are made
        once for all the room, not for each token."""
        start, end = self.length, self.length + time
        if self._tables is None or self._tables[0] != rope or end > len(self._tables[1][0]):
            room = max(self.room, end + max(_STEP, end // 2))
            self._tables = rope, rope_tables(rope, torch.arange(room, device=device))
        cos, sin = self._tables[1]
        if self.padding is None:
            return cos[start:end], sin[start:end]
        at = torch.arange(start, end, device=device) - self.padding.to(device)[:, None, None]
        at = at.clamp(min=0)  # [batch, 1, time]
        return cos[at], sin[at]
