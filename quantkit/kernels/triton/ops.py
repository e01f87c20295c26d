"""Quantized linears and mixtures of experts on the Triton kernels, for every kind of packed weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.checks import check
from quantkit.kernels.triton import tiles, w8a8, weight_only
from quantkit.kernels.triton.activation import quantize
from quantkit.kernels.triton.layout import BLOCK, Packed, Packed8, PackedInt
from quantkit.kernels.triton.routing import Rows, check_routing, group
from quantkit.kernels.triton.tiles import Tile

__all__ = ["check_layer", "linear", "linear_by_scratch", "moe", "moe_by_scratch"]


def _product(
    x: Tensor,
    weight: Packed,
    rows: Rows,
    tile: Tile,
    out_type: torch.dtype,
    owner: Tensor | None = None,
    router: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """[parts, rows, out] of the kernel that the weight needs. owner: the expert of each row, int64 [rows]."""
    if isinstance(weight, PackedInt):
        return weight_only.multiply(x.bfloat16(), weight, rows, tile, out_type, router, gated)
    if weight.input_scale is None:
        codes, scales = quantize(x, weight.activation)
    else:  # each expert has its own, so a token has other codes for each of its experts
        input_scales = weight.input_scale.expand(rows.total) if owner is None else weight.input_scale[owner]
        codes, scales = quantize(x, weight.activation, input_scales.contiguous(), rows.top_k)
        rows = rows.each()
    return w8a8.multiply(codes, scales, weight, rows, tile, out_type, router, gated)


def _check_input(x: Tensor) -> None:
    check(x.dtype in (torch.bfloat16, torch.float32), f"x is {x.dtype}, not bfloat16 or float32")


def linear(x: Tensor, weight: Packed, tile: Tile | None = None) -> Tensor:
    """x bfloat16 or float32 [..., in] times a weight [out, in] -> [..., out] in x.dtype; products are bfloat16 or 8-bit.

    tile: instead of the table's. Raises ValueError.
    """
    _check_input(x)
    check(weight.experts == 1, f"a linear has one weight, not {weight.experts}")
    check(x.shape[-1] == weight.inputs, f"x has {x.shape[-1]} features, the weight {weight.inputs}")
    flat = x.reshape(-1, weight.inputs).contiguous()
    if len(flat) == 0:
        return x.new_empty(*x.shape[:-1], weight.outputs)
    tile = tile or tiles.pick(weight.kind, len(flat))
    out = _product(flat, weight, Rows(len(flat)), tile, x.dtype)
    return (out.sum(0) if len(out) > 1 else out[0]).to(x.dtype).view(*x.shape[:-1], weight.outputs)


def linear_by_scratch(x: Tensor, weight: PackedInt) -> Tensor:
    """As `linear`, by widening the whole weight to bfloat16 first: for many tokens, where arithmetic decides."""
    _check_input(x)
    scratch = torch.empty(weight.outputs, weight.inputs, dtype=torch.bfloat16, device=x.device)
    return F.linear(x.bfloat16(), weight_only.dequantize(weight, 0, scratch)).to(x.dtype)


def check_layer(x: Tensor, gate_up: Packed, down: Packed, ids: Tensor, weights: Tensor) -> tuple[int, int]:
    """(inner, hidden) of experts whose weights fit each other, x and the routing. Raises ValueError."""
    _check_input(x)
    check_routing(x, ids, weights)
    inner, hidden = down.inputs, down.outputs
    check(gate_up.outputs == 2 * inner, f"gate_up has {gate_up.outputs} rows, down {inner} columns: not twice as many")
    check(x.shape[1] == gate_up.inputs == hidden, f"hidden sizes differ: {x.shape[1]}, {gate_up.inputs}, {hidden}")
    check(gate_up.experts == down.experts, f"gate_up has {gate_up.experts} experts, down {down.experts}")
    check(gate_up.kind == down.kind, f"gate_up is {gate_up.kind}, down {down.kind}")
    blocked = isinstance(gate_up, Packed8) and gate_up.blocked
    check(not blocked or inner % BLOCK == 0, f"inner size {inner} is not a multiple of {BLOCK}: gate and up share a block")
    return inner, hidden


def moe(x: Tensor, gate_up: Packed, down: Packed, ids: Tensor, weights: Tensor, tile: Tile | None = None) -> Tensor:
    """x bfloat16 or float32 [tokens, hidden] -> the same: sum over a token's experts of weight * down(silu(gate) * up).

    gate_up: [experts, 2 * inner, hidden], gate first. down: [experts, hidden, inner]. ids: integer [tokens, k] in
    [0, experts), each choice a slot of its own. weights: [tokens, k], used as they are (never renormalised). A shared expert
    is one more id with weight 1 on every token. Two launches, gate and up with SiLU, then down with the router's weights;
    what is between them is bfloat16. Slots are summed in order, so equal inputs give equal outputs. Raises ValueError.
    """
    inner, hidden = check_layer(x, gate_up, down, ids, weights)
    if ids.numel() == 0:
        return torch.zeros_like(x)
    tile = tile or tiles.pick(gate_up.kind, tiles.crowd(ids.numel() / gate_up.experts))
    rows = group(ids, gate_up.experts, tile.bm)
    owner, router = ids.flatten().long(), weights.float().contiguous()
    act = _product(x.contiguous(), gate_up, rows, tile, torch.bfloat16, owner, gated=True)[0]
    alone = ids.shape[1] == 1  # one expert a token: what it writes is the output, unless K was split
    out = _product(act, down, rows.each(), tile, x.dtype if alone else torch.float32, owner, router)
    return out[0] if alone and len(out) == 1 else out.view(-1, *ids.shape, hidden).sum((0, 2)).to(x.dtype)


def moe_by_scratch(x: Tensor, gate_up: PackedInt, down: PackedInt, ids: Tensor, weights: Tensor) -> Tensor:
    """As `moe`, by widening one weight after the other to bfloat16: for many tokens, where arithmetic decides.

    Waits for the GPU once, to learn how many tokens each expert has. Raises ValueError.
    """
    inner, hidden = check_layer(x, gate_up, down, ids, weights)
    flat = ids.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=gate_up.experts).tolist()
    out = torch.zeros(len(flat), hidden, dtype=torch.float32, device=x.device)
    wide = torch.empty(2 * inner * hidden, dtype=torch.bfloat16, device=x.device)
    for expert, mine in enumerate(order.split(counts)):
        if len(mine):
            rows = x[mine // ids.shape[1]].bfloat16()
            gate, up = F.linear(rows, weight_only.dequantize(gate_up, expert, wide.view(2 * inner, hidden))).chunk(2, 1)
            narrow = weight_only.dequantize(down, expert, wide[: inner * hidden].view(hidden, inner))
            out[mine] = F.linear(F.silu(gate.float()).mul_(up).bfloat16(), narrow).float()
    return (out * weights.flatten()[:, None]).view(*ids.shape, hidden).sum(1).to(x.dtype)
