"""Tokens sorted by expert, so that every block of rows meets one expert's weights. Nothing here waits for the GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.kernels.checks import check, cut
from quantkit.kernels.triton.lang import OPTIONS, available, kernel_of, simulated, tl

__all__ = ["ALONE", "SORTED", "Rows", "check_routing", "group", "sort_by_expert", "sort_kernel"]

SORTED, ALONE = 1, 2  # see Rows.grouped
FEW = (64, 512, 4096)  # slots that one launch sorts, by the size that it is compiled for; more take some ten small launches


@dataclass(frozen=True)
class Rows:
    """The rows of a product. total: how many. top_k: consecutive ones that share a row of x.

    slots, owners: as sort_by_expert gives them. Both None: there is one weight. slots None: each row is a block of its own,
    and owners names its expert, as many integers as rows.
    """

    total: int
    top_k: int = 1
    slots: Tensor | None = None
    owners: Tensor | None = None

    @property
    def grouped(self) -> int:
        """How rows find their weight, as quantkit.kernels.triton.grouped has it."""
        return 0 if self.owners is None else ALONE if self.slots is None else SORTED

    def blocks(self, size: int) -> int:
        """How many blocks of so many rows there are."""
        return cut(self.total, size) if self.owners is None else self.owners.numel()

    def each(self) -> Rows:
        """The same where each row has its own row of x."""
        return replace(self, top_k=1)


def group(ids: Tensor, experts: int, block: int) -> Rows:
    """The rows of ids [tokens, k], sorted by expert into blocks of that many. One token's need no sorting."""
    if ids.shape[0] == 1:
        return Rows(ids.numel(), ids.shape[1], None, ids.flatten())
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
    BLOCKS: tl.tensor,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """sort_by_expert, a program an expert: it counts all slots of each (T in one go), so that it knows where its own begin,
    and places them, their padding and their blocks' owners."""
    mine, at, expert = tl.program_id(0), tl.arange(0, T), tl.arange(0, E)
    id = tl.load(ids + at, mask=at < TOTAL, other=0).to(tl.int32)
    room = (tl.histogram(id, E, mask=at < TOTAL) + BLOCK - 1) // BLOCK * BLOCK
    begin = tl.sum(tl.where(expert < mine, room, 0), 0)
    hit = ((id == mine) & (at < TOTAL)).to(tl.int32)
    count = tl.sum(hit, 0)
    tl.store(slots + begin + tl.cumsum(hit, 0) - 1, at, mask=hit == 1)
    end, spare = begin + (count + BLOCK - 1) // BLOCK * BLOCK, tl.arange(0, BLOCK)
    tl.store(slots + begin + count + spare, tl.zeros((BLOCK,), tl.int32) + TOTAL, mask=begin + count + spare < end)
    used = tl.sum(room, 0) + mine * (BLOCKS * BLOCK)  # the first program writes what is left over
    for start in range(0, BLOCKS, T):
        first = (start + at) * BLOCK
        tl.store(owners + start + at, tl.zeros((T,), tl.int32) + mine, mask=(first >= begin) & (first < end))
        left = (first >= used) & (start + at < BLOCKS)
        tl.store(owners + start + at, tl.zeros((T,), tl.int32) - 1, mask=left)


def sort_by_expert(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """ids [tokens, k], each in [0, experts) -> slots int32 [blocks * block] and owners int32 [blocks].

    A slot is token * k + choice. Each expert's slots come in order and are padded with `tokens * k` to whole blocks; owners
    names each block's expert, -1 for blocks left over, whose slots mean nothing. `blocks` depends on shapes only.
    """
    total = ids.numel()
    blocks = cut(total + min(experts, total) * (block - 1), block)
    if total > FEW[-1] or not available() or not (ids.is_cuda or simulated()):
        return _sort(ids.flatten().long(), experts, block, blocks)
    slots = torch.empty(blocks * block, dtype=torch.int32, device=ids.device)
    owners = torch.empty(blocks, dtype=torch.int32, device=ids.device)
    with torch.cuda.device_of(ids):
        sort_kernel[(experts,)](
            *(ids.contiguous(), slots, owners, total, blocks),
            BLOCK=block,
            E=max(16, 1 << (experts - 1).bit_length()),
            T=next(size for size in FEW if total <= size),
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
