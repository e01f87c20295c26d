"""A model's layers on few tokens: which half of which layer goes in one call of the kernels, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from quantkit.kernels.backend import AttentionParts, AttentionStep, MlpParts, MlpStep, QuantExperts, QuantLinear, Steps
from quantkit.model.attend import FEW
from quantkit.model.attention import Positions
from quantkit.model.blocks import Routing
from quantkit.model.cache import Cache, KVStore
from quantkit.model.spec import GQA, MLP, Layer, Linear, ModelSpec

__all__ = ["FusedHalves"]

_WIDEST = 512  # elements of a head
_OTHER = "a kernel of another family, a router that is not BF16, or input scales that differ"


class Kernels(Protocol):
    """Where the halves' parts come from: `KernelWeights`."""

    def tensor(self, key: str) -> Tensor: ...

    def few(self, ref: Linear) -> QuantLinear | None:
        """A linear's kernel for few tokens, packed, quantized or not."""
        ...

    def together(self, parts: tuple[MLP, ...]) -> QuantExperts | None:
        """One kernel for all these MLPs, packed."""
        ...

    def has_few(self, ref: Linear) -> bool:
        """Whether `few` has one; packs nothing."""
        ...

    def has_together(self, parts: tuple[MLP, ...]) -> bool:
        """Whether `together` has one, as far as schemes and shapes say; packs nothing."""
        ...


class FusedHalves:
    """Steps for the halves of layers, made when first asked for. steps: the kernels' own, or why there are none."""

    def __init__(self, steps: Steps | str, kernels: Kernels) -> None:
        self.steps, self._kernels = steps, kernels
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
        if isinstance(self.steps, str) or not isinstance(a, GQA) or self._no_attention(layer):
            return self._no_attention(layer)
        q, k, v, o = (None if ref is None else self._kernels.few(ref) for ref in (a.q, a.k, a.v, a.o))
        assert q is not None and o is not None
        q_norm, k_norm = (None if key is None else self._kernels.tensor(key) for key in (a.q_norm, a.k_norm))
        norms, sizes = (q_norm, k_norm, a.norm_first), (a.heads, a.kv_heads, a.head_dim)
        parts = AttentionParts(q, k, v, o, self._kernels.tensor(layer.input_norm), *norms, *sizes, layer.eps)
        return self.steps.attention(parts) or _OTHER

    def _no_attention(self, layer: Layer) -> str:
        """Why a layer's attention has no step, or nothing."""
        a = layer.attention
        if isinstance(self.steps, str):
            return self.steps
        if not isinstance(a, GQA):
            return "no step for latent attention"
        if a.head_dim > _WIDEST or (a.q_norm is None) != (a.k_norm is None):
            return f"no step for heads of {a.head_dim}, or a norm of query or key alone"
        return "" if all(map(self._kernels.has_few, a.linears())) else "a linear of it has no kernel"

    def _make_mlp(self, layer: Layer) -> MlpStep | str:
        if isinstance(self.steps, str) or self._no_mlp(layer):
            return self._no_mlp(layer)
        norm, spec = self._kernels.tensor(layer.post_attention_norm), layer.mlp
        if isinstance(spec, MLP):
            kernel = self._kernels.together((spec,))
            parts = kernel and MlpParts(kernel, None, False, norm, None, 1, False, 1.0, layer.eps)
        else:
            r, shared = spec.router, (spec.shared,) if spec.shared else ()
            kernel = self._kernels.together((*spec.experts, *shared)) if shared else None
            among, apart = kernel is not None, None
            if kernel is None:
                kernel, apart = self._kernels.together(spec.experts), self._kernels.together(shared) if shared else None
            router = self._kernels.tensor(r.weight), r.top_k, r.renormalise, r.scale
            whole = kernel and (among or len(shared) == (apart is not None))
            parts = MlpParts(kernel, apart, among, norm, *router, layer.eps) if kernel and whole else None
        return (parts and self.steps.mlp(parts)) or _OTHER

    def _no_mlp(self, layer: Layer) -> str:
        """Why a layer's MLP or experts have no step, or nothing."""
        spec = layer.mlp
        if isinstance(self.steps, str):
            return self.steps
        if isinstance(spec, MLP):
            return "" if self._kernels.has_together((spec,)) else "its linears have no kernel together"
        if spec.router.groups > 1:
            return "no step for group-limited routing"
        routed, shared = spec.experts, (spec.shared,) if spec.shared else ()
        alike = self._kernels.has_together((*routed, *shared))
        apart = self._kernels.has_together(routed) and all(self._kernels.has_together((one,)) for one in shared)
        return "" if alike or apart else "its experts have no kernel together"

    def explain(self, spec: ModelSpec) -> Iterator[tuple[str, str, str]]:
        """(half, kernel or "torch", why) of each layer's halves, of which none is packed for this."""
        name, done = self.steps if isinstance(self.steps, str) else self.steps.name, "few tokens in one call"
        for layer in spec.layers:
            for half, why in (("attention", self._no_attention(layer)), ("mlp", self._no_mlp(layer))):
                yield half, "single calls" if why else name, why or done


def _fits(h: Tensor) -> bool:
    return h.device.type == "cpu" and h.dtype is torch.float32
