"""The mathematics of a decoder layer as plain functions on tensors. No weights live here, no state, no modules.

Sources of the definitions: for Hunyuan-Large its released modelling code (arXiv 2411.02265), in which RoPE comes before the
per-head RMSNorm of query and key and the top-1 router weight is the raw softmax probability; for the others the papers
that `spec.py` names.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.model.spec import Llama3, Rope, Router, Yarn

__all__ = ["Routing", "apply_rope", "deinterleave", "frequencies", "rms_norm", "rope_tables", "route"]


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, times weight [..., d]; computed in float32, returned as x.dtype."""
    normed = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) if weight is None else normed.to(x.dtype) * weight.to(x.dtype)


def _llama3(plain: Tensor, s: Llama3) -> Tensor:
    turns = s.original_context * plain / (2 * math.pi)  # within the original context
    keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return keep * plain + (1 - keep) * plain / s.factor


def _yarn(plain: Tensor, s: Yarn, rope: Rope) -> Tensor:
    def index_of(turns: float) -> float:
        """Which frequency, as a real number, turns that often within the original context."""
        return rope.dim * math.log(s.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low = max(math.floor(index_of(s.beta_fast)), 0)
    high = min(math.ceil(index_of(s.beta_slow)), rope.dim - 1)
    steps = torch.arange(len(plain), dtype=torch.float32, device=plain.device)
    stretch = ((steps - low) / max(high - low, 0.001)).clamp(0, 1)
    return stretch * plain / s.factor + (1 - stretch) * plain


def frequencies(rope: Rope, device: torch.device | None = None) -> Tensor:
    """Radians per position, float32 [dim / 2]."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32, device=device) / rope.dim
    plain = 1.0 / (rope.base**exponents)
    if rope.bf16_frequencies:
        plain = plain.bfloat16().float()
    if isinstance(rope.scaling, Llama3):
        return _llama3(plain, rope.scaling)
    return _yarn(plain, rope.scaling, rope) if rope.scaling else plain


def rope_tables(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [..., dim], for int64 positions [...]."""
    angles = positions.float()[..., None] * frequencies(rope, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    factor = rope.scaling.rope_factor if isinstance(rope.scaling, Yarn) else 1.0
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate-half RoPE of x [batch, heads, time, dim] by tables [time, dim] or [batch, 1, time, dim]."""
    half = x.shape[-1] // 2
    rotated = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.to(x.dtype) + rotated * sin.to(x.dtype)


def deinterleave(x: Tensor) -> Tensor:
    """[..., d]: even elements, then odd ones. Takes pairs of neighbours to the pairs that `apply_rope` rotates."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


@dataclass(frozen=True)
class Routing:
    """Which experts n tokens go to: experts int64 [n, k] best first, weights float32 [n, k], logits float32 [n, E]."""

    experts: Tensor
    weights: Tensor
    logits: Tensor


def route(x: Tensor, router: Router, weight: Tensor) -> Routing:
    """Softmax over all experts in float32, best k. x [n, hidden], weight [E, hidden]. No capacity, no dropping."""
    logits = F.linear(x.float(), weight.float())
    scores = logits.softmax(-1)
    if router.groups > 1:
        grouped = scores.unflatten(-1, (router.groups, -1))
        best = grouped.amax(-1).topk(router.top_groups, dim=-1).indices
        outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, False)
        scores = grouped.masked_fill(outside[..., None], 0.0).flatten(-2)
    weights, experts = scores.topk(router.top_k, dim=-1)
    if router.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return Routing(experts, weights * router.scale, logits)
