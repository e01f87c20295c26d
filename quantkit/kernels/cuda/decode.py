"""Python's side of w4a16_decode.cu: W4A16 linear and mixture of experts where each weight meets 1 to 16 tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.checks import check
from quantkit.kernels.cuda.build import Library
from quantkit.kernels.triton.layout import PackedInt
from quantkit.kernels.triton.ops import check_layer
from quantkit.kernels.triton.routing import ALONE, Rows, group
from quantkit.kernels.triton.tiles import crowd
from quantkit.scheme import Grid, Kind, Strategy

__all__ = ["MOST", "linear", "misfit", "moe"]

MOST = 16  # rows of x that a weight may meet for this kernel to be the right one


def misfit(grid: Grid) -> str | None:
    """Why the kernel cannot read weights of this grid that Triton's kernels can, or None."""
    if grid.kind is not Kind.INT or grid.bits != 4:
        return "the CUDA kernel is for 4-bit integers"
    if grid.strategy is Strategy.GROUP and (grid.group_size or 0) % 128:
        return f"the CUDA kernel needs groups of a multiple of 128, not {grid.group_size}"
    return None


def _launch(
    library: Library,
    x: Tensor,
    weight: PackedInt,
    out: Tensor,
    rows: Rows,
    block: int,
    router: Tensor | None,
    gated: bool,
) -> None:
    """One product of x [tokens, in] into out [rows, out]; checks what the kernel itself cannot."""
    alone = rows.grouped == ALONE
    owners, ids = (None, rows.owners.long()) if alone and rows.owners is not None else (rows.owners, None)
    tensors = (x, weight.words, weight.scale, weight.zero, rows.slots, owners, ids, router, out)
    check(
        weight.bits == 4 and weight.group % 128 == 0,
        f"no kernel for {weight.bits} bits in groups of {weight.group}",
    )
    for tensor in tensors:
        if tensor is not None:
            check(tensor.device == x.device and tensor.is_contiguous(), "tensors lie on several devices or with gaps")
            check(tensor.device.type == library.device, f"tensors lie on {tensor.device}, the kernel reads {library.device}")
    check(x.data_ptr() % 16 == 0 and weight.words.data_ptr() % 16 == 0, "x or the weight is not aligned to 16 bytes")
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    shape = (out.shape[1], weight.inputs, weight.padded, weight.group, int(gated), int(out.dtype is torch.float32))
    with torch.cuda.device_of(x):
        library.run(*pointers, rows.blocks(block), block, rows.total, rows.top_k, *shape, stream)


def linear(x: Tensor, weight: PackedInt, library: Library) -> Tensor:
    """x bfloat16 or float32 [..., in] times a 4-bit weight [out, in] -> [..., out] in x.dtype; products are bfloat16.

    Raises ValueError, RuntimeError.
    """
    check(x.dtype in (torch.bfloat16, torch.float32), f"x is {x.dtype}, not bfloat16 or float32")
    check(weight.experts == 1, f"a linear has one weight, not {weight.experts}")
    check(x.shape[-1] == weight.inputs, f"x has {x.shape[-1]} features, the weight {weight.inputs}")
    flat = x.reshape(-1, weight.inputs).bfloat16().contiguous()
    out = torch.empty(len(flat), weight.outputs, dtype=x.dtype, device=x.device)
    if len(flat):
        _launch(library, flat, weight, out, Rows(len(flat)), 8 if len(flat) <= 8 else 16, None, False)
    return out.view(*x.shape[:-1], weight.outputs)


def moe(x: Tensor, gate_up: PackedInt, down: PackedInt, ids: Tensor, weights: Tensor, library: Library) -> Tensor:
    """The same function of the same arguments as quantkit.kernels.triton.ops.moe. Raises ValueError, RuntimeError."""
    inner, hidden = check_layer(x, gate_up, down, ids, weights)
    if ids.numel() == 0:
        return torch.zeros_like(x)
    block = 8 if crowd(ids.numel() / gate_up.experts) <= 8 else 16
    rows = group(ids, gate_up.experts, block)
    act = torch.empty(rows.total, inner, dtype=torch.bfloat16, device=x.device)
    _launch(library, x.bfloat16().contiguous(), gate_up, act, rows, block, None, True)
    alone = ids.shape[1] == 1  # one expert a token: what it writes is the output
    out = torch.empty(rows.total, hidden, dtype=x.dtype if alone else torch.float32, device=x.device)
    _launch(library, act, down, out, rows.each(), block, weights.float().contiguous(), False)
    return out if alone else out.view(*ids.shape, hidden).sum(1).to(x.dtype)
