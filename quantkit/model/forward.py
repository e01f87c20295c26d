"""The reference model: a `ModelSpec` run on any source of weights. `weights.linear` does every product but the router's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.model.attention import Tables, attention_core, keep, query, raw_kv
from quantkit.model.blocks import Routing, rms_norm, rope_tables, route
from quantkit.model.cache import KV, Cache, Kept
from quantkit.model.spec import MLA, MLP, Layer, Linear, ModelSpec, MoE, Role

__all__ = ["KV", "Cache", "LayerTrace", "Weights", "forward", "head"]


class Weights(ABC):
    """Where a model's numbers come from: memory, a checkpoint on disk, or a quantised one.

    `mlp` and `experts` are defined by `linear`; a subclass may compute the same in fewer steps.
    """

    @abstractmethod
    def tensor(self, key: str) -> Tensor: ...

    @abstractmethod
    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x.dtype."""

    def matrix(self, ref: Linear) -> Tensor:
        """What `linear` multiplies by, [out, in], any float. A subclass whose weights are not plain overrides this."""
        return self.tensor(ref.weight)

    def read(self, ref: Linear, x: Tensor) -> Tensor:
        """x [..., in] as `linear` multiplies it: rounded, where the scheme says so."""
        return x

    def mlp(self, spec: MLP, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x)); x [n, hidden]."""
        return self.linear(spec.down, F.silu(self.linear(spec.gate, x)) * self.linear(spec.up, x))

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


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did: hidden [batch, time, hidden] after it, and its routing (None for a dense layer)."""

    index: int
    hidden: Tensor
    routing: Routing | None


def _layer(
    layer: Layer,
    h: Tensor,
    kv: tuple[Kept, Kept] | None,
    cache: Cache | None,
    tables: Tables,
    weights: Weights,
    eps: float,
) -> tuple[Tensor, tuple[Kept, Kept], Routing | None]:
    a = layer.attention
    x = rms_norm(h, weights.tensor(layer.input_norm), eps)
    raw = raw_kv(a, x, weights.linear)
    if raw is not None:
        key, value = keep(a, raw, tables, weights, eps)
        if cache is not None and isinstance(a, MLA):  # once, so that later positions need no kv_b; twice changes nothing
            key = weights.read(a.kv_b, key)
        kv = cache.append(layer.index, (key, value)) if cache is not None else (Kept(key), Kept(value))
    if kv is None:
        raise ValueError(f"layer {layer.index} borrows K/V from layer {a.kv_from}, which has not run")
    q = query(a, x, weights.linear, tables, weights, eps)
    padding = cache.padding if cache is not None else None
    h = h + weights.linear(a.o, attention_core(a, q, kv, weights.linear, padding, weights.matrix))
    x = rms_norm(h, weights.tensor(layer.post_attention_norm), eps).flatten(0, 1)
    block, routing = layer.mlp, None
    if isinstance(block, MoE):
        routing = route(x, block.router, weights.tensor(block.router.weight))
        out = weights.experts(block, x, routing)
    else:
        out = weights.mlp(block, x)
    return h + out.view_as(h), kv, routing


def forward(spec: ModelSpec, weights: Weights, input_ids: Tensor, cache: Cache | None = None) -> Iterator[LayerTrace]:
    """Run the layers over int64 input_ids [batch, time], yielding after each. With a cache, ids continue what it holds."""
    start = cache.length if cache is not None else 0
    positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
    if cache is not None and cache.padding is not None:
        positions = (positions - cache.padding.to(positions.device)[:, None, None]).clamp(min=0)  # [batch, 1, time]
    tables = rope_tables(spec.rope, positions)
    h = F.embedding(input_ids, weights.tensor(spec.embedding)).float()
    kv: tuple[Kept, Kept] | None = None
    owner = -1
    for layer in spec.layers:
        if layer.attention.kv_from != owner:  # without a cache, K/V of one group of layers at a time
            kv, owner = None, layer.attention.kv_from
        h, kv, routing = _layer(layer, h, kv, cache, tables, weights, spec.eps)
        yield LayerTrace(layer.index, h, routing)


def head(spec: ModelSpec, weights: Weights, hidden: Tensor) -> Tensor:
    """Final norm and output head: hidden [..., hidden] -> float32 logits [..., vocab]."""
    x = rms_norm(hidden, weights.tensor(spec.final_norm), spec.eps)
    key = (spec.head or spec.embedding).removesuffix(".weight")
    return weights.linear(Linear(key, spec.vocab, spec.hidden, Role.HEAD), x).float()
