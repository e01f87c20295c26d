"""4- and 8-bit integer weights times an unrounded input: weights are widened to bfloat16 in registers, next to the MMA.

The product is transposed because Hopper's MMA takes its left operand from registers, so the widened weight never returns to
shared memory, and its right side may be as narrow as 8 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quantkit.kernels.checks import check, cut
from quantkit.kernels.triton.grouped import finish, rows_of_weight, rows_of_x
from quantkit.kernels.triton.lang import OPTIONS, jit, kernel_of, machine, on_device, simulated, tl
from quantkit.kernels.triton.layout import PackedInt
from quantkit.kernels.triton.routing import Rows
from quantkit.kernels.triton.tiles import Tile, splits, that_fits

__all__ = ["dequantize", "early", "kernel", "multiply", "step_bytes", "widen", "widen_kernel"]


@jit
def widen(words: tl.tensor, base: tl.tensor, SHIFT: tl.constexpr, BITS: tl.constexpr, SIM: tl.constexpr) -> Any:
    """The fields at bit SHIFT of words [BN, run] -> codes (minus zero points), exact in bfloat16 (SIM: float32).

    0x4300 | n is the bfloat16 128 + n for n < 128. 4 bits: base is 136 + zero point. 8 bits: n = u % 128, and what is taken
    away is 128 or, for u < 128, 256; base has no part in it. The assembly widens a pair of words in a register at once.
    """
    if SIM:
        value = ((words >> SHIFT) & (2**BITS - 1)).to(tl.float32)
        value = value + 128.0 - base if BITS == 4 else value - 128.0
    elif BITS == 4:
        value = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $1, {SHIFT}; lop3.b32 $0, t, 0x000F000F, 0x43004300, 0xEA; }}",  # (t & a) | b
            *("=r,r", [words]),
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
        value -= base
    else:
        low, top = tl.inline_asm_elementwise(
            f"{{ .reg .b32 t; shr.b32 t, $2, {SHIFT}; lop3.b32 $0, t, 0x007F007F, 0x43004300, 0xEA;"
            " lop3.b32 $1, t, 0x00800080, 0x43804380, 0x6A; }",  # (t & a) ^ b
            *("=r,=r,r", [words]),
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
        value = low - top
    return value


@jit
def scale_of(pair: tl.tensor, n: tl.constexpr) -> Any:
    """The lower (n even) or upper half of words [rows], bfloat16, as float32 [rows, 1]."""
    bits = pair << 16 if n % 2 == 0 else pair & -65536
    return bits.to(tl.float32, bitcast=True)[:, None]


@jit
def base_of(zeros: tl.tensor, n: tl.constexpr, ASYM: tl.constexpr, SIM: tl.constexpr) -> Any:
    """136 + byte n of zeros [rows], as `widen` takes them: [rows, 1]."""
    base = tl.full((zeros.shape[0], 1), 136.0, tl.float32)
    if ASYM:
        base += ((zeros << (24 - 8 * n)) >> 24)[:, None].to(tl.float32)
    return base if SIM else base.to(tl.bfloat16)


@jit
def x_tile(x: tl.tensor, k: tl.tensor, K: tl.tensor, EVEN: tl.constexpr, SIM: tl.constexpr) -> Any:
    """x^T [run, BM] from pointers to its columns k; zero beyond K."""
    tile = tl.load(x) if EVEN else tl.load(x, mask=(k < K)[:, None], other=0.0)
    return tile.to(tl.float32) if SIM else tile


@kernel_of("SLOTS", "SPANS", "PER_PART", "KINDS")
def kernel(
    x: tl.tensor,
    words: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    slots: tl.tensor,
    owners: tl.tensor,
    places: tl.tensor,
    router: tl.tensor,
    out: tl.tensor,
    SLOTS: tl.tensor,
    TOPK: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    SPANS: tl.tensor,
    PER_PART: tl.tensor,
    KINDS: tl.tensor,
    ALIKE: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    RUN: tl.constexpr,
    BITS: tl.constexpr,
    SHARED: tl.constexpr,
    EARLY: tl.constexpr,
    EVEN: tl.constexpr,
    ASYM: tl.constexpr,
    GATED: tl.constexpr,
    GROUPED: tl.constexpr,
    ROUTED: tl.constexpr,
    SIM: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """out [parts, SLOTS, N] = x [., K] times the expert's weight; see `finish` and `rows_of_weight` for what is joined.

    SHARED consecutive fields have one scale, ALIKE consecutive spans the same scales, of which there are KINDS. EARLY: a
    scale multiplies the weights, rounded once to bfloat16; else their sum. What the loop loads is copied STAGES - 1
    steps ahead.
    """
    expert, token = rows_of_x(slots, owners, SLOTS, TOPK, BM, GROUPED)
    if expert < 0:
        return
    row = rows_of_weight(N, BN, GATED)
    in_all = N * 2 if GATED else N
    k = tl.arange(0, RUN)
    words += (expert * in_all + row)[:, None] * (SPANS * RUN) + k[None, :]
    x += token[None, :] * K + k[:, None]
    LOADS: tl.constexpr = (16 // BITS // SHARED + 1) // 2
    scale += expert * KINDS * LOADS * in_all + row
    zero += expert * KINDS * in_all + row
    acc = tl.zeros((BN, BM), tl.float32)
    first = tl.program_id(2) * PER_PART
    for span in tl.range(first, tl.minimum(first + PER_PART, SPANS), num_stages=STAGES):
        packed, kind = tl.load(words + span * RUN), span // ALIKE
        zeros = tl.load(zero + kind * in_all) if ASYM else row.to(tl.int32)
        pair = tl.load(scale + kind * LOADS * in_all)
        for n in tl.static_range(16 // BITS // SHARED):
            if n == 2:
                pair = tl.load(scale + (kind * LOADS + 1) * in_all)
            s, base = scale_of(pair, n), base_of(zeros, n, ASYM, SIM)
            begin = (span * (16 // BITS) + n * SHARED) * RUN
            part = tl.zeros((BN, BM), tl.float32)
            for f in tl.static_range(SHARED):
                codes = widen(packed, base, (n * SHARED + f) * BITS, BITS, SIM)
                tile = x_tile(x + begin + f * RUN, k + begin + f * RUN, K, EVEN, SIM)
                if EARLY:
                    acc = tl.dot(codes * s.to(codes.dtype), tile, acc)
                else:
                    part = tl.dot(codes, tile, part)
            if not EARLY:
                acc += part * s
    finish(acc, places, router, out, SLOTS, N, BM, BN, GATED, GROUPED, ROUTED)


@jit
def widen_kernel(
    words: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    out: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    SPANS: tl.tensor,
    ALIKE: tl.tensor,
    BN: tl.constexpr,
    RUN: tl.constexpr,
    BITS: tl.constexpr,
    SHARED: tl.constexpr,
    ASYM: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """out [N, K]: an expert's weight itself. Programs are (tile of rows, span)."""
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    r, k = tl.minimum(row, N - 1), tl.arange(0, RUN)
    span = tl.program_id(1)
    packed = tl.load(words + r.to(tl.int64)[:, None] * (SPANS * RUN) + span * RUN + k[None, :])
    kind = span // ALIKE
    LOADS: tl.constexpr = (16 // BITS // SHARED + 1) // 2
    zeros = tl.load(zero + kind * N + r) if ASYM else r
    for f in tl.static_range(16 // BITS):
        begin = (span * (16 // BITS) + f) * RUN
        pair = tl.load(scale + (kind * LOADS + f // SHARED // 2) * N + r)
        codes = widen(packed, base_of(zeros, f // SHARED, ASYM, SIM), f * BITS, BITS, SIM)
        value = codes * scale_of(pair, f // SHARED).to(codes.dtype)
        mask = (row < N)[:, None] & (begin + k < K)[None, :]
        tl.store(out + row.to(tl.int64)[:, None] * K + begin + k[None, :], value.to(out.dtype.element_ty), mask=mask)


def early(bm: int, run: int, shared: int) -> bool:
    """Whether fewer instructions multiply the weights by their scale (two at once) than the sums of `shared` fields."""
    return 2 * bm > shared * run


def step_bytes(tile: Tile, run: int, per_word: int) -> int:
    """Shared memory that a stage takes at most."""
    return 2 * run * (tile.bn + per_word * tile.bm) + 12 * tile.bn


def multiply(
    x: Tensor, weight: PackedInt, rows: Rows, tile: Tile, out_type: torch.dtype, router: Tensor | None, gated: bool
) -> Tensor:
    """x bfloat16 [., in] times each row's expert's weight -> [parts, rows, out], to be summed over parts of K.

    gated: gate and up joined by SiLU, out / 2 features, one part. router: float32 [rows], multiplied with. More parts than
    one are float32, else out_type. Raises ValueError.
    """
    check(x.dtype is torch.bfloat16 and x.shape[1] == weight.inputs, f"x {x.dtype} {tuple(x.shape)} does not fit the weight")
    on_device(x, weight.words, weight.scale, weight.zero, rows.slots, rows.owners, router)
    sim, spans, (processors, memory) = simulated(), weight.padded // weight.span, machine(x.device)
    features = weight.outputs // 2 if gated else weight.outputs
    grid = rows.blocks(tile.bm), cut(weight.outputs, tile.bn)
    per_part = spans if gated else cut(spans, splits(tile, grid[0] * grid[1], spans, processors))
    parts = cut(spans, per_part)
    dtype = torch.float32 if sim or parts > 1 else out_type
    out = torch.empty(parts, rows.total, features, dtype=dtype, device=x.device)
    stages = that_fits(tile, step_bytes(tile, weight.run, weight.span // weight.run), memory)
    zero = weight.scale if weight.zero is None else weight.zero
    slots, owners = (out if tensor is None else tensor for tensor in (rows.slots, rows.owners))
    with torch.cuda.device_of(x):
        kernel[(*grid, parts)](
            *(x, weight.words, weight.scale, zero, slots, owners, slots, out if router is None else router, out),
            *(rows.total, rows.top_k, features, weight.inputs, spans, per_part, weight.scale.shape[1], weight.alike),
            BM=tile.bm,
            BN=tile.bn,
            RUN=weight.run,
            BITS=weight.bits,
            SHARED=weight.shared,
            EARLY=early(tile.bm, weight.run, weight.shared),
            EVEN=weight.padded == weight.inputs,
            ASYM=weight.zero is not None,
            GATED=gated,
            GROUPED=rows.grouped,
            ROUTED=router is not None,
            SIM=sim,
            STAGES=stages,
            num_warps=tile.warps,
            num_stages=stages,
            **OPTIONS,
        )
    return out if parts > 1 else out.to(out_type)


def dequantize(weight: PackedInt, expert: int, out: Tensor) -> Tensor:
    """An expert's weight in bfloat16 [out, in], written into `out`. Raises ValueError."""
    fits = out.shape == (weight.outputs, weight.inputs) and out.dtype is torch.bfloat16
    check(fits, f"the scratch is {out.dtype} {tuple(out.shape)}")
    on_device(weight.words, out)
    sim, spans = simulated(), weight.padded // weight.span
    to = torch.empty(out.shape, dtype=torch.float32, device=out.device) if sim else out
    zero = weight.scale if weight.zero is None else weight.zero
    with torch.cuda.device_of(out):
        widen_kernel[(cut(weight.outputs, 32), spans)](
            *(weight.words[expert], weight.scale[expert], zero[expert], to),
            *(weight.outputs, weight.inputs, spans, weight.alike),
            BN=32,
            RUN=weight.run,
            BITS=weight.bits,
            SHARED=weight.shared,
            ASYM=weight.zero is not None,
            SIM=sim,
            num_warps=4,
            **OPTIONS,
        )
    return out.copy_(to) if sim else out
