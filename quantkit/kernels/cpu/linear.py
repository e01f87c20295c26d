"""Linear layers on the CPU with INT4, INT8 or FP8 E4M3 weights: prepack once at load, then multiply bf16 activations."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.cpu.build import load
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Grid, Kind, Strategy

__all__ = ["PackedLinear", "matmul", "moe_matmul", "pack", "served"]

ROWS = 16  # rows interleaved to a block: the float32 lanes of a register
STEP = 8  # inputs in a step of the kernel
MAX_CHUNK = 256  # inputs of a row between two applications of the scale, at most
FORMATS = {(Kind.INT, 4): 0, (Kind.FLOAT, 8): 1, (Kind.INT, 8): 2}
ALIGNMENT = 64
HUGE = 2**21


@dataclass(frozen=True)
class PackedLinear:
    """A weight [rows, inputs] in the kernel's order; `quantkit_cpu.cpp` describes it. Never written to disk.

    weight: uint8. scale: bfloat16 [row blocks, scales of a row, 16]. zero: int8 like scale, or None. format: 0 INT4,
    1 FP8, 2 INT8. chunk: inputs that are summed before a scale is applied; a scale serves `chunks_per_scale` of them.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: tuple[int, int]
    format: int
    chunk: int
    chunks_per_scale: int

    @property
    def layout(self) -> tuple[object, ...]:
        """All that experts of one call must have in common."""
        return self.shape, self.format, self.chunk, self.chunks_per_scale, self.zero is None, tuple(self.scale.shape)


def _span(grid: Grid, inputs: int) -> int:
    """Inputs of a row that share a scale."""
    if grid.strategy is Strategy.GROUP:
        assert grid.group_size
        return grid.group_size
    if grid.strategy is Strategy.BLOCK:
        assert grid.block
        return grid.block[1]
    return -(-inputs // STEP) * STEP


def served(grid: Grid) -> str | None:
    """Why weights on this grid have no CPU kernel, or None when they have one."""
    if (grid.kind, grid.bits) not in FORMATS:
        return f"no CPU kernel for a {grid.bits}-bit {grid.kind.value} weight"
    if (span := _span(grid, STEP)) % STEP:
        return f"no CPU kernel for groups of {span} inputs: not a multiple of {STEP}"
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


def _weight(codes: Tensor, grid: Grid) -> Tensor:
    """Codes [rows, inputs] -> uint8 in the kernel's order. What fills up a block or a step stands for zero."""
    padded = F.pad(codes.view(torch.uint8), (0, -codes.shape[1] % STEP, 0, -codes.shape[0] % ROWS))
    if grid.bits == 8:  # [block, row, half step, vector, odd or even]; vectors are the bytes of a lane
        return padded.view(-1, ROWS, padded.shape[1] // 4, 2, 2).permute(0, 2, 1, 4, 3).flatten()
    digits = (padded + 8 & 15).view(-1, ROWS, padded.shape[1] // STEP, 2, 2, 2)
    low, high = digits.unbind(4)  # [block, row, step, byte of a lane, nibble of a byte, odd or even]
    return (low | high << 4).permute(0, 2, 1, 4, 3).flatten()


def _on_huge_pages(data: Tensor) -> Tensor:
    """A copy of uint8 `data` on pages of 2 MB where the system has them: few tokens read 10 to 20 % faster from those."""
    if data.numel() < HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return data
    memory = mmap.mmap(-1, data.numel(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel built without them
        return data
    return torch.frombuffer(memory, dtype=torch.uint8).copy_(data)  # holds on to `memory`


def pack(q: QuantizedTensor) -> PackedLinear:
    """A quantised weight in the kernel's order.

    Raises ValueError for a grid without a kernel (see `served`: bits other than 4 or 8, groups that are not a multiple of
    8), a weight without elements, FP8 codes that are NaN, a weight that is not on the CPU.
    """
    rows, inputs = q.shape
    if unfit := served(q.grid):
        raise ValueError(unfit)
    if not rows or not inputs or q.codes.device.type != "cpu":
        raise ValueError(f"a weight of shape {q.shape} on {q.codes.device} cannot be packed: use one on the CPU, not empty")
    if q.grid.kind is Kind.FLOAT and bool((q.codes.view(torch.int8) & 0x7F).eq(0x7F).any()):
        raise ValueError("FP8 codes hold NaN")
    span = _span(q.grid, inputs)
    whole = q.grid.strategy not in (Strategy.GROUP, Strategy.BLOCK)
    chunk = 128 if whole else max(c for c in range(STEP, min(span, MAX_CHUNK) + 1, STEP) if span % c == 0)
    return PackedLinear(
        weight=_on_huge_pages(_weight(q.codes, q.grid)),
        scale=_interleave(_per_row(q.scale, q.grid, rows)),
        zero=None if q.zero is None else _interleave(_per_row(q.zero, q.grid, rows)),
        shape=(rows, inputs),
        format=FORMATS[q.grid.kind, q.grid.bits],
        chunk=chunk,
        chunks_per_scale=-(-span // chunk),
    )


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    for tensor in tensors:
        if tensor.data_ptr() % ALIGNMENT or not tensor.is_contiguous():
            raise ValueError(f"a packed tensor is not contiguous and aligned to {ALIGNMENT} bytes: pack it again")
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def _check(x: Tensor, offsets: Tensor, experts: Sequence[PackedLinear]) -> None:
    if not experts or any(expert.layout != experts[0].layout for expert in experts):
        raise ValueError("experts of one call must be at least one, with the same shape, format, groups and zero points")
    if x.dim() != 2 or x.shape[1] != experts[0].shape[1]:
        raise ValueError(f"x is {tuple(x.shape)}, the weight takes [tokens, {experts[0].shape[1]}]")
    if x.dtype not in (torch.bfloat16, torch.float32) or x.device.type != "cpu":
        raise ValueError(f"x is {x.dtype} on {x.device}; the kernel takes bfloat16 or float32 on the CPU")
    if offsets.dtype != torch.int64 or tuple(offsets.shape) != (len(experts) + 1,) or offsets.device.type != "cpu":
        raise ValueError(f"offsets are {offsets.dtype} {tuple(offsets.shape)}, not int64 ({len(experts) + 1},) on the CPU")
    bounds = offsets.tolist()
    if bounds[0] != 0 or bounds[-1] != x.shape[0] or any(b < a for a, b in pairwise(bounds)):
        raise ValueError(f"offsets {bounds} do not rise from 0 to the {x.shape[0]} tokens")


def moe_matmul(x: Tensor, offsets: Tensor, experts: Sequence[PackedLinear], out: Tensor | None = None) -> Tensor:
    """Each token times the weight of its expert, all experts in one call.

    x: bfloat16 or float32 [tokens, inputs], sorted by expert; float32 is rounded to bfloat16. offsets: int64
    [experts + 1]; expert e has the tokens offsets[e] up to offsets[e + 1], maybe none. experts: of one shape and format.
    out: float32 [tokens, rows], contiguous, overwritten; made when None. Returns it: products of bf16 values, summed in
    float32 in an order that depends on the number of tokens but not on the number of threads. No gradient.
    Raises ValueError for what does not fit, RuntimeError with the reason when the kernels cannot be built here.
    """
    _check(x, offsets, experts)
    rows, inputs = experts[0].shape
    if out is None:
        out = torch.empty(x.shape[0], rows, dtype=torch.float32)
    if out.dtype != torch.float32 or tuple(out.shape) != (x.shape[0], rows) or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)}, not contiguous float32 {(x.shape[0], rows)}")
    library = load()
    if isinstance(library, str):
        raise RuntimeError(f"no CPU kernels: {library}")
    x, offsets, first = x.detach().bfloat16().contiguous(), offsets.contiguous(), experts[0]
    zeros = [expert.zero for expert in experts if expert.zero is not None]
    status = library.quantkit_matmul(
        first.format,
        len(experts),
        _pointers([expert.weight for expert in experts]),
        _pointers([expert.scale for expert in experts]),
        _pointers(zeros) if zeros else None,
        offsets.data_ptr(),
        x.data_ptr(),
        out.data_ptr(),
        rows,
        inputs,
        first.chunk,
        first.chunks_per_scale,
        torch.get_num_threads(),
    )
    if status:
        raise MemoryError(f"no memory for the activations of {x.shape[0]} tokens")
    return out


def matmul(x: Tensor, packed: PackedLinear, out: Tensor | None = None) -> Tensor:
    """x [..., inputs] times a packed weight [rows, inputs]: float32 [..., rows]. See `moe_matmul` for types and errors.

    The kernel fits itself to the number of tokens: one tile of up to 24, or several of 14 to 24.
    """
    rows, inputs = packed.shape
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"x is {tuple(x.shape)}, the weight takes [..., {inputs}]")
    shape = (*x.shape[:-1], rows)
    if out is not None and (tuple(out.shape) != shape or not out.is_contiguous()):
        raise ValueError(f"out is {tuple(out.shape)}, not contiguous {shape}")
    flat = x.reshape(-1, inputs)
    offsets = torch.tensor([0, flat.shape[0]])
    return moe_matmul(flat, offsets, [packed], None if out is None else out.view(-1, rows)).view(shape)
