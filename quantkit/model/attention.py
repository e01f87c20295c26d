"""Attention as functions of its spec: raw K/V, what is kept of it, scores and values; for `forward.py` and `calib/walk.py`.

GQA keeps K and V. Cross-layer attention (CLA): a group of layers shares one raw K and V. The released code rotates and
normalises K anew in each layer with that layer's own key norm. A score only sees q_norm_w * k_norm_w * (q_hat . k_hat), so
the key that is kept is rotated and normalised WITHOUT a weight, once per group, and each layer folds its key-norm weight
into its query. This is exact, and it is why a cache holds one key and one value per group. A norm that comes before RoPE
(`norm_first`) cannot be moved to the query; its key is kept with its weight.

MLA keeps the normalised latent and the rotated shared key. A prompt expands them by kv_b to K and V of all heads. Few new
positions after many do not: a score is q . (B_k latent) = (B_k^T q) . latent and a head's output B_v (p . latent), so kv_b
meets the new positions alone, and all heads share the latent as their one key and value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from quantkit.model.attend import attend, continues, mix, probabilities, scores
from quantkit.model.blocks import apply_rope, deinterleave, rms_norm
from quantkit.model.cache import KV, Kept
from quantkit.model.spec import GQA, MLA, Attention, Linear

__all__ = ["Apply", "Matrix", "Tables", "Tensors", "attention_core", "keep", "latent", "query", "query_input", "raw_kv"]

Apply = Callable[[Linear, Tensor], Tensor]
Matrix = Callable[[Linear], Tensor]
Tables = tuple[Tensor, Tensor]
_HEADS = 4  # of which weights are made float32 at once, on a CPU


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


def attention_core(
    a: Attention,
    q: Tensor,
    kept: tuple[Kept, Kept],
    linear: Apply,
    padding: Tensor | None = None,
    matrix: Matrix | None = None,
) -> Tensor:
    """From query and kept K/V to the input of o, [batch, time, o.in_features]. padding: see `attend`.

    matrix: gives a linear's weight [out, in], any float; MLA's latents are then attended as they are where that is less
    work. They must be what kv_b makes of its input: rounded already, where its scheme rounds inputs.
    """
    k, v = kept
    if isinstance(a, GQA):
        return attend(q, k, v, padding=padding)
    if matrix is not None and continues(q.shape[2], k.shape[2]):
        return _absorbed(a, q, kept, matrix(a.kv_b), padding)
    compressed, shared = k.decode(q.dtype), v.decode(q.dtype)
    expanded = _split_heads(linear(a.kv_b, compressed[:, 0].contiguous()), a.nope_dim + a.v_dim)
    plain, values = expanded.split((a.nope_dim, a.v_dim), dim=-1)
    keys = torch.cat((plain, shared.to(plain.dtype).expand(-1, a.heads, -1, -1)), dim=-1)
    return attend(q, Kept(keys), Kept(values), a.scale, padding)


def _absorbed(a: MLA, q: Tensor, kept: tuple[Kept, Kept], kv_b: Tensor, padding: Tensor | None) -> Tensor:
    """Attention on the latents themselves; kv_b [heads * (nope + v), rank]."""
    latents, shared = kept
    plain, rotated = q.split((a.nope_dim, a.rope_dim), dim=-1)
    of_keys, of_values = kv_b.unflatten(0, (a.heads, -1)).split((a.nope_dim, a.v_dim), dim=1)
    inner = _by_head(plain, of_keys)
    found = scores(inner[:, None], latents) + scores(rotated[:, None], shared)
    seen = mix(probabilities(found, a.scale, padding), latents)[:, 0]
    return _by_head(seen, of_values.transpose(1, 2)).to(q.dtype).transpose(1, 2).flatten(2)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [batch, heads, time, in] times each head's own weight [heads, in, out], float32 [batch, heads, time, out]."""
    rows = x.float().transpose(0, 1).flatten(1, 2)  # [heads, batch * time, in]
    step = _HEADS if weight.dtype is not torch.float32 and weight.device.type == "cpu" else len(weight)
    out = torch.cat([part @ own.float() for part, own in zip(rows.split(step), weight.split(step), strict=True)])
    by_head: Tensor = out.unflatten(1, (x.shape[0], -1))
    return by_head.transpose(0, 1)
