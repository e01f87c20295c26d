"""Tokens sorted by expert, so that every block of rows meets one expert's weights. Plain torch, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.kernels.triton.lang import check, cut

__all__ = ["check_routing", "sort_by_expert"]


def check_routing(x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Raises ValueError unless x is [tokens, in], ids integer [tokens, k] and weights of ids' shape."""
    check(x.ndim == 2, f"x is {tuple(x.shape)}, not [tokens, in]")
    check(ids.ndim == 2 and ids.shape[0] == x.shape[0], f"ids {tuple(ids.shape)} do not fit {x.shape[0]} tokens")
    check(not ids.is_floating_point(), f"ids are {ids.dtype}, not integers")
    check(weights.shape == ids.shape, f"router weights {tuple(weights.shape)} do not fit ids {tuple(ids.shape)}")


def sort_by_expert(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """ids [tokens, k], each in [0, experts) -> slots int32 [blocks * block] and owners int32 [blocks].

    A slot is token * k + choice. Each expert's slots come in order and are padded with `tokens * k` to whole blocks; owners
    names each block's expert, -1 for blocks left over. `blocks` depends on shapes only, so nothing waits for the GPU.
    """
    flat = ids.flatten().long()
    total = flat.numel()
    blocks = cut(total + min(experts, total) * (block - 1), block)
    count = torch.zeros(experts, dtype=torch.long, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))
    room = (count + block - 1) // block * block
    ends = room.cumsum(0)
    order = flat.argsort(stable=True)
    owner = flat[order]
    rank = torch.arange(total, device=ids.device) - (count.cumsum(0) - count)[owner]
    slots = torch.full((blocks * block,), total, dtype=torch.int32, device=ids.device)
    slots[(ends - room)[owner] + rank] = order.to(torch.int32)
    starts = torch.arange(blocks, device=ids.device) * block
    owners = torch.searchsorted(ends, starts, right=True)
    return slots, torch.where(owners < experts, owners, -1).to(torch.int32)
