"""Integer codes in 32-bit words, as compressed-tensors' pack-quantized format lays them out.

A code q of b bits is stored as q + 2^(b-1) (offset binary); element i of a row sits at bits [i*b, i*b + b) from the least
significant end of its word. Zero points are packed the same way along the output dimension.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.dtypes import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["pack_rows", "unpack_rows"]


def _check(bits: int) -> None:
    if bits not in (4, 8):
        raise ValueError(f"codes of {bits} bits are not packed here, only those of 4 and 8")


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """int8 [rows, n] of `bits`-bit codes (4 or 8; n a multiple of 32 / bits) -> int32 [rows, n * bits / 32].

    Raises ValueError for others.
    """
    _check(bits)
    if codes.shape[1] % (32 // bits):
        raise ValueError(f"{codes.shape[1]} codes of {bits} bits do not fill whole 32-bit words")
    digits = codes.contiguous().view(torch_dtype("U8")) + 2 ** (bits - 1)
    if bits == 4:
        low, high = (digits & 15).unflatten(1, (-1, 2)).unbind(2)
        digits = low | high << 4
    flat = digits.flatten()  # a side of 1 has strides that a view of a whole would stumble over
    words: Tensor = flat.view(torch_dtype("I32")).view(codes.shape[0], -1)  # the first byte is the least significant one
    return words


def unpack_rows(words: Tensor, bits: int) -> Tensor:
    """Inverse of `pack_rows`: int32 [rows, m] -> int8 [rows, m * 32 / bits]."""
    _check(bits)
    digits = words.flatten().view(torch_dtype("U8")).view(words.shape[0], -1)
    if bits == 4:
        import torch

        digits = torch.stack((digits & 15, digits >> 4), dim=2).flatten(1)
    codes: Tensor = (digits - 2 ** (bits - 1)).view(torch_dtype("I8"))
    return codes
