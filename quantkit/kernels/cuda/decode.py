"""Python's side of w4a16_decode.cu: W4A16 linear and mixture of experts where each weight meets 1 to 16 tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.cuda.build import Library
from quantkit.kernels.triton.lang import check, cut
from quantkit.kernels.triton.layout import Packed4
from quantkit.kernels.triton.routing import check_routing, sort_by_expert

__all__ = ["linear", "misfit", "moe"]


def misfit(weight: Packed4) -> str | None:
    """Why the kernel cannot read this weight, or None."""
    if weight.run != 64:
        return f"the decode kernel needs scales for a multiple of 64 columns, not {weight.group}"
    if weight.inputs % 8:
        return f"the decode kernel needs a multiple of 8 columns, not {weight.inputs}"
    return None


def _launch(
    library: Library,
    x: Tensor,
    weight: Packed4,
    out: Tensor,
    routing: tuple[Tensor, Tensor] | None,
    router: Tensor | None,
    block: int,
    top_k: int,
    gated: bool,
) -> None:
    """One product of x [tokens, in] into out [total, out]; checks what the kernel itself cannot."""
    slots, owners = routing or (None, None)
    tensors = (x, weight.words, weight.scale, weight.zero, slots, owners, router, out)
    reason = misfit(weight)
    check(reason is None, reason or "")
    for tensor in tensors:
        if tensor is not None:
            check(tensor.device == x.device and tensor.is_contiguous(), "tensors lie on several devices or with gaps")
            check(tensor.device.type == library.device, f"tensors lie on {tensor.device}, the kernel reads {library.device}")
    check(x.data_ptr() % 16 == 0 and weight.words.data_ptr() % 16 == 0, "x or the weight is not aligned to 16 bytes")
    blocks = cut(out.shape[0], block) if owners is None else owners.numel()
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else None
    sizes = (blocks, block, out.shape[0], top_k, out.shape[1], weight.inputs, weight.padded, weight.group, int(gated))
    with torch.cuda.device_of(x):
        library.run(*pointers, *sizes, stream)


def linear(x: Tensor, weight: Packed4, library: Library) -> Tensor:
    """x bfloat16 [..., in] times a 4-bit weight [out, in] -> bfloat16 [..., out]. Raises ValueError, RuntimeError."""
    check(x.dtype is torch.bfloat16, f"x is {x.dtype}, not bfloat16")
    check(weight.experts == 1, f"a linear has one weight, not {weight.experts}")
    check(x.shape[-1] == weight.inputs, f"x has {x.shape[-1]} features, the weight {weight.inputs}")
    rows = x.reshape(-1, weight.inputs).contiguous()
    out = torch.empty(rows.shape[0], weight.outputs, dtype=x.dtype, device=x.device)
    if rows.shape[0]:
        _launch(library, rows, weight, out, None, None, 8 if rows.shape[0] <= 8 else 16, 1, False)
    return out.view(*x.shape[:-1], weight.outputs)


def moe(x: Tensor, gate_up: Packed4, down: Packed4, ids: Tensor, weights: Tensor, library: Library) -> Tensor:
    """The same function of the same arguments as quantkit.kernels.triton.moe_w4a16.moe. Raises ValueError, RuntimeError."""
    check(x.dtype is torch.bfloat16, f"x is {x.dtype}, not bfloat16")
    check_routing(x, ids, weights)
    inner, hidden = down.inputs, down.outputs
    check(gate_up.outputs == 2 * inner, f"gate_up has {gate_up.outputs} rows, down {inner} columns: not twice as many")
    check(x.shape[1] == gate_up.inputs == hidden, f"hidden sizes differ: {x.shape[1]}, {gate_up.inputs}, {hidden}")
    check(gate_up.experts == down.experts, f"gate_up has {gate_up.experts} experts, down {down.experts}")
    total = ids.numel()
    if total == 0:
        return torch.zeros_like(x)
    block = 8 if total <= 8 * gate_up.experts else 16
    routing = sort_by_expert(ids, gate_up.experts, block)
    act = torch.empty(total, inner, dtype=x.dtype, device=x.device)
    _launch(library, x.contiguous(), gate_up, act, routing, None, block, ids.shape[1], True)
    out = torch.empty(total, hidden, dtype=torch.float32, device=x.device)
    _launch(library, act, down, out, routing, weights.float().contiguous(), block, 1, False)
    return out.view(*ids.shape, hidden).sum(1).to(x.dtype)
