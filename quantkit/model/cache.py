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

__all__ = ["KV", "Cache", "KVFormat", "KVStore", "Kept", "KeptKV", "OneGroup", "kept"]

KV = tuple[Tensor, Tensor]
_BLOCK = 2**18  # elements of a block: 1 MB of float32, a core's own cache
_LEAST = 64  # positions of a block


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
    """One tensor [batch, heads, time, head_dim] that grows in time; room is doubled when it runs out."""

    def __init__(self, kv_format: KVFormat) -> None:
        self.format, self.length = kv_format, 0
        self.parts: list[Tensor] = []  # codes [b, h, room, d], and for FP8 scales [b, h, room, 1]

    def view(self) -> Kept:
        return Kept(*(part[:, :, : self.length] for part in self.parts))

    def append(self, x: Tensor) -> Kept:
        """Keep x [batch, heads, new, head_dim] after what is there; a view of the whole of it."""
        added, end = kept(x, self.format), self.length + x.shape[2]
        new = [added.codes] if added.scale is None else [added.codes, added.scale]
        if not self.parts or end > self.parts[0].shape[2]:
            room = max(64, 2 * end)
            grown = [part.new_empty((*part.shape[:2], room, part.shape[3])) for part in new]
            for target, part in zip(grown, self.parts, strict=False):
                target[:, :, : self.length] = part[:, :, : self.length]
            self.parts = grown
        for part, values in zip(self.parts, new, strict=True):
            part[:, :, self.length : end] = values
        self.length = end
        return self.view()

    def nbytes(self) -> int:
        return sum(part[:, :, : self.length].numel() * part.element_size() for part in self.parts)


class Cache:
    """groups maps the index of the layer that owns a group's K/V to its (key, value).

    padding: int64 [batch], how many ids at the start of each row only fill it up; None for none. Positions count from the
    first id that is real.
    """

    for_later = True

    def __init__(self, kv_format: KVFormat = KVFormat.FLOAT32, padding: Tensor | None = None) -> None:
        self.format, self.padding = kv_format, padding
        self.groups: dict[int, tuple[_Buffer, _Buffer]] = {}

    @property
    def length(self) -> int:
        """Positions held."""
        return next((key.length for key, _ in self.groups.values()), 0)

    def nbytes(self) -> int:
        """Bytes of what is held, scales included, room to grow not."""
        return sum(buffer.nbytes() for group in self.groups.values() for buffer in group)

    def append(self, layer: int, kv: KV) -> KeptKV:
        key, value = self.groups.setdefault(layer, (_Buffer(self.format), _Buffer(self.format)))
        return key.append(kv[0]), value.append(kv[1])

    def borrow(self, layer: int) -> KeptKV:
        if layer not in self.groups:
            raise ValueError(f"K/V are borrowed from layer {layer}, which has not run")
        key, value = self.groups[layer]
        return key.view(), value.view()
