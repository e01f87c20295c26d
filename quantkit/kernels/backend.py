"""What a family of kernels offers: quantized linears and experts, packed once at load and then called.

A family is one `Backend` and one row in `dispatch.BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Scheme

__all__ = ["Backend", "Expert", "InputScalesDiffer", "QuantExperts", "QuantLinear"]


class QuantLinear(Protocol):
    """A quantized linear on its kernel."""

    def __call__(self, x: Tensor) -> Tensor:
        """x float [..., in] -> [..., out] in x.dtype."""
        ...


class QuantExperts(Protocol):
    """The gated MLPs of a layer's experts on their kernel: down(silu(gate(x)) * up(x)), of one shape and scheme."""

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x float [n, hidden], ids int64 [n, k] in [0, experts), weights float32 [n, k] -> [n, hidden] in x.dtype.

        A token's outputs are multiplied with its weights, as they are, and summed. n may be 0 and an expert idle.
        """
        ...


class InputScalesDiffer(ValueError):
    """gate and up cannot go into one product: each rounds the input by a scale of its own."""


@dataclass(frozen=True)
class Expert:
    """One expert as it lies on disk."""

    gate: QuantizedTensor
    up: QuantizedTensor
    down: QuantizedTensor

    def __post_init__(self) -> None:
        a, b = self.gate.input_scale, self.up.input_scale
        if a is not None and b is not None and not torch.equal(a, b):
            raise InputScalesDiffer(f"gate and up round one input by the scales {a.tolist()} and {b.tolist()}")


@dataclass(frozen=True)
class Backend:
    """A family of kernels.

    takes: why weights [out, in] of a scheme have no kernel here on any hardware, or None. lacks: what this device lacks to
    run a scheme, or None. note: what there is to add to `why` on a device that lacks nothing. linear, experts: pack; what
    they are given has passed takes and lacks. experts takes a layer's experts one at a time, and their number, so that they
    need never lie in memory twice.
    """

    name: str
    hardware: str
    why: str
    takes: Callable[[Scheme, tuple[int, int]], str | None]
    lacks: Callable[[Scheme, torch.device], str | None]
    linear: Callable[[QuantizedTensor, Scheme], QuantLinear]
    experts: Callable[[Iterable[Expert], int, Scheme], QuantExperts]
    note: Callable[[Scheme, torch.device], str | None] = lambda scheme, device: None
