"""W4A16 linear: 4-bit weights are widened to bfloat16 in registers, next to the tensor cores.

The product is computed transposed, weight [out, in] times x^T [in, tokens]. Hopper's MMA takes its left operand from
registers, so the widened weight never returns to shared memory, and its right side may be as narrow as 8 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.triton.lang import check, cut, jit, on_device, simulated, tl
from quantkit.kernels.triton.layout import Packed4

__all__ = ["block_sizes", "linear", "linear_kernel", "widen", "x_tile"]


@jit
def widen(
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    rows: tl.tensor,
    k: tl.tensor,
    N: tl.tensor,
    GROUP: tl.tensor,
    ASYM: tl.constexpr,
    SIM: tl.constexpr,
) -> Any:
    """Nibbles [BN, run] of the columns from k -> weights, (nibble - 8 - zero) * scale, rounded once to bfloat16.

    0x4300 | q is the bfloat16 128 + q: the subtraction is exact and costs no conversion.
    """
    at = (k // GROUP) * N + rows
    s = tl.load(scale + at)[:, None]
    base = tl.full((rows.shape[0], 1), 136.0, tl.float32)
    if ASYM:
        base += tl.load(zero + at)[:, None].to(tl.float32)
    if SIM:
        return (codes.to(tl.float32) + 128.0 - base) * s.to(tl.float32)
    return ((codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - base.to(tl.bfloat16)) * s


@jit
def x_tile(
    x: tl.tensor, tokens: tl.tensor, k: tl.tensor, K: tl.tensor, RUN: tl.constexpr, EVEN: tl.constexpr, SIM: tl.constexpr
) -> Any:
    """x^T [run, BM]: the columns from k of the given rows of x [., K]; zero beyond K."""
    ks = k + tl.arange(0, RUN)
    at = x + tokens.to(tl.int64)[None, :] * K + ks[:, None]
    tile = tl.load(at) if EVEN else tl.load(at, mask=ks[:, None] < K, other=0.0)
    return tile.to(tl.float32) if SIM else tile


@jit
def linear_kernel(
    x: tl.tensor,
    words: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    SPANS: tl.tensor,
    PER_SPLIT: tl.tensor,
    GROUP: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RUN: tl.constexpr,
    EVEN: tl.constexpr,
    ASYM: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """out [splits, M, N]: the tile (program 0: rows of the weight, 1: tokens) over split 2's share of K."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    first = tl.program_id(2) * PER_SPLIT
    r, m = tl.minimum(rows, N - 1), tl.minimum(tokens, M - 1)
    at = words + r.to(tl.int64)[:, None] * (SPANS * RUN) + tl.arange(0, RUN)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for span in range(first, tl.minimum(first + PER_SPLIT, SPANS)):
        q = tl.load(at + span * RUN)
        k = span * 2 * RUN
        low = widen(q & 0xF, scale, zero, r, k, N, GROUP, ASYM, SIM)
        acc = tl.dot(low, x_tile(x, m, k, K, RUN, EVEN, SIM), acc)
        high = widen(q >> 4, scale, zero, r, k + RUN, N, GROUP, ASYM, SIM)
        acc = tl.dot(high, x_tile(x, m, k + RUN, K, RUN, EVEN, SIM), acc)
    to = out + tl.program_id(2).to(tl.int64) * M * N + tokens.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(tokens[None, :] < M) & (rows[:, None] < N))


def block_sizes(tokens: int) -> tuple[int, int, int]:
    """(BM tokens, BN rows of the weight, warps) of a tile, for that many tokens to one weight."""
    if tokens <= 16:
        return 16, 64, 4
    if tokens <= 32:
        return 32, 64, 4
    return (64, 128, 8) if tokens <= 256 else (128, 128, 8)


def splits(tiles: int, spans: int, processors: int) -> int:
    """Into how many parts K is cut: enough to give each processor a tile, with four spans or more left to each part."""
    return max(1, min(processors // tiles, spans // 4, 8))


def linear(x: Tensor, weight: Packed4) -> Tensor:
    """x bfloat16 [..., in] times a 4-bit weight [out, in] -> bfloat16 [..., out]. Raises ValueError."""
    check(x.dtype is torch.bfloat16, f"x is {x.dtype}, not bfloat16")
    check(weight.experts == 1, f"a linear has one weight, not {weight.experts}")
    check(x.shape[-1] == weight.inputs, f"x has {x.shape[-1]} features, the weight {weight.inputs}")
    x2 = x.reshape(-1, weight.inputs).contiguous()
    on_device(x2, weight.words, weight.scale, weight.zero)
    m, n, spans, sim = x2.shape[0], weight.outputs, weight.padded // (2 * weight.run), simulated()
    if m == 0:
        return x.new_empty(*x.shape[:-1], n)
    bm, bn, warps = block_sizes(m)
    grid = cut(n, bn), cut(m, bm)
    processors = 8 if sim else torch.cuda.get_device_properties(x.device).multi_processor_count
    per_split = cut(spans, splits(grid[0] * grid[1], spans, processors))
    parts = cut(spans, per_split)
    out = torch.empty(parts, m, n, dtype=torch.float32 if sim or parts > 1 else x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        linear_kernel[(*grid, parts)](
            x2,
            weight.words,
            weight.scale,
            weight.scale if weight.zero is None else weight.zero,
            out,
            m,
            n,
            weight.inputs,
            spans,
            per_split,
            weight.group,
            BM=bm,
            BN=bn,
            RUN=weight.run,
            EVEN=weight.padded == weight.inputs,
            ASYM=weight.zero is not None,
            SIM=sim,
            num_warps=warps,
            num_stages=3,
        )
    total = out.sum(0) if parts > 1 else out[0]
    return total.to(x.dtype).view(*x.shape[:-1], n)
