"""The reference model: a `ModelSpec` run on any source of weights, layer after layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.model.attention import Positions
from quantkit.model.blocks import Routing, rms_norm, rope_tables
from quantkit.model.cache import Cache, OneGroup
from quantkit.model.layer import attention_half, mlp_half
from quantkit.model.spec import Linear, ModelSpec, Role
from quantkit.model.weights import Weights

__all__ = ["LayerTrace", "forward", "head", "head_linear"]


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did: hidden [batch, time, hidden] after it, and its routing (None for a dense layer)."""

    index: int
    hidden: Tensor
    routing: Routing | None


def forward(spec: ModelSpec, weights: Weights, input_ids: Tensor, cache: Cache | None = None) -> Iterator[LayerTrace]:
    """Run the layers over int64 input_ids [batch, time], yielding after each. With a cache, ids continue what it holds."""
    time, place, store = input_ids.shape[1], input_ids.device, OneGroup() if cache is None else cache
    if cache is None:
        at = Positions(rope_tables(spec.rope, torch.arange(time, device=place)))
    else:
        at = Positions(cache.tables(spec.rope, time, place), cache.padding)
    h = F.embedding(input_ids, weights.tensor(spec.embedding)).float()
    for layer in spec.layers:
        h = attention_half(layer, h, weights, at, store)
        h, routing = mlp_half(layer, h, weights)
        yield LayerTrace(layer.index, h, routing)


def head_linear(spec: ModelSpec) -> Linear:
    """The output head as a linear; the embedding where it is tied."""
    return Linear((spec.head or spec.embedding).removesuffix(".weight"), spec.vocab, spec.hidden, Role.HEAD)


def head(spec: ModelSpec, weights: Weights, hidden: Tensor) -> Tensor:
    """Final norm and output head: hidden [..., hidden] -> float32 logits [..., vocab]."""
    return weights.linear(head_linear(spec), rms_norm(hidden, weights.tensor(spec.final_norm), spec.eps)).float()
