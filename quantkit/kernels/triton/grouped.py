"""What the product kernels share: which rows of x and of the weight a program multiplies, and how it writes their product.

Programs are (block of rows of x, tile of the weight, part of K). The product is computed transposed, weight times x^T.
A kernel gets its slots twice, as `slots` for its head and as `places` for its end: one load would serve both, and hold its
registers throughout the loop.
"""

from __future__ import annotations

from typing import Any

from quantkit.kernels.triton.lang import jit, tl

__all__ = ["finish", "rows_of_weight", "rows_of_x"]


@jit
def slots_of(slots: tl.tensor, SLOTS: tl.tensor, BM: tl.constexpr, GROUPED: tl.constexpr) -> Any:
    """This program's rows of the product, int32 [BM]; SLOTS or more where there is none.

    GROUPED: 0 for one weight and rows in order; 1 for rows as `slots` sorts them into blocks of one expert; 2 for one row a
    block.
    """
    at = tl.arange(0, BM)
    slot = tl.program_id(0) * BM + at
    if GROUPED == 1:
        slot = tl.load(slots + slot)
    elif GROUPED == 2:
        slot = tl.where(at == 0, tl.program_id(0), SLOTS)
    return slot


@jit
def rows_of_x(
    slots: tl.tensor, owners: tl.tensor, SLOTS: tl.tensor, TOPK: tl.tensor, BM: tl.constexpr, GROUPED: tl.constexpr
) -> Any:
    """(the expert, -1 for none; the rows [BM] of x, within bounds)."""
    expert = tl.program_id(0).to(tl.int64) * 0
    if GROUPED != 0:
        expert = tl.load(owners + tl.program_id(0)).to(tl.int64)
    slot = slots_of(slots, SLOTS, BM, GROUPED)
    return expert, (tl.minimum(slot, SLOTS - 1) // TOPK).to(tl.int64)


@jit
def rows_of_weight(N: tl.tensor, BN: tl.constexpr, GATED: tl.constexpr) -> Any:
    """The rows [BN] of an expert's weight that this program multiplies, within bounds.

    GATED: the weight is gate's N rows, then up's, and a tile takes 8 of gate, the same 8 of up, and so on: the MMA gives a
    thread both sums of a feature.
    """
    row = tl.program_id(1) * BN + tl.arange(0, BN)
    return tl.minimum(row // 16 * 8 + row % 8, N - 1) + row // 8 % 2 * N if GATED else tl.minimum(row, N - 1)


@jit
def finish(
    value: tl.tensor,
    places: tl.tensor,
    router: tl.tensor,
    out: tl.tensor,
    SLOTS: tl.tensor,
    N: tl.tensor,
    BM: tl.constexpr,
    BN: tl.constexpr,
    GATED: tl.constexpr,
    GROUPED: tl.constexpr,
    ROUTED: tl.constexpr,
) -> None:
    """Writes a finished sum, float32 [BN, BM], to out [parts, SLOTS, N]: joined by SiLU, times the router's weights."""
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(value, (BN // 16, 2, 8, BM)), (0, 2, 3, 1)))
        value = tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, (BN // 2, BM))
        feature = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
    else:
        feature = tl.program_id(1) * BN + tl.arange(0, BN)
    slot = slots_of(places, SLOTS, BM, GROUPED)
    if ROUTED:
        value *= tl.load(router + tl.minimum(slot, SLOTS - 1))[None, :]
    to = out + (tl.program_id(2).to(tl.int64) * SLOTS + slot)[None, :] * N + feature[:, None]
    tl.store(to, value.to(out.dtype.element_ty), mask=(slot < SLOTS)[None, :] & (feature < N)[:, None])
