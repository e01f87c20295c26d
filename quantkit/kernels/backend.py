"""What a family of kernels offers: quantized linears and experts, packed once at load and then called.

A family is one `Backend` and one row in `dispatch.BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Scheme

__all__ = [
    "AttentionParts",
    "AttentionStep",
    "Backend",
    "Expert",
    "InputScalesDiffer",
    "MlpParts",
    "MlpStep",
    "QuantExperts",
    "QuantLinear",
    "Routed",
    "Steps",
]

Routed = tuple[Tensor, Tensor, Tensor]


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
class AttentionParts:
    """Grouped-query attention of a layer. k and v are None where it reads those of another layer.

    norm: float [hidden], of the layer's input. q_norm, k_norm: float [head_dim], both or neither; before RoPE if norm_first,
    else after it, and then a cache keeps keys without their weight, which is the query's to bear (`model.gqa`).
    """

    q: QuantLinear
    k: QuantLinear | None
    v: QuantLinear | None
    o: QuantLinear
    norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    norm_first: bool
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True)
class MlpParts:
    """The MLP half of a layer. norm: float [hidden].

    router: bfloat16 [routed, hidden], of softmax and best top_k, or None: `experts` is one dense MLP. shared: whether the
    last of `experts` is a shared one; `apart`: the shared one where it is not among them.
    """

    experts: QuantExperts
    apart: QuantExperts | None
    shared: bool
    norm: Tensor
    router: Tensor | None
    top_k: int
    renormalise: bool
    router_scale: float
    eps: float


class AttentionStep(Protocol):
    """h + attention(norm(h)) in one call, where few positions follow many."""

    def __call__(
        self,
        h: Tensor,
        tables: tuple[Tensor, Tensor],
        padding: Tensor | None,
        key: Sequence[Tensor],
        value: Sequence[Tensor],
        length: int,
    ) -> Tensor:
        """h float32 [batch, time, hidden] -> the same. tables: cos and sin, float32 [time, dim] or [batch, 1, time, dim].

        key, value: a cache's codes [batch, kv_heads, room, head_dim] and, for FP8, scales [batch, kv_heads, room, 1]: those
        of the last `time` of its `length` positions are written, unless the layer borrows. padding: int64 [batch],
        positions at the start of a row that nothing after them sees.
        """
        ...


class MlpStep(Protocol):
    """h + mlp(norm(h)) in one call."""

    def __call__(self, h: Tensor) -> tuple[Tensor, Routed | None]:
        """h float32 [batch, time, hidden] -> the same; experts int64 [n, k], float32 weights and logits of n tokens."""
        ...


@dataclass(frozen=True)
class Steps:
    """Few tokens in few calls. plain: a bfloat16 matrix [out, in] as it is stored, multiplied at the speed of memory.
    attention, mlp: the halves of a layer whose linears this family has packed, or `plain` ones; None where it has no step
    for such parts.
    """

    name: str
    plain: Callable[[Tensor], QuantLinear]
    attention: Callable[[AttentionParts], AttentionStep | None]
    mlp: Callable[[MlpParts], MlpStep | None]


@dataclass(frozen=True)
class Backend:
    """A family of kernels.

    takes: why weights [out, in] of a scheme have no kernel here on any hardware, or None. lacks: what this device lacks to
    run a scheme, or None. note: what there is to add to `why` on a device that lacks nothing. linear, experts: pack; what
    they are given has passed takes and lacks. experts takes a layer's experts one at a time, and their number, so that they
    need never lie in memory twice. steps: for few tokens on a device, or why there are none.
    """

    name: str
    hardware: str
    why: str
    takes: Callable[[Scheme, tuple[int, int]], str | None]
    lacks: Callable[[Scheme, torch.device], str | None]
    linear: Callable[[QuantizedTensor, Scheme], QuantLinear]
    experts: Callable[[Iterable[Expert], int, Scheme], QuantExperts]
    note: Callable[[Scheme, torch.device], str | None] = lambda scheme, device: None
    steps: Callable[[torch.device], Steps | str] = lambda device: "no fused steps"
