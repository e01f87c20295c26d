"""Names, dtypes and sizes of tensors on disk, in safetensors' spelling."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["DTYPES", "FLOATS", "Entry", "TensorPlan", "nbytes"]

DTYPES: dict[str, torch.dtype] = {
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
FLOATS = ("BF16", "F16", "F32")  # what a weight that is not quantised may be


def nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return DTYPES[dtype].itemsize * math.prod(shape)


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
