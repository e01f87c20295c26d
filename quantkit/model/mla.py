"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

What is kept is the normalised latent and the rotated shared key. A prompt expands them by kv_b to K and V of all heads. Few
new positions after many do not: a score is q . (B_k latent) = (B_k^T q) . latent and a head's output B_v (p . latent), so
kv_b meets the new positions alone, and all heads share the latent as their one key and value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quantkit.model.attend import attend, continues, mix, probabilities, scores
from quantkit.model.attention import AttentionKind, Positions, split_heads
from quantkit.model.blocks import apply_rope, deinterleave, rms_norm
from quantkit.model.cache import KV, Kept, KeptKV
from quantkit.model.spec import MLA
from quantkit.model.weights import Weights

__all__ = ["Latent"]

_HEADS = 4  # of which weights are made float32 at once, on a CPU


class Latent(AttentionKind[MLA]):
    def kept(self, a: MLA, x: Tensor, weights: Weights, at: Positions, eps: float, for_later: bool) -> KV | None:
        raw = weights.linear(a.kv_a, x)
        latent = rms_norm(raw[..., : a.rank], weights.tensor(a.kv_a_norm), a.eps)[:, None]
        if for_later:  # rounded once, so that later positions need no kv_b; twice changes nothing
            latent = weights.read(a.kv_b, latent)
        return latent, apply_rope(deinterleave(raw[:, None, :, a.rank :]), *at.tables)

    def query(self, a: MLA, x: Tensor, weights: Weights, at: Positions, eps: float) -> Tensor:
        if a.q_a is not None and a.q_a_norm is not None:
            x = rms_norm(weights.linear(a.q_a, x), weights.tensor(a.q_a_norm), a.eps)
        q = split_heads(weights.linear(a.q, x), a.nope_dim + a.rope_dim)
        plain, rotated = q.split((a.nope_dim, a.rope_dim), dim=-1)
        return torch.cat((plain, apply_rope(deinterleave(rotated), *at.tables)), dim=-1)

    def core(self, a: MLA, query: Tensor, kv: KeptKV, weights: Weights, at: Positions) -> Tensor:
        latent, shared = kv
        if continues(query.shape[2], latent.shape[2]) and weights.absorbs(a.kv_b):
            return _absorbed(a, query, kv, weights.matrix(a.kv_b), at.padding)
        latents, past = latent.decode(query.dtype)[:, 0].contiguous(), latent.shape[2] - query.shape[2]
        products = weights.linear(a.kv_b, latents[:, past:].contiguous())
        if past:
            products = torch.cat((weights.again(a.kv_b, latents[:, :past].contiguous()), products), dim=1)
        expanded = split_heads(products, a.nope_dim + a.v_dim)
        plain, values = expanded.split((a.nope_dim, a.v_dim), dim=-1)
        keys = torch.cat((plain, shared.decode(query.dtype).to(plain.dtype).expand(-1, a.heads, -1, -1)), dim=-1)
        return attend(query, Kept(keys), Kept(values), a.scale, at.padding)


def _absorbed(a: MLA, q: Tensor, kv: KeptKV, kv_b: Tensor, padding: Tensor | None) -> Tensor:
    """Attention on the latents themselves; kv_b [heads * (nope + v), rank]. The latents must be what kv_b makes of its
    input: rounded already, where its scheme rounds inputs."""
    latents, shared = kv
    plain, rotated = q.split((a.nope_dim, a.rope_dim), dim=-1)
    of_keys, of_values = kv_b.unflatten(0, (a.heads, -1)).split((a.nope_dim, a.v_dim), dim=1)
    inner = _by_head(plain, of_keys)
    both = scores(inner[:, None], latents) + scores(rotated[:, None], shared)
    mixed = mix(probabilities(both, a.scale, padding), latents)[:, 0]
    return _by_head(mixed, of_values.transpose(1, 2)).to(q.dtype).transpose(1, 2).flatten(2)


def _by_head(x: Tensor, weight: Tensor) -> Tensor:
    """x [batch, heads, time, in] times each head's own weight [heads, in, out], float32 [batch, heads, time, out]."""
    rows = x.float().transpose(0, 1).flatten(1, 2)  # [heads, batch * time, in]
    step = _HEADS if weight.dtype is not torch.float32 and weight.device.type == "cpu" else len(weight)
    out = torch.cat([part @ own.float() for part, own in zip(rows.split(step), weight.split(step), strict=True)])
    by_head: Tensor = out.unflatten(1, (x.shape[0], -1))
    return by_head.transpose(0, 1)
