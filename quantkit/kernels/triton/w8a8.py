"""FP8 e4m3 or INT8 weights times an input rounded to the same: both operands are 8-bit, the scales multiply the sum.

FP8 sums of Hopper's tensor cores keep few bits, so they are moved to float32 every 128 values of K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.checks import check, cut
from quantkit.kernels.triton.grouped import finish, rows_of_weight, rows_of_x
from quantkit.kernels.triton.lang import OPTIONS, jit, kernel_of, machine, on_device, simulated, tl
from quantkit.kernels.triton.layout import BLOCK, Packed8
from quantkit.kernels.triton.routing import Rows
from quantkit.kernels.triton.tiles import Tile, splits, that_fits

__all__ = ["kernel", "multiply", "step_bytes", "tile8"]


@jit
def tile8(base: tl.tensor, k: tl.tensor, K: tl.tensor, EVEN: tl.constexpr, SIM: tl.constexpr) -> Any:
    """A tile of 8-bit codes, zero beyond K; under SIM as float32, exact for both kinds."""
    tile = tl.load(base) if EVEN else tl.load(base, mask=k < K, other=0.0)
    return tile.to(tl.float32) if SIM else tile


@kernel_of("SLOTS", "STEPS", "PER_PART")
def kernel(
    x: tl.tensor,
    codes: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    slots: tl.tensor,
    owners: tl.tensor,
    places: tl.tensor,
    router: tl.tensor,
    out: tl.tensor,
    SLOTS: tl.tensor,
    TOPK: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    STEPS: tl.tensor,
    PER_PART: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKED: tl.constexpr,
    GATED: tl.constexpr,
    GROUPED: tl.constexpr,
    ROUTED: tl.constexpr,
    ACC: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """out [parts, SLOTS, N] = x [., K] codes times the expert's codes, times scales; `finish` says what is joined.

    x_scale [.] and scale [experts, rows]; BLOCKED: [., K / 128] and [experts, ceil(rows / 128), K / 128], K whole blocks.
    """
    expert, token = rows_of_x(slots, owners, SLOTS, TOPK, BM, GROUPED)
    if expert < 0:
        return
    row = rows_of_weight(N, BN, GATED)
    in_all = N * 2 if GATED else N
    k = tl.arange(0, 128)
    codes += (expert * in_all + row)[:, None] * K + k[None, :]
    x += token[None, :] * K + k[:, None]
    if BLOCKED:
        scale += (expert * ((in_all + 127) // 128) + row // 128) * (K // 128)
        x_scale += token * (K // 128)
    else:
        scale += expert * in_all + row
        x_scale += token
    acc = tl.zeros((BN, BM), ACC)
    first = tl.program_id(2) * PER_PART
    for step in range(first, tl.minimum(first + PER_PART, STEPS)):
        a = tile8(codes + step * 128, (k + step * 128)[None, :], K, EVEN, SIM)
        b = tile8(x + step * 128, (k + step * 128)[:, None], K, EVEN, SIM)
        if BLOCKED:
            acc += tl.dot(a, b) * (tl.load(scale + step)[:, None] * tl.load(x_scale + step)[None, :])
        else:
            acc = tl.dot(a, b, acc, max_num_imprecise_acc=128, out_dtype=ACC)
    value = acc.to(tl.float32)
    if not BLOCKED:
        value = value * tl.load(scale)[:, None] * tl.load(x_scale)[None, :]
    finish(value, places, router, out, SLOTS, N, BM, BN, GATED, GROUPED, ROUTED)


def step_bytes(tile: Tile) -> int:
    """Shared memory that a stage takes at most."""
    return BLOCK * (tile.bn + tile.bm)


def multiply(
    codes: Tensor,
    scales: Tensor,
    weight: Packed8,
    rows: Rows,
    tile: Tile,
    out_type: torch.dtype,
    router: Tensor | None,
    gated: bool,
) -> Tensor:
    """Rounded x, codes [., in] and float32 scales [., 1 or in / 128], times each row's expert's weight. Otherwise as
    weight_only.multiply. Raises ValueError."""
    fits = codes.dtype is weight.codes.dtype and codes.shape[1] == weight.inputs
    check(fits, f"x {codes.dtype} {tuple(codes.shape)} does not fit the weight")
    steps = cut(weight.inputs, BLOCK)
    check(scales.shape == (codes.shape[0], steps if weight.blocked else 1), f"x's scales are {tuple(scales.shape)}")
    on_device(codes, scales, weight.codes, weight.scale, rows.slots, rows.owners, router)
    sim, (processors, memory) = simulated(), machine(codes.device)
    features = weight.outputs // 2 if gated else weight.outputs
    grid = rows.blocks(tile.bm), cut(weight.outputs, tile.bn)
    per_part = steps if gated else cut(steps, splits(tile, grid[0] * grid[1], steps, processors))
    parts = cut(steps, per_part)
    dtype = torch.float32 if sim or parts > 1 else out_type
    out = torch.empty(parts, rows.total, features, dtype=dtype, device=codes.device)
    slots, owners = (out if tensor is None else tensor for tensor in (rows.slots, rows.owners))
    with torch.cuda.device_of(codes):
        kernel[(*grid, parts)](
            *(codes, weight.codes, scales, weight.scale, slots, owners, slots, out if router is None else router, out),
            *(rows.total, rows.top_k, features, weight.inputs, steps, per_part),
            BM=tile.bm,
            BN=tile.bn,
            EVEN=weight.inputs % BLOCK == 0,
            BLOCKED=weight.blocked,
            GATED=gated,
            GROUPED=rows.grouped,
            ROUTED=router is not None,
            ACC=tl.int32 if codes.dtype is torch.int8 and not sim else tl.float32,
            SIM=sim,
            num_warps=tile.warps,
            num_stages=that_fits(tile, step_bytes(tile), memory),
            **OPTIONS,
        )
    return out if parts > 1 else out.to(out_type)
