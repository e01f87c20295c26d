"""Linears and layers of experts on the CPU: weights are prepacked once at load, activations rounded in the kernel."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.cpu.build import KERNELS, kernels, load
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Activation, Grid, Kind, Strategy

__all__ = [
    "Packed",
    "PackedLinear",
    "experts",
    "format_of",
    "found",
    "gather",
    "matmul",
    "on_huge_pages",
    "pack",
    "plain",
    "stack",
    "unfit",
]

ROWS = 16  # rows interleaved to a block: the 32-bit lanes of a register
STEP = 8  # inputs in a step of the kernel
MAX_CHUNK = 256  # inputs of a row between two applications of the scale, at most
# Numbers of build.KERNELS.
FORMATS = {(Kind.INT, 4): 0, (Kind.FLOAT, 8): 1, (Kind.INT, 8): 2}
BYTES = {4: 3, 8: 4}  # integers that meet activations of 8-bit integers
ROUNDINGS = {Kind.FLOAT: 1, Kind.INT: 2}
ALIGNMENT = 64
HUGE = 2**21
PLAIN = len(KERNELS)  # a format: bfloat16 as it is stored
NO_SUCH_EXPERT = 2  # a status of csrc/quantkit_cpu.cpp


@dataclass(frozen=True)
class PackedLinear:
    """A weight [rows, inputs] in the kernel's order; csrc/formats.h describes it. Never written to disk.

    weight: uint8. scale: [row blocks, scales of a row, 16], bfloat16, or float32 where the checkpoint's are not that. zero:
    int8 like scale, or None. chunk: inputs that are summed before a scale is applied; a scale serves `chunks_per_scale` of
    them. format: a number of build.KERNELS, or PLAIN: weight holds bfloat16 rows, and there are no scales.
    rounding: 0 the activation becomes bfloat16, 1 FP8, 2 INT8, with one scale for `span` inputs: the largest magnitude's, or
    input_scale [1].
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: tuple[int, int]
    chunk: int
    chunks_per_scale: int
    format: int
    rounding: int
    span: int
    input_scale: Tensor | None

    @property
    def layout(self) -> tuple[object, ...]:
        """All that experts of one call must have in common."""
        kinds = self.format, self.rounding, self.span, self.zero is None, self.input_scale is None
        return self.shape, self.chunk, self.chunks_per_scale, self.scale.dtype, tuple(self.scale.shape), kinds

    @property
    def nbytes(self) -> int:
        """What one token reads of it."""
        return sum(part.nbytes for part in (self.weight, self.scale, self.zero) if part is not None)


class _Matrix(ctypes.Structure):
    """`Matrix` of csrc/quantkit_cpu.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "zero", "input_scale", "kernels")),
        *((name, ctypes.c_int64) for name in ("rows", "inputs", "chunk", "chunks_per_scale", "span")),
        *((name, ctypes.c_int32) for name in ("format", "rounding", "wide")),
    )


@dataclass(frozen=True)
class Packed:
    """One linear, or one of each expert, as the library reads them."""

    parts: tuple[PackedLinear, ...]

    @cached_property
    def matrix(self) -> Any:
        """A reference to its `_Matrix`, made at the first call. It holds on to what it points to. Raises as `matmul`."""
        first = self.parts[0]
        columns: dict[str, Any] = {
            "weight": _pointers([part.weight for part in self.parts], 1 if first.format == PLAIN else ALIGNMENT),
            "scale": None if first.format == PLAIN else _pointers([part.scale for part in self.parts]),
            "zero": None if first.zero is None else _pointers([p.zero for p in self.parts if p.zero is not None]),
            "input_scale": None,
        }
        if first.input_scale is not None:
            scales = [float(p.input_scale) for p in self.parts if p.input_scale is not None]
            columns["input_scale"] = (ctypes.c_float * len(scales))(*scales)
        fields = {name: ctypes.cast(values, ctypes.c_void_p) for name, values in columns.items() if values is not None}
        if first.format != PLAIN:
            fields["kernels"] = ctypes.cast(found(kernels(first.format)).quantkit_work, ctypes.c_void_p)
        wide = int(first.scale.dtype is torch.float32)
        numbers = first.chunk, first.chunks_per_scale, first.span, first.format, first.rounding, wide
        names = ("chunk", "chunks_per_scale", "span", "format", "rounding", "wide")
        matrix = _Matrix(**fields, rows=first.shape[0], inputs=first.shape[1], **dict(zip(names, numbers, strict=True)))
        matrix.holds = columns
        return matrix


def _pointers(tensors: Sequence[Tensor], alignment: int = ALIGNMENT) -> ctypes.Array[ctypes.c_void_p]:
    for tensor in tensors:
        if tensor.data_ptr() % alignment or not tensor.is_contiguous():
            raise ValueError(f"a packed tensor is not contiguous and aligned to {alignment} bytes: pack it again")
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def gather(parts: Sequence[PackedLinear]) -> Packed:
    """Experts of one call. Raises ValueError unless they are at least one and alike."""
    if not parts or any(part.layout != parts[0].layout for part in parts):
        raise ValueError("experts of one call must be at least one, with the same shape, format, groups and zero points")
    return Packed(tuple(parts))


def _span(grid: Grid, inputs: int) -> int:
    """Inputs of a row that share a scale."""
    if grid.strategy is Strategy.GROUP:
        assert grid.group_size
        return grid.group_size
    if grid.strategy is Strategy.BLOCK:
        assert grid.block
        return grid.block[1]
    return -(-inputs // STEP) * STEP


def _chunk(grid: Grid, inputs: int) -> int:
    if grid.strategy not in (Strategy.GROUP, Strategy.BLOCK):
        return 128
    span = _span(grid, inputs)
    return max(c for c in range(STEP, min(span, MAX_CHUNK) + 1, STEP) if span % c == 0)


def _as_bytes(grid: Grid, activation: Activation | None) -> bool:
    """Whether products are of integers."""
    return grid.kind is Kind.INT and activation is not None and activation.kind is Kind.INT


def format_of(grid: Grid, activation: Activation | None) -> int:
    """The number in build.KERNELS of what multiplies a grid that is not `unfit`."""
    return BYTES[grid.bits] if _as_bytes(grid, activation) else FORMATS[grid.kind, grid.bits]


def unfit(grid: Grid, activation: Activation | None) -> str | None:
    """Why weights on this grid, with activations rounded so, have no CPU kernel, or None when they have one."""
    if (grid.kind, grid.bits) not in FORMATS:
        return f"no CPU kernel for a {grid.bits}-bit {grid.kind.value} weight"
    if (span := _span(grid, STEP)) % STEP:
        return f"no CPU kernel for groups of {span} inputs: not a multiple of {STEP}"
    groups = activation.group_size if activation and activation.strategy is Strategy.GROUP else None
    if groups and groups % _chunk(grid, STEP):
        return f"no CPU kernel for activations in groups of {groups} and weights in chunks of {_chunk(grid, STEP)}"
    return None


def _per_row(per_scale: Tensor, grid: Grid, rows: int) -> Tensor:
    """Scales or zero points of a grid as one line per row: [rows, scales of a row]."""
    if grid.strategy is Strategy.TENSOR:
        return per_scale.expand(rows, 1)
    if grid.strategy is Strategy.BLOCK:
        assert grid.block
        return per_scale.repeat_interleave(grid.block[0], 0)[:rows]
    return per_scale


def _interleave(per_row: Tensor) -> Tensor:
    """[rows, n] -> [row blocks, n, 16], contiguous, zero below the last row."""
    padded = F.pad(per_row, (0, 0, 0, -per_row.shape[0] % ROWS))
    return padded.view(-1, ROWS, padded.shape[1]).transpose(1, 2).contiguous()


def _weight(codes: Tensor, bits: int, as_bytes: bool) -> Tensor:
    """Codes [rows, inputs] -> uint8 in the kernel's order. What fills up a block or a step stands for zero."""
    padded = F.pad(codes.view(torch.uint8), (0, -codes.shape[1] % STEP, 0, -codes.shape[0] % ROWS))
    if as_bytes:  # unsigned: code + 2^(bits - 1)
        padded = padded + (1 << bits - 1)
    steps = padded.view(-1, ROWS, padded.shape[1] // STEP, STEP).transpose(1, 2)  # [block, step, row, input]
    if as_bytes and bits == 8:  # lanes are words of 4 inputs
        ordered = steps.unflatten(3, (2, 4)).transpose(2, 3)
    elif as_bytes:
        ordered = steps[..., :4] & 15 | (steps[..., 4:] & 15) << 4
    elif bits == 8:  # [.., half step, vector, odd or even]: vectors are the bytes of a lane
        ordered = steps.unflatten(3, (2, 2, 2)).permute(0, 1, 3, 2, 5, 4)
    else:
        low, high = (steps + 8 & 15).unflatten(3, (2, 2, 2)).unbind(4)  # [.., byte of a lane, odd or even]
        ordered = (low | high << 4).transpose(3, 4)
    flat: Tensor = ordered.flatten()
    return flat


def on_huge_pages(data: Tensor) -> Tensor:
    """A copy of uint8 `data` on pages of 2 MB where the system has them: few tokens read 10 to 20 % faster from those."""
    if data.numel() < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return data
    memory = mmap.mmap(-1, data.numel(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them
        return data
    return torch.frombuffer(memory, dtype=torch.uint8).copy_(data)  # holds on to `memory`


def pack(q: QuantizedTensor, activation: Activation | None = None) -> PackedLinear:
    """A quantized weight in the kernel's order, and how its input is rounded.

    Raises ValueError for a grid without a kernel (see `unfit`: bits other than 4 or 8, groups that are not a multiple of
    8), a weight without elements, FP8 codes that are NaN, a weight that is not on the CPU.
    """
    rows, inputs = q.shape
    if problem := unfit(q.grid, activation):
        raise ValueError(problem)
    if not rows or not inputs or q.codes.device.type != "cpu":
        raise ValueError(f"a weight of shape {q.shape} on {q.codes.device} cannot be packed: use one on the CPU, not empty")
    if q.grid.kind is Kind.FLOAT and bool((q.codes.view(torch.int8) & 0x7F).eq(0x7F).any()):
        raise ValueError("FP8 codes hold NaN")
    if activation and not activation.dynamic and (q.input_scale is None or not bool(q.input_scale > 0)):
        raise ValueError(f"a static activation needs an input scale above 0, not {q.input_scale}")
    chunk = _chunk(q.grid, inputs)
    padded = -(-inputs // STEP) * STEP
    return PackedLinear(
        weight=on_huge_pages(_weight(q.codes, q.grid.bits, _as_bytes(q.grid, activation))),
        scale=_interleave(_per_row(q.scale if q.scale.dtype is torch.bfloat16 else q.scale.float(), q.grid, rows)),
        zero=None if q.zero is None else _interleave(_per_row(q.zero, q.grid, rows)),
        shape=(rows, inputs),
        chunk=chunk,
        chunks_per_scale=-(-_span(q.grid, inputs) // chunk),
        format=format_of(q.grid, activation),
        rounding=ROUNDINGS[activation.kind] if activation else 0,
        span=(activation.group_size if activation else None) or padded,
        input_scale=q.input_scale if activation and not activation.dynamic else None,
    )


def plain(weight: Tensor) -> PackedLinear:
    """A bfloat16 weight [rows, inputs] on the CPU as it is: no copy is made. Raises ValueError for another one."""
    if weight.dtype is not torch.bfloat16 or weight.dim() != 2 or weight.device.type != "cpu" or not weight.numel():
        raise ValueError(f"a weight {weight.dtype} {tuple(weight.shape)} on {weight.device}, not bfloat16 [rows, inputs]")
    padded = -(-weight.shape[1] // STEP) * STEP
    none = torch.empty(0, dtype=torch.bfloat16)
    rows, inputs = weight.shape
    return PackedLinear(weight.contiguous(), none, None, (rows, inputs), padded, 1, PLAIN, 0, padded, None)


def stack(gate: PackedLinear, up: PackedLinear) -> PackedLinear:
    """Both as one weight: the rows of gate filled up to whole blocks, then those of up likewise. Raises ValueError."""
    if gate.layout != up.layout:
        raise ValueError(f"gate {gate.shape} and up {up.shape} differ in shape, format, groups or zero points")
    zero = None if gate.zero is None or up.zero is None else torch.cat([gate.zero, up.zero])
    rows = 2 * -(-gate.shape[0] // ROWS) * ROWS
    weight = on_huge_pages(torch.cat([gate.weight, up.weight]))
    return replace(gate, weight=weight, scale=torch.cat([gate.scale, up.scale]), zero=zero, shape=(rows, gate.shape[1]))


def found(library: ctypes.CDLL | str) -> ctypes.CDLL:
    if isinstance(library, str):
        raise RuntimeError(f"no CPU kernels: {library}")
    return library


def _input(x: Tensor, inputs: int) -> Tensor:
    """x as contiguous float32, which the kernel rounds itself. Raises ValueError."""
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x is {tuple(x.shape)}, the weight takes [..., {inputs}]")
    if x.dtype not in (torch.bfloat16, torch.float32) or x.device.type != "cpu":
        raise ValueError(f"x is {x.dtype} on {x.device}; the kernel takes bfloat16 or float32 on the CPU")
    return x.float().contiguous()


def _output(out: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=torch.float32)
    if out.dtype != torch.float32 or out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, not contiguous float32 {shape}")
    return out


def matmul(x: Tensor, weight: Packed, out: Tensor | None = None) -> Tensor:
    """x [..., inputs] times a packed weight [rows, inputs]: float32 [..., rows].

    x: bfloat16 or float32; rounded as the weight says, to bfloat16 or to 8-bit codes. out: contiguous, overwritten; made
    when None. Returns it: exact products, summed in float32 in an order that depends on the number of tokens but not on the
    number of threads. No gradient. The kernel fits itself to the number of tokens: one tile of up to 16, or several of 9 to
    16. Raises ValueError for what does not fit, RuntimeError with the reason when the kernels cannot be built here,
    MemoryError.
    """
    rows, inputs = weight.parts[0].shape
    x = _input(x, inputs)
    tokens = x.numel() // inputs
    out = _output(out, (*x.shape[:-1], rows))
    pointers = ctypes.byref(weight.matrix), x.data_ptr(), out.data_ptr()
    if found(load()).quantkit_matmul(*pointers, tokens, torch.get_num_threads()):
        raise MemoryError(f"no memory for the activations of {tokens} tokens")
    return out


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Packed, down: Packed, out: Tensor | None = None) -> Tensor:
    """A whole layer of experts in one call: the sum over a token's ids of weight * down(silu(gate x) * up x).

    x: bfloat16 or float32 [tokens, hidden]. ids: int64 [tokens, k], each in [0, experts). weights: float32 [tokens, k], used
    as they are. gate_up: `stack`ed. Returns float32 [tokens, hidden]; errors as for `matmul`.
    """
    hidden, inner = down.parts[0].shape
    count = len(down.parts)
    if len(gate_up.parts) != count or gate_up.parts[0].shape != (2 * -(-inner // ROWS) * ROWS, hidden):
        raise ValueError(f"{len(gate_up.parts)} x {gate_up.parts[0].shape} does not go with {count} x {(hidden, inner)}")
    x, tokens = _input(x, hidden), x.shape[0] if x.dim() == 2 else -1
    if ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[0] != tokens or ids.device.type != "cpu":
        raise ValueError(f"ids are {ids.dtype} {tuple(ids.shape)} for x {tuple(x.shape)}, not int64 [tokens, k] on the CPU")
    if weights.shape != ids.shape or weights.dtype is not torch.float32:
        raise ValueError(f"router weights are {weights.dtype} {tuple(weights.shape)}, not float32 {tuple(ids.shape)}")
    out, ids, weights = _output(out, (tokens, hidden)), ids.contiguous(), weights.contiguous()
    pointers = (ctypes.byref(gate_up.matrix), ctypes.byref(down.matrix), *(t.data_ptr() for t in (ids, weights, x, out)))
    status = found(load()).quantkit_experts(*pointers, *ids.shape, count, torch.get_num_threads())
    if status == NO_SUCH_EXPERT:
        raise ValueError(f"ids span {int(ids.min())}..{int(ids.max())}, there are {count} experts")
    if status:
        raise MemoryError(f"no memory for the activations of {tokens} tokens")
    return out
