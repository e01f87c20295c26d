"""What a kind of attention is to a layer: three steps. A new one is its data in `spec.py`, a class, and a row in `KINDS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

from torch import Tensor

from quantkit.model.cache import KV, KeptKV
from quantkit.model.spec import Attention
from quantkit.model.weights import Weights

__all__ = ["AttentionKind", "Positions", "Tables", "split_heads"]

A = TypeVar("A", bound=Attention)
Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Positions:
    """Where the tokens of a batch stand.

    tables: cos and sin of their positions, each [time, dim] or [batch, 1, time, dim]. padding: int64 [batch], how many
    positions at the start of each row are nobody's; None for none.
    """

    tables: Tables
    padding: Tensor | None = None


class AttentionKind(ABC, Generic[A]):
    """x is the normalised hidden state [batch, time, hidden], `a` the layer's data. Every product is `weights.linear`."""

    @abstractmethod
    def kept(self, a: A, x: Tensor, weights: Weights, at: Positions, eps: float, for_later: bool) -> KV | None:
        """What is kept of x: two tensors [batch, heads, time, width]; None for a layer that borrows. See `KVStore`."""

    @abstractmethod
    def query(self, a: A, x: Tensor, weights: Weights, at: Positions, eps: float) -> Tensor:
        """[batch, heads, time, head_dim]."""

    @abstractmethod
    def core(self, a: A, query: Tensor, kv: KeptKV, weights: Weights, at: Positions) -> Tensor:
        """What o reads, [batch, time, o.in_features]. kv: of all positions, of which those of the query are the last."""


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """[batch, time, heads * head_dim] -> [batch, heads, time, head_dim]."""
    heads: Tensor = x.unflatten(-1, (-1, head_dim))
    return heads.transpose(1, 2)
