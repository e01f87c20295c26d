"""Causal attention over keys and values as they are kept. Query heads that share a key are rows of one product: nothing
is copied for them.

Few new positions after many: products in float32 with blocks of the cache, each decoded for itself. Many: torch's own
kernel, which never holds their scores, on at most `_MASK` elements of a mask at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.model.cache import Kept

__all__ = ["FEW", "attend", "continues", "mix", "probabilities", "scores"]

FEW = 8  # new positions whose scores are held whole
_MASK = 2**22


def continues(t: int, s: int) -> bool:
    """Whether t queries, the last of s positions, are few after many."""
    return t <= FEW and t < s


def attend(q: Tensor, k: Kept, v: Kept, scale: float | None = None, padding: Tensor | None = None) -> Tensor:
    """Causal attention; q [b, heads, t, d], k [b, kv_heads, s, d], v [b, kv_heads, s, dv], s >= t, the queries are the last
    t positions.

    Returns [b, t, heads * dv] in q.dtype. Scale 1/sqrt(d) by default; each key head serves heads / kv_heads query heads.
    padding: int64 [b], the number of positions at the start of a row that nothing after them sees.
    """
    b, heads, t, d = q.shape
    if continues(t, k.shape[2]):
        products = scores(q.unflatten(1, (k.shape[1], -1)), k)
        p = probabilities(products, d**-0.5 if scale is None else scale, padding)
        out = mix(p, v).flatten(1, 2).to(q.dtype)
    else:
        out = _many(q, k.decode(q.dtype), v.decode(q.dtype), scale, padding)
    return out.transpose(1, 2).reshape(b, t, heads * v.shape[-1])


def scores(q: Tensor, k: Kept) -> Tensor:
    """q [b, kv_heads, group, t, d] times the keys [b, kv_heads, s, d]: float32 [b, kv_heads, group, t, s]."""
    rows = q.flatten(2, 3).float()
    products = torch.cat([rows @ part.transpose(-1, -2) for part in k.blocks()], dim=-1)
    if k.scale is not None:
        products = products * k.scale.float().transpose(-1, -2)
    by_head: Tensor = products.unflatten(2, q.shape[2:4])
    return by_head


def probabilities(products: Tensor, scale: float, padding: Tensor | None) -> Tensor:
    """The softmax over what each of the last t positions sees, float32 like the scores [b, kv_heads, group, t, s]."""
    t, s = products.shape[-2:]
    if t > 1 or padding is not None:
        visible = _visible(s - t, s, s, padding, products.device)
        products = products.masked_fill(~visible[:, :, None] if padding is not None else ~visible, -torch.inf)
    return (products * scale).softmax(-1)


def mix(p: Tensor, v: Kept) -> Tensor:
    """Values [b, kv_heads, s, dv] weighted by p [b, kv_heads, group, t, s]: float32 [b, kv_heads, group, t, dv]."""
    rows = p.flatten(2, 3)
    if v.scale is not None:
        rows = rows * v.scale.float().transpose(-1, -2)
    out, start = torch.zeros((), device=p.device), 0
    for part in v.blocks():
        out = out + rows[..., start : start + part.shape[2]] @ part
        start += part.shape[2]
    by_head: Tensor = out.unflatten(2, p.shape[2:4])
    return by_head


def _many(q: Tensor, k: Tensor, v: Tensor, scale: float | None, padding: Tensor | None) -> Tensor:
    """As `attend`, [b, heads, t, dv]. A batch of groups, so that queries share their key head by a stride of 0."""
    b, kv_heads, s, d = k.shape
    group, t, dv = q.shape[1] // kv_heads, q.shape[2], v.shape[-1]
    if dv < d:  # the kernel that holds no scores takes one width
        v = F.pad(v, (0, d - dv))
    q, k, v = q.reshape(-1, group, t, d), *(x.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    if s == t and padding is None:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        parts, step = [], max(FEW, _MASK // (s if padding is None else s * b * kv_heads))
        for start in range(0, t, step):
            end = min(start + step, t)
            reach = s - t + end
            visible = _visible(s - t + start, reach, reach, padding, q.device)
            if padding is not None:
                visible = visible.repeat_interleave(kv_heads, dim=0)
            rows = q[:, :, start:end], k[:, :, :reach], v[:, :, :reach]
            parts.append(F.scaled_dot_product_attention(*rows, attn_mask=visible, scale=scale))
        out = torch.cat(parts, dim=2)
    return out[..., :dv].reshape(b, kv_heads * group, t, dv)


def _visible(first: int, last: int, s: int, padding: Tensor | None, device: torch.device) -> Tensor:
    """Whether positions first .. last see each of s: bool [last - first, s], or with padding [b, 1, last - first, s]."""
    at, of = torch.arange(s, device=device), torch.arange(first, last, device=device)[:, None]
    visible = at <= of
    if padding is None:
        return visible
    # A padded position still sees itself: a softmax over nothing would be NaN.
    return (visible & (at >= padding.to(device)[:, None, None]) | (at == of))[:, None]
