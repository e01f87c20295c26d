"""Fused W4A16 mixture of experts in two grouped launches.

The first multiplies gate and up and joins them with SiLU, the second multiplies down and applies the router's weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.triton.lang import check, cut, jit, on_device, simulated, tl
from quantkit.kernels.triton.layout import Packed4
from quantkit.kernels.triton.routing import check_routing, sort_by_expert
from quantkit.kernels.triton.w4a16 import widen, x_tile

__all__ = ["block_sizes", "gate_up_kernel", "grouped_kernel", "moe"]


@jit
def gate_up_kernel(
    x: tl.tensor,
    words: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    slots: tl.tensor,
    owners: tl.tensor,
    out: tl.tensor,
    SLOTS: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    SPANS: tl.tensor,
    GROUPS: tl.tensor,
    GROUP: tl.tensor,
    TOPK: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
    ASYM: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """out [SLOTS, N] = silu(x gate^T) * (x up^T); gate is rows 0..N of the expert's weight [2N, K], up the rest."""
    expert = tl.load(owners + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(slots + tl.program_id(0) * BM + tl.arange(0, BM))
    token = tl.minimum(slot, SLOTS - 1) // TOPK
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.minimum(rows, N - 1)
    u = g + N
    at = words + expert * 2 * N * (SPANS * RUN) + tl.arange(0, RUN)[None, :]
    at_gate, at_up = at + g.to(tl.int64)[:, None] * (SPANS * RUN), at + u.to(tl.int64)[:, None] * (SPANS * RUN)
    scale += expert * GROUPS * 2 * N
    zero += expert * GROUPS * 2 * N
    gate = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for span in range(SPANS):
        k = span * 2 * RUN
        a, b = tl.load(at_gate + span * RUN), tl.load(at_up + span * RUN)
        tile = x_tile(x, token, k, K, RUN, EVEN, SIM)
        gate = tl.dot(widen(a & 0xF, scale, zero, g, k, 2 * N, GROUP, ASYM, SIM), tile, gate)
        up = tl.dot(widen(b & 0xF, scale, zero, u, k, 2 * N, GROUP, ASYM, SIM), tile, up)
        tile = x_tile(x, token, k + RUN, K, RUN, EVEN, SIM)
        gate = tl.dot(widen(a >> 4, scale, zero, g, k + RUN, 2 * N, GROUP, ASYM, SIM), tile, gate)
        up = tl.dot(widen(b >> 4, scale, zero, u, k + RUN, 2 * N, GROUP, ASYM, SIM), tile, up)
    value = gate / (1.0 + tl.exp(-gate)) * up
    to = out + slot.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(to, value.to(out.dtype.element_ty), mask=(slot[None, :] < SLOTS) & (rows[:, None] < N))


@jit
def grouped_kernel(
    x: tl.tensor,
    words: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    slots: tl.tensor,
    owners: tl.tensor,
    router: tl.tensor,
    out: tl.tensor,
    SLOTS: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    SPANS: tl.tensor,
    GROUPS: tl.tensor,
    GROUP: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
    ASYM: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """out float32 [SLOTS, N] = router [SLOTS] * (x [SLOTS, K] weight^T), each slot with its expert's weight [N, K]."""
    expert = tl.load(owners + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(slots + tl.program_id(0) * BM + tl.arange(0, BM))
    live = tl.minimum(slot, SLOTS - 1)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    r = tl.minimum(rows, N - 1)
    at = words + (expert * N + r)[:, None] * (SPANS * RUN) + tl.arange(0, RUN)[None, :]
    scale += expert * GROUPS * N
    zero += expert * GROUPS * N
    acc = tl.zeros((BN, BM), tl.float32)
    for span in range(SPANS):
        k = span * 2 * RUN
        q = tl.load(at + span * RUN)
        low = widen(q & 0xF, scale, zero, r, k, N, GROUP, ASYM, SIM)
        acc = tl.dot(low, x_tile(x, live, k, K, RUN, EVEN, SIM), acc)
        high = widen(q >> 4, scale, zero, r, k + RUN, N, GROUP, ASYM, SIM)
        acc = tl.dot(high, x_tile(x, live, k + RUN, K, RUN, EVEN, SIM), acc)
    acc *= tl.load(router + live)[None, :]
    to = out + slot.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(to, acc, mask=(slot[None, :] < SLOTS) & (rows[:, None] < N))


def block_sizes(tokens_per_expert: float) -> tuple[int, int, int]:
    """(BM tokens, BN rows of the weight, warps) of a tile, from the mean number of tokens an expert gets."""
    if tokens_per_expert <= 8:
        return 16, 64, 4
    if tokens_per_expert <= 64:
        return 32, 64, 4
    return 64, 128, 8


def _common(weight: Packed4) -> dict[str, Any]:
    """What both kernels are told of a weight."""
    spans = weight.padded // (2 * weight.run)
    sizes = {"K": weight.inputs, "SPANS": spans, "GROUPS": weight.scale.shape[1], "GROUP": weight.group, "RUN": weight.run}
    flags = {"EVEN": weight.padded == weight.inputs, "ASYM": weight.zero is not None, "SIM": simulated()}
    return {**sizes, **flags, "num_stages": 3}


def moe(x: Tensor, gate_up: Packed4, down: Packed4, ids: Tensor, weights: Tensor) -> Tensor:
    """x bfloat16 [tokens, hidden] -> the same: sum over a token's experts of weight * down(silu(gate) * up).

    gate_up: [experts, 2 * inner, hidden], gate first. down: [experts, hidden, inner]. ids: integer [tokens, k] in
    [0, experts), each choice a slot of its own. weights: [tokens, k], used as they are (never renormalised). A shared expert
    is one more id with weight 1 on every token. Slots are summed in order, so equal inputs give equal outputs.
    Raises ValueError.
    """
    check(x.dtype is torch.bfloat16, f"x is {x.dtype}, not bfloat16")
    check_routing(x, ids, weights)
    inner, hidden = down.inputs, down.outputs
    check(gate_up.outputs == 2 * inner, f"gate_up has {gate_up.outputs} rows, down {inner} columns: not twice as many")
    check(x.shape[1] == gate_up.inputs == hidden, f"hidden sizes differ: {x.shape[1]}, {gate_up.inputs}, {hidden}")
    check(gate_up.experts == down.experts, f"gate_up has {gate_up.experts} experts, down {down.experts}")
    slots_in_all = ids.numel()
    if slots_in_all == 0:
        return torch.zeros_like(x)
    x, router = x.contiguous(), weights.float().contiguous()
    bm, bn, warps = block_sizes(slots_in_all / gate_up.experts)
    slots, owners = sort_by_expert(ids, gate_up.experts, bm)
    on_device(x, gate_up.words, gate_up.scale, gate_up.zero, down.words, down.scale, down.zero, router, slots)
    act = torch.empty(slots_in_all, inner, dtype=torch.float32 if simulated() else x.dtype, device=x.device)
    blocks = owners.numel()
    tile = {"BM": bm, "BN": bn, "num_warps": warps}
    with torch.cuda.device_of(x):
        gate_up_kernel[(blocks, cut(inner, bn))](
            x,
            gate_up.words,
            gate_up.scale,
            gate_up.scale if gate_up.zero is None else gate_up.zero,
            slots,
            owners,
            act,
            SLOTS=slots_in_all,
            N=inner,
            TOPK=ids.shape[1],
            **tile,
            **_common(gate_up),
        )
    out = torch.empty(slots_in_all, hidden, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        grouped_kernel[(blocks, cut(hidden, bn))](
            act,
            down.words,
            down.scale,
            down.scale if down.zero is None else down.zero,
            slots,
            owners,
            router,
            out,
            SLOTS=slots_in_all,
            N=hidden,
            **tile,
            **_common(down),
        )
    return out.view(*ids.shape, hidden).sum(1).to(x.dtype)
