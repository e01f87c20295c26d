"""Integer codes in 32-bit words, as compressed-tensors' pack-quantized format lays them out.

A code q of b bits is stored as q + 2^(b-1) (offset binary); element i of a row sits at bits [i*b, i*b + b) from the least
significant end of its word. Zero points are packed the same way along the output dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack_rows", "unpack_rows"]


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int8 [rows, n] of `bits`-bit codes (4 or 8; n a multiple of 32 / bits) -> int32 [rows, n * bits / 32]."""
    per_word = 32 // bits
    if codes.shape[1] % per_word:
        raise ValueError(f"{codes.shape[1]} codes of {bits} bits do not fill whole 32-bit words")
    digits = (codes.to(torch.int32) + 2 ** (bits - 1)).view(codes.shape[0], -1, per_word)
    words = torch.zeros(digits.shape[:2], dtype=torch.int32, device=codes.device)
    for i in range(per_word):
        words |= digits[:, :, i] << (bits * i)
    return words


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_rows`: int32 [rows, m] -> int8 [rows, m * 32 / bits]."""
    mask = 2**bits - 1
    digits = torch.stack([((words >> (bits * i)) & mask) for i in range(32 // bits)], dim=-1)
    codes: Tensor = (digits - 2 ** (bits - 1)).to(torch.int8).flatten(1)
    return codes
