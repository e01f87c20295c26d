"""A model's layers on few tokens: which half of which layer goes in one call of the kernels, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from quantkit.kernels.backend import AttentionParts, AttentionStep, MlpParts, MlpStep, QuantExperts, QuantLinear, Steps
from quantkit.model.attend import FEW
from quantkit.model.attention import Positions
from quantkit.model.blocks import Routing
from quantkit.model.cache import Cache, KVStore
from quantkit.model.spec import GQA, MLP, Layer, Linear, ModelSpec

__all__ = ["FusedHalves"]

_WIDEST = 512  # elements of a head, in the library's registers and stack


class FusedHalves:
    """Steps for the halves of layers, made when first asked for. steps: the kernels' own, or why there are none.

    linear: a linear on its kernel, None where it has none. experts: a layer's MLPs on one kernel. tensor: norms and routers.
    """

    def __init__(
        self,
        steps: Steps | str,
        linear: Callable[[Linear], QuantLinear | None],
        experts: Callable[[tuple[MLP, ...]], QuantExperts | None],
        tensor: Callable[[str], Tensor],
    ) -> None:
        self.steps, self._linear, self._experts, self._tensor = steps, linear, experts, tensor
        self._attention: dict[int, AttentionStep | str] = {}
        self._mlp: dict[int, MlpStep | str] = {}

    def attention_half(self, layer: Layer, h: Tensor, at: Positions, store: KVStore) -> Tensor | None:
        """As `Weights.attention_half`: for few positions, with a cache."""
        if h.shape[1] > FEW or not isinstance(store, Cache) or not _fits(h):
            return None
        step, a = self.attention(layer), layer.attention
        if isinstance(step, str) or not isinstance(a, GQA):
            return None
        batch, time, _ = h.shape
        if a.k is None:
            key, value = store.buffers(a.kv_from)
        else:
            key, value = store.extend(layer.index, batch, a.kv_heads, time, a.head_dim)
        return step(h, at.tables, at.padding, key.parts, value.parts, key.length)

    def mlp_half(self, layer: Layer, h: Tensor) -> tuple[Tensor, Routing | None] | None:
        """As `Weights.mlp_half`: for few positions."""
        if h.shape[1] > FEW or not _fits(h) or isinstance(step := self.mlp(layer), str):
            return None
        out, routed = step(h)
        return out, None if routed is None else Routing(*routed)

    def attention(self, layer: Layer) -> AttentionStep | str:
        """The step of a layer's attention, or why there is none."""
        if layer.index not in self._attention:
            self._attention[layer.index] = self._make_attention(layer)
        return self._attention[layer.index]

    def mlp(self, layer: Layer) -> MlpStep | str:
        """The step of a layer's MLP or experts, or why there is none."""
        if layer.index not in self._mlp:
            self._mlp[layer.index] = self._make_mlp(layer)
        return self._mlp[layer.index]

    def _make_attention(self, layer: Layer) -> AttentionStep | str:
        a = layer.attention
        if isinstance(self.steps, str):
            return self.steps
        if not isinstance(a, GQA):
            return "latent attention has no step"
        if a.head_dim > _WIDEST or (a.q_norm is None) != (a.k_norm is None):
            return f"no step for heads of {a.head_dim}, or a norm of one side alone"
        q, k, v, o = (None if ref is None else self._linear(ref) for ref in (a.q, a.k, a.v, a.o))
        if q is None or o is None or (k is None or v is None) != (a.k is None):
            return "its linears have no kernel"
        q_norm, k_norm = (None if key is None else self._tensor(key) for key in (a.q_norm, a.k_norm))
        norms, sizes = (q_norm, k_norm, a.norm_first), (a.heads, a.kv_heads, a.head_dim)
        parts = AttentionParts(q, k, v, o, self._tensor(layer.input_norm), *norms, *sizes, layer.eps)
        return self.steps.attention(parts) or "no step for these kernels"

    def _make_mlp(self, layer: Layer) -> MlpStep | str:
        if isinstance(self.steps, str):
            return self.steps
        norm, spec = self._tensor(layer.post_attention_norm), layer.mlp
        if isinstance(spec, MLP):
            if (kernel := self._experts((spec,))) is None:
                return "its linears have no kernel together"
            parts = MlpParts(kernel, None, False, norm, None, 1, False, 1.0, layer.eps)
            return self.steps.mlp(parts) or "no step for these kernels"
        if spec.router.groups > 1:
            return "group-limited routing has no step"
        apart, among = None, spec.shared is not None
        kernel = self._experts((*spec.experts, spec.shared)) if spec.shared else None
        if kernel is None:
            kernel, among = self._experts(spec.experts), False
            apart = self._experts((spec.shared,)) if spec.shared else None
        if kernel is None or (spec.shared and not among and apart is None):
            return "its experts have no kernel together"
        r = spec.router
        router = self._tensor(r.weight), r.top_k, r.renormalise, r.scale
        parts = MlpParts(kernel, apart, among, norm, *router, layer.eps)
        return self.steps.mlp(parts) or "no step for a router that is not BF16"

    def explain(self, spec: ModelSpec) -> Iterator[tuple[str, str, str]]:
        """(half, kernel or "torch", why) of each layer's halves."""
        name = self.steps if isinstance(self.steps, str) else self.steps.name
        why = "few tokens of a layer in one call"
        for layer in spec.layers:
            for half, step in (("attention half", self.attention(layer)), ("mlp half", self.mlp(layer))):
                yield (half, "torch", step) if isinstance(step, str) else (half, name, why)


def _fits(h: Tensor) -> bool:
    return h.device.type == "cpu" and h.dtype is torch.float32
