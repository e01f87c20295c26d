"""Tokens sorted by expert, so that every block of rows meets one expert's weights. Nothing here waits for the GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.kernels.checks import check, cut
from quantkit.kernels.triton.lang import OPTIONS, available, kernel_of, simulated, tl

__all__ = ["Rows", "check_routing", "group", "sort_by_expert", "sort_kernel"]

FEW = 1024  # slots that one program sorts faster than some ten small launches do


@dataclass(frozen=True)
class Rows:
    """The rows of a product. total: how many. top_k: consecutive ones that share a row of x.

    slots, owners: as sort_by_expert gives them; None where there is one weight.
    """

    total: int
    top_k: int = 1
    slots: Tensor | None = None
    owners: Tensor | None = None

    def each(self) -> Rows:
        """The same where each row has its own row of x."""
        return replace(self, top_k=1)


def group(ids: Tensor, experts: int, block: int) -> Rows:
    """The rows of ids [tokens, k], sorted by expert into blocks of that many."""
    return Rows(ids.numel(), ids.shape[1], *sort_by_expert(ids, experts, block))


def check_routing(x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Raises ValueError unless x is [tokens, in], ids integer [tokens, k] and weights of ids' shape."""
    check(x.ndim == 2, f"x is {tuple(x.shape)}, not [tokens, in]")
    check(ids.ndim == 2 and ids.shape[0] == x.shape[0], f"ids {tuple(ids.shape)} do not fit {x.shape[0]} tokens")
    check(not ids.is_floating_point(), f"ids are {ids.dtype}, not integers")
    check(weights.shape == ids.shape, f"router weights {tuple(weights.shape)} do not fit ids {tuple(ids.shape)}")


@kernel_of("TOTAL", "BLOCKS")
def sort_kernel(
    ids: tl.tensor,
    slots: tl.tensor,
    owners: tl.tensor,
    TOTAL: tl.tensor,
    EXPERTS: tl.tensor,
    BLOCKS: tl.tensor,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """sort_by_expert by one program: count, give each expert whole blocks, then place each slot and the padding."""
    expert, at = tl.arange(0, E), tl.arange(0, CHUNK)
    count = tl.zeros((E,), tl.int32)
    for start in range(0, TOTAL, CHUNK):
        mine = tl.load(ids + start + at, mask=start + at < TOTAL, other=-1).to(tl.int32)
        count += tl.sum((mine[:, None] == expert[None, :]).to(tl.int32), 0)
    room = (count + BLOCK - 1) // BLOCK * BLOCK
    begin = tl.cumsum(room, 0) - room
    placed = tl.zeros((E,), tl.int32)
    for start in range(0, TOTAL, CHUNK):
        mine = tl.load(ids + start + at, mask=start + at < TOTAL, other=-1).to(tl.int32)
        hit = (mine[:, None] == expert[None, :]).to(tl.int32)
        where = tl.sum(hit * ((begin + placed)[None, :] + tl.cumsum(hit, 0) - 1), 1)
        tl.store(slots + where, start + at, mask=start + at < TOTAL)
        placed += tl.sum(hit, 0)
    spare = tl.arange(0, BLOCK)
    empty = (begin + count)[:, None] + spare[None, :]
    tl.store(slots + empty, tl.zeros((E, BLOCK), tl.int32) + TOTAL, mask=spare[None, :] < (room - count)[:, None])
    for start in range(0, BLOCKS, CHUNK):
        first = (start + at) * BLOCK
        passed = tl.sum(((begin + room)[None, :] <= first[:, None]).to(tl.int32), 1)
        tl.store(owners + start + at, tl.where(passed < EXPERTS, passed, -1), mask=start + at < BLOCKS)


def sort_by_expert(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """ids [tokens, k], each in [0, experts) -> slots int32 [blocks * block] and owners int32 [blocks].

    A slot is token * k + choice. Each expert's slots come in order and are padded with `tokens * k` to whole blocks; owners
    names each block's expert, -1 for blocks left over, whose slots mean nothing. `blocks` depends on shapes only.
    """
    total = ids.numel()
    blocks = cut(total + min(experts, total) * (block - 1), block)
    if total > FEW or not available() or not (ids.is_cuda or simulated()):
        return _sort(ids.flatten().long(), experts, block, blocks)
    slots = torch.empty(blocks * block, dtype=torch.int32, device=ids.device)
    owners = torch.empty(blocks, dtype=torch.int32, device=ids.device)
    padded = max(16, 1 << (experts - 1).bit_length())
    with torch.cuda.device_of(ids):
        sort_kernel[(1,)](
            *(ids.contiguous(), slots, owners, total, experts, blocks),
            BLOCK=block,
            E=padded,
            CHUNK=16,
            num_warps=4,
            **OPTIONS,
        )
    return slots, owners


def _sort(flat: Tensor, experts: int, block: int, blocks: int) -> tuple[Tensor, Tensor]:
    total = flat.numel()
    count = torch.zeros(experts, dtype=torch.long, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    room = (count + block - 1) // block * block
    ends = room.cumsum(0)
    order = flat.argsort(stable=True)
    owner = flat[order]
    rank = torch.arange(total, device=flat.device) - (count.cumsum(0) - count)[owner]
    slots = torch.full((blocks * block,), total, dtype=torch.int32, device=flat.device)
    slots[(ends - room)[owner] + rank] = order.to(torch.int32)
    starts = torch.arange(blocks, device=flat.device) * block
    owners = torch.searchsorted(ends, starts, right=True)
    return slots, torch.where(owners < experts, owners, -1).to(torch.int32)
