"""Where a model's numbers come from: memory, a checkpoint on disk, a quantized one, or one that is being quantized."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.model.blocks import Routing
from quantkit.model.spec import MLP, Layer, Linear, MoE

if TYPE_CHECKING:
    from quantkit.model.attention import Positions
    from quantkit.model.cache import KVStore

__all__ = ["PlainWeights", "Weights", "gated"]


class Weights(ABC):
    """The only seam between a model's mathematics and its numbers: every product but the router's is `linear`.

    `mlp` and `experts` are defined by `linear`, and the halves of a layer by `layer.py`; a subclass may compute the same in
    fewer steps.
    """

    @abstractmethod
    def tensor(self, key: str) -> Tensor:
        """What is not a linear's: norms, router, embedding, head; on the device where the layer runs."""

    @abstractmethod
    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x.dtype."""

    def again(self, ref: Linear, x: Tensor) -> Tensor:
        """`linear` of an input that has passed before, in an earlier piece of its text: who listens has heard it."""
        return self.linear(ref, x)

    def matrix(self, ref: Linear) -> Tensor:
        """What `linear` multiplies by, [out, in], any float. A subclass whose weights are not plain overrides this."""
        return self.tensor(ref.weight)

    def absorbs(self, ref: Linear) -> bool:
        """Whether few positions after many may meet parts of `matrix` instead of `linear`, where that is less work."""
        return True

    def is_plain(self, ref: Linear) -> bool:
        """Whether `linear` multiplies by `tensor(ref.weight)` and does nothing else."""
        return True

    def read(self, ref: Linear, x: Tensor) -> Tensor:
        """x [..., in] as `linear` multiplies it: rounded, where the scheme says so."""
        return x

    def mlp(self, spec: MLP, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)); x [n, hidden]."""
        return self.linear(spec.down, gated(spec, x, self))

    def experts(self, spec: MoE, x: Tensor, routing: Routing) -> Tensor:
        """The routed experts' outputs, weighted, plus the shared expert's; x [n, hidden]. An idle expert is not called."""
        order = routing.experts.flatten().argsort(stable=True)  # (token, slot) pairs, expert by expert
        tokens = order // spec.router.top_k
        counts = torch.bincount(routing.experts.flatten(), minlength=len(spec.experts)).tolist()
        parts = zip(spec.experts, x[tokens].split(counts), strict=True)
        y = torch.cat([self.mlp(expert, part) for expert, part in parts if len(part)])
        y = y * routing.weights.flatten()[order, None].to(y.dtype)
        out = self.mlp(spec.shared, x) if spec.shared else torch.zeros_like(x)
        return out.index_add(0, tokens, y.to(out.dtype))

    def attention_half(self, layer: Layer, h: Tensor, at: Positions, store: KVStore) -> Tensor | None:
        """`layer.attention_half` in one step, or None, with nothing done, where this has no step for it."""
        return None

    def mlp_half(self, layer: Layer, h: Tensor) -> tuple[Tensor, Routing | None] | None:
        """`layer.mlp_half` in one step, or None where this has no step for it."""
        return None


class PlainWeights(Weights):
    """Tensors as a checkpoint that is not quantized holds them. tensors: gives one by name, on the device."""

    def __init__(self, tensors: Callable[[str], Tensor]) -> None:
        self._tensors = tensors

    def tensor(self, key: str) -> Tensor:
        return self._tensors(key)

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.tensor(ref.weight).to(x.dtype))


def gated(spec: MLP, x: Tensor, weights: Weights) -> Tensor:
    """silu(gate(x)) * up(x), what down reads; x [n, hidden] -> [n, size]."""
    return F.silu(weights.linear(spec.gate, x)) * weights.linear(spec.up, x)
