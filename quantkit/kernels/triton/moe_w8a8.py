"""Fused W8A8 mixture of experts, FP8 or INT8: as moe_w4a16, with x and the activation in between rounded to 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.triton.activation import quantise
from quantkit.kernels.triton.lang import check, cut, jit, on_device, simulated, tl
from quantkit.kernels.triton.layout import Packed8
from quantkit.kernels.triton.routing import check_routing, sort_by_expert
from quantkit.kernels.triton.w8a8 import tile8
from quantkit.scheme import Activation

__all__ = ["block_sizes", "gate_up_kernel", "grouped_kernel", "moe"]


@jit
def step(
    acc: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    i: tl.tensor,
    BLOCKED: tl.constexpr,
) -> Any:
    """acc + a b; with block scales, those of the i-th 128 columns multiply the new part."""
    if BLOCKED:
        acc += tl.dot(a, b) * (tl.load(scale + i)[:, None] * tl.load(x_scale + i)[None, :])
    else:
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=128, out_dtype=acc.dtype)
    return acc


@jit
def scaled(acc: tl.tensor, x_scale: tl.tensor, scale: tl.tensor, BLOCKED: tl.constexpr) -> Any:
    """The finished sum as float32: with row scales they multiply now."""
    value = acc.to(tl.float32)
    if not BLOCKED:
        value = value * tl.load(scale)[:, None] * tl.load(x_scale)[None, :]
    return value


@jit
def scale_of(scale: tl.tensor, expert: tl.tensor, rows: tl.tensor, N: tl.tensor, K: tl.tensor, BLOCKED: tl.constexpr) -> Any:
    """Where the scales of these rows of an expert's weight [N, K] begin."""
    return scale + ((expert * ((N + 127) // 128) + rows // 128) * (K // 128) if BLOCKED else expert * N + rows)


@jit
def gate_up_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    slots: tl.tensor,
    owners: tl.tensor,
    out: tl.tensor,
    SLOTS: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    TOPK: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKED: tl.constexpr,
    ACC: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """out [SLOTS, N] = silu(x gate^T) * (x up^T); gate is rows 0..N of the expert's weight [2N, K], up the rest."""
    expert = tl.load(owners + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(slots + tl.program_id(0) * BM + tl.arange(0, BM))
    token = (tl.minimum(slot, SLOTS - 1) // TOPK).to(tl.int64)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    g = tl.minimum(rows, N - 1)
    ks = tl.arange(0, 128)
    gate_at = (expert * 2 * N + g)[:, None] * K + ks[None, :]
    x_at = token[None, :] * K + ks[:, None]
    gate_scale = scale_of(scale, expert, g, 2 * N, K, BLOCKED)
    up_scale = scale_of(scale, expert, g + N, 2 * N, K, BLOCKED)
    x_scale += token * (K // 128 if BLOCKED else 1)
    gate = tl.zeros((BN, BM), ACC)
    up = tl.zeros((BN, BM), ACC)
    for i in range(tl.cdiv(K, 128)):
        k = i * 128
        b = tile8(x, x_at + k, (k + ks)[:, None], K, EVEN, SIM)
        a = tile8(codes, gate_at + k, (k + ks)[None, :], K, EVEN, SIM)
        gate = step(gate, a, b, x_scale, gate_scale, i, BLOCKED)
        a = tile8(codes + N.to(tl.int64) * K, gate_at + k, (k + ks)[None, :], K, EVEN, SIM)
        up = step(up, a, b, x_scale, up_scale, i, BLOCKED)
    gated = scaled(gate, x_scale, gate_scale, BLOCKED)
    value = gated / (1.0 + tl.exp(-gated)) * scaled(up, x_scale, up_scale, BLOCKED)
    to = out + slot.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(to, value.to(out.dtype.element_ty), mask=(slot[None, :] < SLOTS) & (rows[:, None] < N))


@jit
def grouped_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    slots: tl.tensor,
    owners: tl.tensor,
    router: tl.tensor,
    out: tl.tensor,
    SLOTS: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKED: tl.constexpr,
    ACC: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """out float32 [SLOTS, N] = router [SLOTS] * (x [SLOTS, K] weight^T), each slot with its expert's weight [N, K]."""
    expert = tl.load(owners + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(slots + tl.program_id(0) * BM + tl.arange(0, BM))
    live = tl.minimum(slot, SLOTS - 1).to(tl.int64)
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    r = tl.minimum(rows, N - 1)
    ks = tl.arange(0, 128)
    at = (expert * N + r)[:, None] * K + ks[None, :]
    x_at = live[None, :] * K + ks[:, None]
    w_scale = scale_of(scale, expert, r, N, K, BLOCKED)
    x_scale += live * (K // 128 if BLOCKED else 1)
    acc = tl.zeros((BN, BM), ACC)
    for i in range(tl.cdiv(K, 128)):
        k = i * 128
        a = tile8(codes, at + k, (k + ks)[None, :], K, EVEN, SIM)
        b = tile8(x, x_at + k, (k + ks)[:, None], K, EVEN, SIM)
        acc = step(acc, a, b, x_scale, w_scale, i, BLOCKED)
    value = scaled(acc, x_scale, w_scale, BLOCKED) * tl.load(router + live)[None, :]
    tl.store(out + slot.to(tl.int64)[None, :] * N + rows[:, None], value, mask=(slot[None, :] < SLOTS) & (rows[:, None] < N))


def block_sizes(tokens_per_expert: float) -> tuple[int, int, int]:
    """(BM tokens, BN rows of the weight, warps) of a tile, from the mean number of tokens an expert gets."""
    if tokens_per_expert <= 8:
        return 16, 64, 4
    return (32, 64, 4) if tokens_per_expert <= 64 else (64, 128, 8)


def _check(x: Tensor, gate_up: Packed8, down: Packed8, activation: Activation) -> tuple[int, int]:
    """(inner, hidden), or ValueError."""
    check(x.dtype is torch.bfloat16, f"x is {x.dtype}, not bfloat16")
    check(activation.dynamic, "experts share one rounded x, so a scale calibrated for each expert cannot be used here")
    (experts, outputs, inputs), (others, hidden, inner) = gate_up.codes.shape, down.codes.shape
    check(experts == others, f"gate_up has {experts} experts, down {others}")
    check(outputs == 2 * inner, f"gate_up has {outputs} rows, down {inner} columns: not twice as many")
    check(x.shape[1] == inputs == hidden, f"hidden sizes differ: {x.shape[1]}, {inputs}, {hidden}")
    check((gate_up.codes.dtype, gate_up.blocked) == (down.codes.dtype, down.blocked), "gate_up and down are of two schemes")
    check(not gate_up.blocked or inner % 128 == 0, f"inner size {inner} is not a multiple of 128")
    return inner, hidden


def moe(x: Tensor, gate_up: Packed8, down: Packed8, ids: Tensor, weights: Tensor, activation: Activation) -> Tensor:
    """As quantkit.kernels.triton.moe_w4a16.moe, with 8-bit weights and activations rounded as `activation` says (dynamic).

    gate_up: [experts, 2 * inner, hidden], down: [experts, hidden, inner]; with block scales gate and up must each be whole
    blocks, inner a multiple of 128. Raises ValueError.
    """
    check_routing(x, ids, weights)
    inner, hidden = _check(x, gate_up, down, activation)
    total, sim, ints = ids.numel(), simulated(), gate_up.codes.dtype is torch.int8
    if total == 0:
        return torch.zeros_like(x)
    bm, bn, warps = block_sizes(total / gate_up.codes.shape[0])
    slots, owners = sort_by_expert(ids, gate_up.codes.shape[0], bm)
    router = weights.float().contiguous()
    on_device(x.contiguous(), gate_up.codes, gate_up.scale, down.codes, down.scale, slots, router)
    options = {"BM": bm, "BN": bn, "BLOCKED": gate_up.blocked, "SIM": sim, "num_warps": warps, "num_stages": 3}
    options["ACC"] = tl.int32 if ints and not sim else tl.float32
    codes, scales = quantise(x, activation)
    act = torch.empty(total, inner, dtype=torch.float32 if sim else torch.bfloat16, device=x.device)
    with torch.cuda.device_of(x):
        gate_up_kernel[(owners.numel(), cut(inner, bn))](
            *(codes, gate_up.codes, scales, gate_up.scale, slots, owners, act),
            *(total, inner, hidden, ids.shape[1]),
            EVEN=hidden % 128 == 0,
            **options,
        )
    codes, scales = quantise(act.bfloat16(), activation)
    out = torch.empty(total, hidden, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        grouped_kernel[(owners.numel(), cut(hidden, bn))](
            *(codes, down.codes, scales, down.scale, slots, owners, router, out),
            *(total, hidden, inner),
            EVEN=inner % 128 == 0,
            **options,
        )
    return out.view(*ids.shape, hidden).sum(1).to(x.dtype)
