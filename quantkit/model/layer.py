"""A decoder layer, once: two halves, each a pure function of hidden states, weights, positions and K/V.

Whoever runs, calibrates, evaluates or learns a layer calls these. Weights may have one step for a half on few tokens, which
computes the same. Where one is stopped half-way (calibration looks at what o or down reads) the first part of a half has a
name of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from quantkit.model.attention import AttentionKind, Positions
from quantkit.model.blocks import Routing, rms_norm, route
from quantkit.model.cache import KVStore
from quantkit.model.gqa import GroupedQuery
from quantkit.model.mla import Latent
from quantkit.model.spec import GQA, MLA, Layer, MoE
from quantkit.model.weights import Weights

__all__ = ["KINDS", "attention_half", "attention_inner", "mlp_half", "mlp_input", "routes"]

KINDS: dict[type, AttentionKind[Any]] = {GQA: GroupedQuery(), MLA: Latent()}


def attention_inner(layer: Layer, h: Tensor, weights: Weights, at: Positions, store: KVStore) -> Tensor:
    """What o reads, [batch, time, o.in_features], of hidden states h [batch, time, hidden]."""
    a, kind = layer.attention, KINDS[type(layer.attention)]
    x = rms_norm(h, weights.tensor(layer.input_norm), layer.eps)
    new = kind.kept(a, x, weights, at, layer.eps, store.for_later)
    query = kind.query(a, x, weights, at, layer.eps)
    kv = store.borrow(a.kv_from) if new is None else store.append(layer.index, new)
    return kind.core(a, query, kv, weights, at)


def attention_half(layer: Layer, h: Tensor, weights: Weights, at: Positions, store: KVStore) -> Tensor:
    """h + attention(norm(h)), [batch, time, hidden]."""
    if (fused := weights.attention_half(layer, h, at, store)) is not None:
        return fused
    return h + weights.linear(layer.attention.o, attention_inner(layer, h, weights, at, store))


def mlp_input(layer: Layer, h: Tensor, weights: Weights) -> Tensor:
    """What router, shared expert and experts (or the dense MLP) read, in h's shape."""
    return rms_norm(h, weights.tensor(layer.post_attention_norm), layer.eps)


def routes(layer: Layer, x: Tensor, weights: Weights) -> Routing | None:
    """Which experts read rows x [n, hidden] of `mlp_input`; None for a dense layer."""
    return route(x, layer.mlp.router, weights.tensor(layer.mlp.router.weight)) if isinstance(layer.mlp, MoE) else None


def mlp_half(layer: Layer, h: Tensor, weights: Weights) -> tuple[Tensor, Routing | None]:
    """h + mlp(norm(h)), [batch, time, hidden], and the routing of its tokens in order."""
    if (fused := weights.mlp_half(layer, h)) is not None:
        return fused
    x = mlp_input(layer, h, weights).flatten(0, 1)
    routing = routes(layer, x, weights)
    if isinstance(layer.mlp, MoE):
        assert routing is not None
        out = weights.experts(layer.mlp, x, routing)
    else:
        out = weights.mlp(layer.mlp, x)
    return h + out.view_as(h), routing
