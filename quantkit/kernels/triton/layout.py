"""Weights as the kernels read them, made once at load.

Integer codes of 4 or 8 bits that multiply an unrounded input lie in 16-bit words along K: the weight is the register operand
of the MMA (tokens take its other side, whose granularity is 8), and a thread's share of it is pairs along K. A row is cut
into spans of fields * run codes, fields = 16 / bits; word i of a span holds the codes i, run + i, ... from its low end.
Field f of `run` words is then a contiguous run of K; a shift and a logic operation widen two codes to bfloat16 at once.
The scales of a span lie in 32-bit words, two in each, and its zero points in one, so that they can be copied ahead of their
use as the codes are: a GPU's asynchronous copy takes four bytes or more a thread.

Eight-bit codes that multiply an 8-bit input lie as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.checks import check, cut
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Activation, Grid, Kind, Scheme, Strategy

__all__ = ["BLOCK", "Packed", "Packed8", "PackedInt", "Stack", "join", "misfit", "pack", "pack_scales"]

BLOCK = 128  # rows and columns that share a scale, and the activation's group, with block scales


@dataclass(frozen=True)
class PackedInt:
    """Integer weights [experts, out, in] of 4 or 8 bits that multiply an unrounded input.

    words: int16 [experts, out, padded / fields], each field q + 2^(bits - 1). inputs: in. group: codes of a row that share a
    scale. run: see the module. The columns from `inputs` to `padded` hold code 0.
    scale: int32 [experts, spans / alike, scales / 2, out], two bfloat16 a word, the earlier one in its lower half (one alone
    in both). zero: int32 [experts, spans / alike, out], likewise a byte for each scale, or None.
    """

    words: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int
    inputs: int
    group: int
    run: int

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def experts(self) -> int:
        return self.words.shape[0]

    @property
    def outputs(self) -> int:
        return self.words.shape[1]

    @property
    def span(self) -> int:
        return 16 // self.bits * self.run

    @property
    def shared(self) -> int:
        """How many consecutive fields of a span have one scale."""
        return shared_fields(self.group, self.run, 16 // self.bits)

    @property
    def alike(self) -> int:
        """How many spans have the same scales."""
        return alike_of(self.group, self.span)

    @property
    def padded(self) -> int:
        return self.words.shape[2] * (16 // self.bits)

    @property
    def kind(self) -> str:
        """The key of tiles.TABLE."""
        return f"int{self.bits}"

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.words, self.scale, self.zero) if t is not None)


@dataclass(frozen=True)
class Packed8:
    """Eight-bit weights, and how their input is rounded.

    codes: int8 or float8_e4m3fn [experts, out, in]. scale: float32 [experts, out], or for 128x128 blocks
    [experts, ceil(out / 128), in / 128]. input_scale: float32 [experts] where the activation is static, else None.
    """

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    activation: Activation

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def experts(self) -> int:
        return self.codes.shape[0]

    @property
    def outputs(self) -> int:
        return self.codes.shape[1]

    @property
    def inputs(self) -> int:
        return self.codes.shape[2]

    @property
    def blocked(self) -> bool:
        return self.activation.strategy is Strategy.GROUP

    @property
    def kind(self) -> str:
        """The key of tiles.TABLE."""
        return "block8" if self.blocked else "row8"

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes


Packed = PackedInt | Packed8


def misfit(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    """Why a weight [out, in] of that scheme has no layout here, or None."""
    grid, columns = scheme.weight, shape[1]
    reason = _misfit_int(grid) if scheme.activation is None else _misfit8(grid, scheme.activation)
    if reason:
        return reason
    unit = 8 if scheme.activation is None else BLOCK if grid.strategy is Strategy.BLOCK else 16
    return f"in_features {columns} is not a multiple of {unit}" if columns % unit else None


def _misfit_int(grid: Grid) -> str | None:
    if grid.kind is not Kind.INT or grid.bits not in (4, 8):
        return f"no kernel multiplies {grid.bits}-bit {grid.kind.value} weights with an unrounded input"
    if grid.strategy not in (Strategy.GROUP, Strategy.CHANNEL):
        return f"no kernel for integer weights with {grid.strategy.value} scales"
    if grid.bits == 8 and not grid.symmetric:
        return "no kernel for 8-bit weights with zero points"
    if grid.scale_dtype != "BF16":
        return f"no kernel for integer weights with {grid.scale_dtype} scales, and rounding them would change the model"
    if grid.strategy is Strategy.GROUP and (not grid.group_size or grid.group_size % 16):
        return f"group size {grid.group_size} is not a multiple of 16"
    return None


def _misfit8(grid: Grid, activation: Activation) -> str | None:
    if grid.bits != 8 or not grid.symmetric or grid.kind is not activation.kind:
        return f"no kernel multiplies {grid.bits}-bit {grid.kind.value} weights with {activation.kind.value} activations"
    if grid.strategy is Strategy.BLOCK:
        if grid.block != (BLOCK, BLOCK) or activation.group_size != BLOCK or not activation.dynamic:
            return f"block scales are for {BLOCK}x{BLOCK} weights and dynamic groups of {BLOCK}, not {grid.block}"
        return None if grid.kind is Kind.FLOAT else "no kernel for integer weights with block scales"
    if grid.strategy not in (Strategy.TENSOR, Strategy.CHANNEL):
        return f"no kernel for 8-bit weights with {grid.strategy.value} scales and rounded activations"
    expected = Strategy.TOKEN if activation.dynamic else Strategy.TENSOR
    if activation.strategy is not expected:
        return f"no kernel for activations with {activation.strategy.value} scales, dynamic: {activation.dynamic}"
    return None


def pack(weight: QuantizedTensor, scheme: Scheme) -> Packed:
    """A weight [out, in] as the kernels read it, with one expert. Raises ValueError if there is no such layout."""
    reason = misfit(scheme, weight.shape)
    check(reason is None, reason or "")
    return _pack_int(weight) if scheme.activation is None else _pack8(weight, scheme.activation)


def _pack_int(weight: QuantizedTensor) -> PackedInt:
    grid, (rows, columns) = weight.grid, weight.shape
    size = grid.group_size if grid.strategy is Strategy.GROUP else None
    run = next(run for run in (64, 32, 16) if not size or size % run == 0)
    per_word = 16 // grid.bits
    padded = cut(columns, per_word * run) * per_word * run
    codes = F.pad(weight.codes, (0, padded - columns)).view(rows, -1, per_word, run)
    words = torch.zeros(rows, codes.shape[1], run, dtype=torch.int32, device=codes.device)
    for i in range(per_word):
        words |= (codes[:, :, i].to(torch.int32) + 2 ** (grid.bits - 1)) << (grid.bits * i)
    groups = cut(padded, size) if size else 1

    def across(values: Tensor) -> Tensor:  # [out, groups] -> [1, groups, out]; the columns of padding need a group too
        return F.pad(values.t(), (0, 0, 0, groups - values.shape[1]))[None].contiguous()

    zero = None if weight.zero is None else across(weight.zero)
    packed = words.to(torch.int16).view(1, rows, padded // per_word)
    group = size or padded
    scales, zeros = pack_scales(across(weight.scale), zero, padded, per_word, run, group)
    return PackedInt(packed, scales, zeros, grid.bits, columns, group, run)


def shared_fields(group: int, run: int, per_word: int) -> int:
    """How many consecutive fields of a span have one scale."""
    return next(n for n in (4, 2, 1) if n <= per_word and group % (n * run) == 0)


def alike_of(group: int, span: int) -> int:
    """How many spans have the same scales."""
    return group // span if group % span == 0 else 1


def pack_scales(
    scale: Tensor, zero: Tensor | None, padded: int, per_word: int, run: int, group: int
) -> tuple[Tensor, Tensor | None]:
    """bfloat16 scales and int8 zero points [experts, groups, out] as PackedInt has them."""
    span, shared = per_word * run, shared_fields(group, run, per_word)
    begin = torch.arange(0, padded, span * alike_of(group, span), device=scale.device)
    at = (begin[:, None] + torch.arange(0, span, shared * run, device=scale.device)) // group  # [spans / alike, scales]
    at = at.expand(-1, max(2, at.shape[1]))
    each = scale.view(torch.int16)[:, at].to(torch.int32) & 0xFFFF
    pairs = (each[:, :, 0::2] | each[:, :, 1::2] << 16).contiguous()
    if zero is None:
        return pairs, None
    shift = 8 * torch.arange(at.shape[1], dtype=torch.int32, device=scale.device)[:, None]
    return pairs, ((zero[:, at].to(torch.int32) & 0xFF) << shift).sum(2, dtype=torch.int32).contiguous()


def _pack8(weight: QuantizedTensor, activation: Activation) -> Packed8:
    scale, input_scale = weight.scale.float(), weight.input_scale
    check(activation.dynamic or input_scale is not None, "a static activation needs an input scale")
    if weight.grid.strategy is not Strategy.BLOCK:  # a tensor's scale is repeated for each row
        scale = scale.flatten().expand(weight.shape[0])
    static = None if activation.dynamic or input_scale is None else input_scale.float().view(1)
    return Packed8(weight.codes[None].contiguous(), scale[None].contiguous(), static, activation)


def join(gate: Packed, up: Packed) -> Packed:
    """One weight [1, 2 * inner, in] of gate, then up. Raises ValueError if they differ in kind, columns or input scale."""
    check(_shape(gate) == _shape(up), "gate and up differ in shape or scheme")
    whole = gate.outputs % BLOCK == 0 or not (isinstance(gate, Packed8) and gate.blocked)
    check(whole, f"gate's {gate.outputs} rows are not whole blocks of {BLOCK}")
    across = -1 if isinstance(gate, PackedInt) else 1  # where the rows lie in a scale
    joined: dict[str, Any] = {}
    for name, value in _tensors(gate):
        other = getattr(up, name)
        if name == "input_scale":
            check(torch.equal(value, other), "gate and up read one input, but have two input scales")
        else:
            joined[name] = torch.cat([value, other], 1 if name in ("words", "codes") else across)
    return replace(gate, **joined)


class Stack:
    """The weights of a layer's experts, put one after the other into tensors that are allocated once."""

    def __init__(self, experts: int) -> None:
        self.experts, self.filled = experts, 0
        self._whole: Packed | None = None

    def add(self, part: Packed) -> None:
        """The next expert's. Raises ValueError if it is unlike the first, or one too many."""
        check(self.filled < self.experts, f"there are more experts than {self.experts}")
        if self._whole is None:
            room: dict[str, Any] = {name: t.new_empty(self.experts, *t.shape[1:]) for name, t in _tensors(part)}
            self._whole = replace(part, **room)
        check(_shape(self._whole) == _shape(part), "experts differ in shape, group size, zero points or scheme")
        for name, value in _tensors(part):
            getattr(self._whole, name)[self.filled] = value[0]
        self.filled += 1

    def finish(self) -> Packed:
        """All of them. Raises ValueError if some are missing."""
        check(self.filled == self.experts, f"{self.filled} experts of {self.experts} are there")
        assert self._whole
        return self._whole


def _tensors(packed: Packed) -> Iterator[tuple[str, Tensor]]:
    for each in fields(packed):
        if isinstance(value := getattr(packed, each.name), Tensor):
            yield each.name, value


def _shape(packed: Packed) -> dict[str, object]:
    """All that experts of one layer have in common: settings, and each tensor's dtype and shape but for the experts."""
    values = ((each.name, getattr(packed, each.name)) for each in fields(packed))
    return {name: (v.dtype, v.shape[1:]) if isinstance(v, Tensor) else v for name, v in values}
