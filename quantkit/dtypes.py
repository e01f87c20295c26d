"""Names, dtypes and sizes of tensors on disk, in safetensors' spelling.

Torch is imported where a tensor is made or looked at: what reads headers alone does without the seconds that it takes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["FLOATS", "ITEMSIZE", "Entry", "TensorPlan", "nbytes", "raw", "torch_dtype"]

ITEMSIZE = {  # bytes of an element
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
FLOATS = ("BF16", "F16", "F32")  # what a weight that is not quantized may be


@cache
def torch_dtype(name: str) -> torch.dtype:
    """Raises KeyError for a name that is not in ITEMSIZE."""
    import torch

    dtypes = {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
    return dtypes[name]


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor on the CPU, as a safetensors file holds them: uint8 [nbytes]."""
    flat = tensor.contiguous().reshape(-1)  # a scalar has no axis to view otherwise
    return flat.view(torch_dtype("U8"))


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEMSIZE[dtype] * math.prod(shape)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Name, dtype and shape of a tensor that will be written, or is expected; `optional`: a reader does without it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    optional: bool = False

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What a reader takes: a float (a scale, or a weight that is kept) may be any of them."""
        return FLOATS if self.dtype in FLOATS else (self.dtype,)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as a shard's header describes it. dtype in safetensors' spelling (BF16, F32, I32, F8_E4M3, ...).

    start: where in the file its first byte is.
    """

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)

    @property
    def row(self) -> int:
        """Bytes of one row of the first dimension; of all where there is none."""
        return nbytes(self.dtype, self.shape[1:])

    def rows_in(self, limit: int) -> int:
        """How many rows so many bytes hold; at least one."""
        return max(1, limit // max(1, self.row))
