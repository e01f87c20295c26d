"""Whether all values are finite: by their exponents, a cacheful at a time, without a copy in another dtype."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.dtypes import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["first_not_finite"]

_AT_ONCE = 1 << 19  # elements; only speed depends on it
# By dtype: an integer of its width, its bits but the sign, and the least of them that is not finite.
_BITS = {
    "BF16": ("I16", 0x7FFF, 0x7F80),
    "F16": ("I16", 0x7FFF, 0x7C00),
    "F32": ("I32", 0x7FFFFFFF, 0x7F800000),
    "F64": ("I64", 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
    "F8_E4M3": ("U8", 0x7F, 0x7F),
}


def first_not_finite(values: Tensor) -> tuple[int, int] | None:
    """How many of the values are NaN or infinite, and the flat index of the first; None where none is, as of integers."""
    bits = next((row for name, row in _BITS.items() if values.dtype is torch_dtype(name)), None)
    if bits is None:
        return None
    integer, magnitude, least = bits
    flat = values.reshape(-1).view(torch_dtype(integer))
    if all(int((part & magnitude).amax()) < least for part in flat.split(_AT_ONCE) if len(part)):
        return None
    bad = ((flat & magnitude) >= least).nonzero()
    return len(bad), int(bad[0])
