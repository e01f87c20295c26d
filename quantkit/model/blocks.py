"""The mathematics of a decoder layer as plain functions on tensors. No weights live here, no state, no modules.

Source of the definitions: the released modelling code of Hunyuan-Large (arXiv 2411.02265). Its order is RoPE first, then
a per-head RMSNorm of query and key; its top-1 router weight is the raw softmax probability.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.model.spec import Rope

__all__ = ["Routing", "apply_rope", "attend", "rms_norm", "rope_tables", "route"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times weight [..., d]; computed in float32, returned as x.dtype."""
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) if weight is None else normed.to(x.dtype) * weight.to(x.dtype)


def rope_tables(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [len(positions), head_dim], for int64 positions [t]."""
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.float32, device=positions.device) / rope.head_dim
    frequencies = 1.0 / (rope.base**exponents)
    if rope.bf16_frequencies:
        frequencies = frequencies.bfloat16().float()
    angles = torch.outer(positions.float(), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE of x [batch, heads, time, head_dim] by tables [time, head_dim]."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention; q [b, heads, t, d], k and v [b, kv_heads, s, d], s >= t, the queries are the last t positions.

    Returns [b, t, heads * d]. Scale 1/sqrt(d); each key head serves heads / kv_heads query heads.
    """
    b, heads, t, d = q.shape
    s = k.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    if s == t:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        visible = torch.arange(s, device=q.device)[None, :] <= torch.arange(s - t, s, device=q.device)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return out.transpose(1, 2).reshape(b, t, heads * d)


@dataclass(frozen=True)
class Routing:
    """Which experts n tokens go to: experts int64 [n, k] best first, weights float32 [n, k], logits float32 [n, E]."""

    experts: Tensor
    weights: Tensor
    logits: Tensor


def route(x: Tensor, router: Tensor, top_k: int, renormalise: bool) -> Routing:
    """Softmax over all experts in float32, best k. x [n, hidden], router [E, hidden]. No capacity, no dropping."""
    logits = F.linear(x.float(), router.float())
    weights, experts = logits.softmax(-1).topk(top_k, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights, logits)
