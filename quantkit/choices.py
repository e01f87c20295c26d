"""What is chosen by a word: the command line knows these at once, and what they stand for is imported when it is wanted."""

from __future__ import annotations

from enum import Enum
from typing import Literal, get_args

__all__ = ["EFFORTS", "KERNELS", "METHODS", "TARGETS", "Effort", "FormatName", "KVFormat", "Kernels", "MethodName"]

Kernels = Literal["auto", "w4a8", "reference"]
MethodName = Literal["rtn", "gptq", "learned"]
Effort = Literal["fast", "default", "best"]
FormatName = Literal["compressed-tensors", "gptq", "gptq-v2", "awq", "deepseek-fp8", "fp8", "fp8-transformers"]

KERNELS: tuple[Kernels, ...] = get_args(Kernels)
EFFORTS: tuple[Effort, ...] = get_args(Effort)
METHODS: tuple[MethodName, ...] = get_args(MethodName)
TARGETS = (*get_args(FormatName), "bf16")  # of a conversion


class KVFormat(str, Enum):
    """How keys and values are kept. FP8 is E4M3 with a BF16 scale, amax / 448, for each head of each token."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    FP8 = "fp8"
