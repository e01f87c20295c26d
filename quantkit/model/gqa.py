"""Grouped-query attention, with layers that borrow K and V of another (cross-layer attention, CLA).

A group of layers shares one raw K and V. The released code of Hunyuan-Large rotates and normalises K anew in each layer with
that layer's own key norm. A score only sees q_norm_w * k_norm_w * (q_hat . k_hat), so the key that is kept is rotated and
normalised WITHOUT a weight, once per group, and each layer folds its key-norm weight into its query. This is exact, and it
is why a cache holds one key and one value per group. A norm that comes before RoPE (`norm_first`) cannot be moved to the
query; its key is kept with its weight.
"""

from __future__ import annotations

from torch import Tensor

from quantkit.model.attend import attend
from quantkit.model.attention import AttentionKind, Positions, split_heads
from quantkit.model.blocks import apply_rope, rms_norm
from quantkit.model.cache import KV, KeptKV
from quantkit.model.spec import GQA
from quantkit.model.weights import Weights

__all__ = ["GroupedQuery"]


class GroupedQuery(AttentionKind[GQA]):
    def kept(self, a: GQA, x: Tensor, weights: Weights, at: Positions, eps: float, for_later: bool) -> KV | None:
        if a.k is None or a.v is None:
            return None
        k, v = (split_heads(weights.linear(ref, x), a.head_dim) for ref in (a.k, a.v))
        if a.k_norm and a.norm_first:
            return apply_rope(rms_norm(k, weights.tensor(a.k_norm), eps), *at.tables), v
        k = apply_rope(k, *at.tables)
        return (rms_norm(k, None, eps) if a.k_norm else k), v

    def query(self, a: GQA, x: Tensor, weights: Weights, at: Positions, eps: float) -> Tensor:
        q = split_heads(weights.linear(a.q, x), a.head_dim)
        if a.q_norm is None or a.k_norm is None:
            return apply_rope(q, *at.tables)
        if a.norm_first:
            return apply_rope(rms_norm(q, weights.tensor(a.q_norm), eps), *at.tables)
        return rms_norm(apply_rope(q, *at.tables), weights.tensor(a.q_norm), eps) * weights.tensor(a.k_norm).to(q)

    def core(self, a: GQA, query: Tensor, kv: KeptKV, weights: Weights, at: Positions) -> Tensor:
        return attend(query, *kv, padding=at.padding)
