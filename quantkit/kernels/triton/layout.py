"""Weights as the kernels read them, made once at load.

Four-bit codes lie K-contiguous: the weight is the register operand of the MMA (tokens take its other side, whose
granularity is 8), so a thread wants runs along K. A row is cut into spans of 2 * run values; byte i of a span holds value i
in its low nibble and value run + i in its high one. `& 0xF` and `>> 4` then each give a contiguous run of K: one MMA per
K tile of `run`, with nothing to join or permute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.triton.lang import check, cut
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Kind, Strategy

__all__ = ["Packed4", "Packed8", "pack4", "pack8", "stack4", "stack8"]


@dataclass(frozen=True)
class Packed4:
    """Four-bit weights [experts, out, in].

    words: uint8 [experts, out, padded / 2], value q + 8 a nibble. scale: bfloat16 [experts, groups, out]. zero: int8 of the
    scale's shape, or None. inputs: in. group: values of K that share a scale. run: see the module. The columns from `inputs`
    to `padded` hold code 0.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    inputs: int
    group: int
    run: int

    @property
    def experts(self) -> int:
        return self.words.shape[0]

    @property
    def outputs(self) -> int:
        return self.words.shape[1]

    @property
    def padded(self) -> int:
        return self.words.shape[2] * 2

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.words, self.scale, self.zero) if t is not None)

    def to(self, device: torch.device | str) -> Packed4:
        zero = None if self.zero is None else self.zero.to(device)
        return Packed4(self.words.to(device), self.scale.to(device), zero, self.inputs, self.group, self.run)


@dataclass(frozen=True)
class Packed8:
    """Eight-bit weights. codes: int8 or float8_e4m3fn [experts, out, in]. scale: float32 [experts, out], or for 128x128
    blocks (`blocked`) [experts, ceil(out / 128), in / 128]."""

    codes: Tensor
    scale: Tensor
    blocked: bool

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def to(self, device: torch.device | str) -> Packed8:
        return Packed8(self.codes.to(device), self.scale.to(device), self.blocked)


def pack4(weight: QuantizedTensor) -> Packed4:
    """A 4-bit weight [out, in] with group or channel scales as Packed4 with one expert. Raises ValueError."""
    grid, (rows, columns) = weight.grid, weight.shape
    check(
        grid.kind is Kind.INT and grid.bits == 4, f"a 4-bit integer weight is needed, not {grid.bits}-bit {grid.kind.value}"
    )
    check(grid.strategy in (Strategy.GROUP, Strategy.CHANNEL), f"no W4A16 kernel for {grid.strategy.value} scales")
    check(columns % 8 == 0, f"in_features {columns} is not a multiple of 8")
    size = grid.group_size if grid.strategy is Strategy.GROUP else None
    check(size is None or size % 16 == 0, f"group size {size} is not a multiple of 16")
    run = next(run for run in (64, 32, 16) if not size or size % run == 0)
    padded = cut(columns, 2 * run) * 2 * run
    digits = F.pad((weight.codes + 8).to(torch.uint8), (0, padded - columns), value=8).view(rows, -1, 2, run)
    words = (digits[:, :, 0] | (digits[:, :, 1] << 4)).reshape(1, rows, padded // 2)
    groups = cut(padded, size) if size else 1

    def across(values: Tensor) -> Tensor:  # [out, groups] -> [1, groups, out]; the columns of padding need a group too
        return F.pad(values.t(), (0, 0, 0, groups - values.shape[1]))[None].contiguous()

    zero = None if weight.zero is None else across(weight.zero)
    return Packed4(words, across(weight.scale), zero, columns, size or padded, run)


def pack8(weight: QuantizedTensor) -> Packed8:
    """An 8-bit weight [out, in] as Packed8 with one expert; a tensor's scale is repeated for each row. Raises ValueError."""
    grid, (rows, columns) = weight.grid, weight.shape
    check(grid.bits == 8 and grid.symmetric, "a symmetric 8-bit weight is needed")
    check(columns % 16 == 0, f"in_features {columns} is not a multiple of 16")
    blocked = grid.strategy is Strategy.BLOCK
    if blocked:
        check(grid.block == (128, 128), f"blocks are 128x128 here, not {grid.block}")
        check(columns % 128 == 0, f"in_features {columns} is not a multiple of 128, the activation's group")
        return Packed8(weight.codes[None].contiguous(), weight.scale.float()[None].contiguous(), True)
    check(grid.strategy in (Strategy.TENSOR, Strategy.CHANNEL), f"no W8A8 kernel for {grid.strategy.value} scales")
    scale = weight.scale.float().flatten().expand(rows).contiguous()
    return Packed8(weight.codes[None].contiguous(), scale[None], False)


def stack4(parts: Sequence[Packed4]) -> Packed4:
    """The experts' weights as one. Raises ValueError if they differ in shape, groups or zero points."""
    first = parts[0]
    same = all((p.words.shape, p.group, p.run) == (first.words.shape, first.group, first.run) for p in parts)
    zeros = [p.zero for p in parts if p.zero is not None]
    check(same and len(zeros) in (0, len(parts)), "experts differ in shape, group size or zero points")
    zero = torch.cat(zeros) if zeros else None
    words, scale = torch.cat([p.words for p in parts]), torch.cat([p.scale for p in parts])
    return Packed4(words, scale, zero, first.inputs, first.group, first.run)


def stack8(parts: Sequence[Packed8]) -> Packed8:
    """The experts' weights as one. Raises ValueError if they differ in shape, dtype or scales."""
    first = parts[0]
    kinds = {(p.codes.shape, p.codes.dtype, p.blocked) for p in parts}
    check(len(kinds) == 1, "experts differ in shape, dtype or scales")
    return Packed8(torch.cat([p.codes for p in parts]), torch.cat([p.scale for p in parts]), first.blocked)
