"""W8A8 linear, FP8 e4m3 or INT8: both operands are 8-bit, the scales multiply the sum.

Like W4A16 the product is transposed, weight times x^T. FP8 sums of Hopper's tensor cores keep few bits, so they are moved to
float32 every 128 values of K.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.triton.activation import quantise
from quantkit.kernels.triton.lang import check, cut, jit, on_device, simulated, tl
from quantkit.kernels.triton.layout import Packed8
from quantkit.scheme import Activation

__all__ = ["block_kernel", "block_sizes", "linear", "multiply", "row_kernel", "tile8"]


@jit
def tile8(base: tl.tensor, at: tl.tensor, k: tl.tensor, K: tl.tensor, EVEN: tl.constexpr, SIM: tl.constexpr) -> Any:
    """A tile of 8-bit codes, zero beyond K; under SIM as float32, exact for both kinds."""
    tile = tl.load(base + at) if EVEN else tl.load(base + at, mask=k < K, other=0.0)
    return tile.to(tl.float32) if SIM else tile


@jit
def row_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    INT8: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """out [M, N] = (x [M, K] codes [N, K]^T) * x_scale [M] * scale [N]."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    r, m = tl.minimum(rows, N - 1), tl.minimum(tokens, M - 1)
    ks = tl.arange(0, BK)
    w_at, x_at = r.to(tl.int64)[:, None] * K + ks[None, :], m.to(tl.int64)[None, :] * K + ks[:, None]
    acc = tl.zeros((BN, BM), tl.int32 if INT8 and not SIM else tl.float32)
    for k in range(0, K, BK):
        a = tile8(codes, w_at + k, (k + ks)[None, :], K, EVEN, SIM)
        b = tile8(x, x_at + k, (k + ks)[:, None], K, EVEN, SIM)
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=128, out_dtype=acc.dtype)
    value = acc.to(tl.float32) * tl.load(scale + r)[:, None] * tl.load(x_scale + m)[None, :]
    to = out + tokens.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(to, value.to(out.dtype.element_ty), mask=(tokens[None, :] < M) & (rows[:, None] < N))


@jit
def block_kernel(
    x: tl.tensor,
    codes: tl.tensor,
    x_scale: tl.tensor,
    scale: tl.tensor,
    out: tl.tensor,
    M: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """out [M, N]: FP8 with x_scale [M, K / 128] and scale [ceil(N / 128), K / 128]; BN divides 128, K is whole blocks."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    r, m = tl.minimum(rows, N - 1), tl.minimum(tokens, M - 1)
    ks = tl.arange(0, 128)
    w_at, x_at = r.to(tl.int64)[:, None] * K + ks[None, :], m.to(tl.int64)[None, :] * K + ks[:, None]
    w_scale = scale + (tl.program_id(0) * BN // 128) * (K // 128)
    x_scale += m * (K // 128)
    acc = tl.zeros((BN, BM), tl.float32)
    for k in range(K // 128):
        a = tile8(codes, w_at + k * 128, ks, K, True, SIM)
        b = tile8(x, x_at + k * 128, ks, K, True, SIM)
        acc += tl.dot(a, b) * (tl.load(w_scale + k) * tl.load(x_scale + k))[None, :]
    to = out + tokens.to(tl.int64)[None, :] * N + rows[:, None]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(tokens[None, :] < M) & (rows[:, None] < N))


def block_sizes(tokens: int, blocked: bool) -> tuple[int, int, int]:
    """(BM tokens, BN rows of the weight, warps) of a tile. Block scales keep two sums a thread, hence the smaller tile."""
    if tokens <= 16:
        return 16, 64, 4
    if tokens <= 64:
        return 64, 64, 4
    return (64, 128, 8) if blocked else (128, 128, 8)


def multiply(codes: Tensor, scales: Tensor, weight: Packed8) -> Tensor:
    """Rounded x, codes [tokens, in] and scales [tokens, 1 or in / 128], times the weight -> bfloat16. Raises ValueError."""
    check(weight.codes.shape[0] == 1, f"a linear has one weight, not {weight.codes.shape[0]}")
    check(codes.ndim == 2 and codes.shape[1] == weight.codes.shape[2], f"x {tuple(codes.shape)} does not fit the weight")
    check(codes.dtype is weight.codes.dtype, f"x is {codes.dtype}, the weight {weight.codes.dtype}")
    (m, k), n, sim = codes.shape, weight.codes.shape[1], simulated()
    check(scales.shape == (m, k // 128 if weight.blocked else 1), f"x's scales are {tuple(scales.shape)}")
    on_device(codes, scales, weight.codes, weight.scale)
    out = torch.empty(m, n, dtype=torch.float32 if sim else torch.bfloat16, device=codes.device)
    if m == 0:
        return out.bfloat16()
    bm, bn, warps = block_sizes(m, weight.blocked)
    grid, given = (cut(n, bn), cut(m, bm)), (codes, weight.codes, scales, weight.scale, out, m, n, k)
    if weight.blocked:
        with torch.cuda.device_of(codes):
            block_kernel[grid](*given, BM=bm, BN=bn, SIM=sim, num_warps=warps, num_stages=3)
    else:
        ints = codes.dtype is torch.int8
        with torch.cuda.device_of(codes):
            row_kernel[grid](
                *given, BM=bm, BN=bn, BK=128, EVEN=k % 128 == 0, INT8=ints, SIM=sim, num_warps=warps, num_stages=3
            )
    return out.bfloat16()


def linear(x: Tensor, weight: Packed8, activation: Activation, input_scale: Tensor | None = None) -> Tensor:
    """x bfloat16 [..., in], rounded as `activation` says, times an 8-bit weight [out, in] -> bfloat16 [..., out].

    input_scale: [1], for a static activation. Raises ValueError.
    """
    check(x.dtype is torch.bfloat16, f"x is {x.dtype}, not bfloat16")
    codes, scales = quantise(x.reshape(-1, x.shape[-1]), activation, input_scale)
    return multiply(codes, scales, weight).view(*x.shape[:-1], weight.codes.shape[1])
