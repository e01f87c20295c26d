"""Attention as functions of its spec: raw K/V, what is kept of it, scores and values; for `forward.py` and `calib/walk.py`.

GQA keeps K and V. Cross-layer attention (CLA): a group of layers shares one raw K and V. The released code rotates and
normalises K anew in each layer with that layer's own key norm. A score only sees q_norm_w * k_norm_w * (q_hat . k_hat), so
the key that is kept is rotated and normalised WITHOUT a weight, once per group, and each layer folds its key-norm weight
into its query. This is exact, and it is why a cache holds one key and one value per group. A norm that comes before RoPE
(`norm_first`) cannot be moved to the query; its key is kept with its weight.

MLA keeps the normalised latent and the rotated shared key, and expands them to K and V of all heads when it attends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from quantkit.model.blocks import apply_rope, attend, deinterleave, rms_norm
from quantkit.model.cache import KV
from quantkit.model.spec import GQA, MLA, Attention, Linear

__all__ = ["Apply", "Tables", "Tensors", "attention_core", "keep", "latent", "query", "query_input", "raw_kv"]

Apply = Callable[[Linear, Tensor], Tensor]
Tables = tuple[Tensor, Tensor]


class Tensors(Protocol):
    """Where tensors that are not a linear's come from: norms, router, embedding, head."""

    def tensor(self, key: str) -> Tensor: ...


def _split_heads(x: Tensor, head_dim: int) -> Tensor:
    heads: Tensor = x.unflatten(-1, (-1, head_dim))
    return heads.transpose(1, 2)


def raw_kv(a: Attention, x: Tensor, linear: Apply) -> Tensor | None:
    """x [..., hidden] -> what is projected for K and V, [..., kv_width]; None for a layer that borrows them."""
    if isinstance(a, MLA):
        return linear(a.kv_a, x)
    if a.k is None or a.v is None:
        return None
    return torch.cat((linear(a.k, x), linear(a.v, x)), dim=-1)


def latent(a: MLA, raw: Tensor, weights: Tensors) -> Tensor:
    """The input of kv_b, [..., rank], from raw [..., kv_width]."""
    return rms_norm(raw[..., : a.rank], weights.tensor(a.kv_a_norm).to(raw.device), a.eps)


def keep(a: Attention, raw: Tensor, tables: Tables, weights: Tensors, eps: float) -> KV:
    """What is kept of raw [batch, time, kv_width]: two tensors [batch, heads, time, width]."""
    if isinstance(a, MLA):
        shared = deinterleave(raw[:, None, :, a.rank :])
        return latent(a, raw, weights)[:, None], apply_rope(shared, *tables)
    k, v = (_split_heads(x, a.head_dim) for x in raw.chunk(2, dim=-1))
    if a.k_norm and a.norm_first:
        return apply_rope(rms_norm(k, weights.tensor(a.k_norm).to(k.device), eps), *tables), v
    k = apply_rope(k, *tables)
    return (rms_norm(k, None, eps) if a.k_norm else k), v


def query_input(a: Attention, x: Tensor, linear: Apply, weights: Tensors) -> Tensor:
    """What q reads: x itself, or MLA's normalised query latent."""
    if isinstance(a, GQA) or a.q_a is None or a.q_a_norm is None:
        return x
    return rms_norm(linear(a.q_a, x), weights.tensor(a.q_a_norm).to(x.device), a.eps)


def query(a: Attention, x: Tensor, linear: Apply, tables: Tables, weights: Tensors, eps: float) -> Tensor:
    """x [batch, time, hidden] -> the query, [batch, heads, time, head_dim]."""
    raw = linear(a.q, query_input(a, x, linear, weights))
    if isinstance(a, MLA):
        q = _split_heads(raw, a.nope_dim + a.rope_dim)
        plain, rotated = q.split((a.nope_dim, a.rope_dim), dim=-1)
        return torch.cat((plain, apply_rope(deinterleave(rotated), *tables)), dim=-1)
    q = _split_heads(raw, a.head_dim)
    if a.q_norm is None or a.k_norm is None:
        return apply_rope(q, *tables)
    q_weight = weights.tensor(a.q_norm).to(q.device)
    if a.norm_first:
        return apply_rope(rms_norm(q, q_weight, eps), *tables)
    return rms_norm(apply_rope(q, *tables), q_weight, eps) * weights.tensor(a.k_norm).to(q)


def attention_core(a: Attention, q: Tensor, kept: KV, linear: Apply, padding: Tensor | None = None) -> Tensor:
    """From query and kept K/V to the input of o, [batch, time, o.in_features]. padding: see `blocks.attend`."""
    if isinstance(a, GQA):
        return attend(q, *kept, padding=padding)
    compressed, shared = kept
    expanded = _split_heads(linear(a.kv_b, compressed[:, 0].contiguous()), a.nope_dim + a.v_dim)
    plain, v = expanded.split((a.nope_dim, a.v_dim), dim=-1)
    k = torch.cat((plain, shared.to(plain.dtype).expand(-1, a.heads, -1, -1)), dim=-1)
    return attend(q, k, v, a.scale, padding)
