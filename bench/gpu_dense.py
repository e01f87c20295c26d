"""A mixture of experts in bfloat16 as two fused launches: what the quantized kernels are compared with.

It shares everything but its operand with them (routing, SiLU in the first launch, the router's weight in the second), so a
ratio says what narrower weights gain, not what fewer launches do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.checks import cut
from quantkit.kernels.triton.grouped import finish, rows_of_weight, rows_of_x
from quantkit.kernels.triton.lang import OPTIONS, kernel_of, machine, simulated, tl
from quantkit.kernels.triton.routing import Rows, group
from quantkit.kernels.triton.tiles import Tile, crowd, splits, that_fits

__all__ = ["STEP", "TABLE", "dense_kernel", "moe"]

STEP = 64  # columns of a step of K
# Up to so many rows a weight, tile. As in quantkit/kernels/triton/tiles.py, none was tuned on a GPU.
TABLE = (
    (16, Tile(16, 128, 4, 5)),
    (32, Tile(32, 128, 4, 4)),
    (64, Tile(64, 128, 8, 4)),
    (float("inf"), Tile(128, 128, 8, 4)),
)


@kernel_of("SLOTS", "STEPS", "PER_PART")
def dense_kernel(
    x: tl.tensor,
    weight: tl.tensor,
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
    BK: tl.constexpr,
    GATED: tl.constexpr,
    GROUPED: tl.constexpr,
    ROUTED: tl.constexpr,
    SIM: tl.constexpr,
) -> None:
    """out [parts, SLOTS, N] = x [., K] times the expert's weight [experts, N or 2 N, K]; K is a multiple of BK."""
    expert, token = rows_of_x(slots, owners, SLOTS, TOPK, BM, GROUPED)
    if expert < 0:
        return
    row = rows_of_weight(N, BN, GATED)
    k = tl.arange(0, BK)
    weight += (expert * (N * 2 if GATED else N) + row)[:, None] * K + k[None, :]
    x += token[None, :] * K + k[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    first = tl.program_id(2) * PER_PART
    for step in range(first, tl.minimum(first + PER_PART, STEPS)):
        a, b = tl.load(weight + step * BK), tl.load(x + step * BK)
        acc = tl.dot(a.to(tl.float32) if SIM else a, b.to(tl.float32) if SIM else b, acc)
    finish(acc, places, router, out, SLOTS, N, BM, BN, GATED, GROUPED, ROUTED)


def _product(x: Tensor, weight: Tensor, rows: Rows, tile: Tile, router: Tensor | None, gated: bool) -> Tensor:
    processors, memory = machine(x.device)
    features, steps = weight.shape[1] // 2 if gated else weight.shape[1], weight.shape[2] // STEP
    assert weight.shape[2] % STEP == 0 and rows.owners is not None
    grid = rows.blocks(tile.bm), cut(weight.shape[1], tile.bn)
    per_part = steps if gated else cut(steps, splits(tile, grid[0] * grid[1], steps, processors))
    parts = cut(steps, per_part)
    made = torch.bfloat16 if gated and not simulated() else torch.float32
    out = torch.empty(parts, rows.total, features, dtype=made, device=x.device)
    slots = out if rows.slots is None else rows.slots
    dense_kernel[(*grid, parts)](
        *(x, weight, slots, rows.owners, slots, out if router is None else router, out),
        *(rows.total, rows.top_k, features, weight.shape[2], steps, per_part),
        BM=tile.bm,
        BN=tile.bn,
        BK=STEP,
        GATED=gated,
        GROUPED=rows.grouped,
        ROUTED=router is not None,
        SIM=simulated(),
        num_warps=tile.warps,
        num_stages=that_fits(tile, 2 * STEP * (tile.bn + tile.bm), memory),
        **OPTIONS,
    )
    return out


def moe(x: Tensor, ids: Tensor, router: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x bfloat16 [tokens, hidden]; gate_up [experts, 2 * inner, hidden], gate first; down [experts, hidden, inner], whose
    columns are multiples of STEP; ids, router [tokens, k] -> [tokens, hidden] in x.dtype."""
    tile = next(tile for limit, tile in TABLE if crowd(ids.numel() / gate_up.shape[0]) <= limit)
    rows = group(ids, gate_up.shape[0], tile.bm)
    act = _product(x, gate_up, rows, tile, None, True)[0].bfloat16()
    out = _product(act, down, rows.each(), tile, router, False)
    return out.view(-1, *ids.shape, down.shape[1]).sum((0, 2)).to(x.dtype)
