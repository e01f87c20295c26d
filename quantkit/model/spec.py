"""What a model is made of, as data: every linear with its name on disk, shape and role, and how layers are wired.

A spec holds no weights and no tensors. `forward.py` runs it, `calib/walk.py` walks it, `plan.py` compares its names with
a checkpoint's. A new architecture is one file that maps a config.json to a `ModelSpec`, and one row in `registry.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

__all__ = ["MLP", "MoE", "Attention", "Layer", "Linear", "ModelSpec", "Role", "Rope"]


class Role(str, Enum):
    """What a linear is for. Recipes speak in these words; router and head are never quantised."""

    ATTENTION = "attention"
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared_experts"
    MLP = "mlp"
    ROUTER = "router"
    HEAD = "head"


@dataclass(frozen=True)
class Linear:
    """y = x W^T without bias; W is stored as `key` + '.weight', shape [out_features, in_features]."""

    key: str
    out_features: int
    in_features: int
    role: Role

    @property
    def weight(self) -> str:
        return f"{self.key}.weight"


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention. A cross layer (k and v are None) borrows K and V from layer `kv_from`."""

    q: Linear
    k: Linear | None
    v: Linear | None
    o: Linear
    q_norm: str | None
    k_norm: str | None
    heads: int
    kv_heads: int
    head_dim: int
    kv_from: int

    def linears(self) -> tuple[Linear, ...]:
        return tuple(ref for ref in (self.q, self.k, self.v, self.o) if ref is not None)


@dataclass(frozen=True)
class MLP:
    """down(silu(gate(x)) * up(x))."""

    gate: Linear
    up: Linear
    down: Linear

    def linears(self) -> tuple[Linear, ...]:
        return (self.gate, self.up, self.down)


@dataclass(frozen=True)
class MoE:
    """Routed experts plus an ungated shared one. `renormalise`: divide the top-k probabilities by their sum."""

    router: Linear
    experts: tuple[MLP, ...]
    shared: MLP | None
    top_k: int
    renormalise: bool

    def linears(self) -> tuple[Linear, ...]:
        shared = self.shared.linears() if self.shared else ()
        return (*shared, *(ref for expert in self.experts for ref in expert.linears()))


@dataclass(frozen=True)
class Layer:
    """h += attention(norm(h)); h += mlp(norm(h))."""

    index: int
    input_norm: str
    post_attention_norm: str
    attention: Attention
    mlp: MoE | MLP

    def linears(self) -> tuple[Linear, ...]:
        """The linears that a recipe may quantise (the router is not among them)."""
        return (*self.attention.linears(), *self.mlp.linears())

    def same_input(self) -> list[tuple[Linear, ...]]:
        """The same linears, grouped by the tensor they read: q, k, v together, gate and up together."""
        a = self.attention
        moe = self.mlp if isinstance(self.mlp, MoE) else None
        mlps = [self.mlp] if isinstance(self.mlp, MLP) else []
        if moe:
            mlps = [*([moe.shared] if moe.shared else []), *moe.experts]
        groups: list[tuple[Linear, ...]] = [tuple(ref for ref in (a.q, a.k, a.v) if ref is not None), (a.o,)]
        for mlp in mlps:
            groups += [(mlp.gate, mlp.up), (mlp.down,)]
        return groups

    def kept(self) -> dict[str, tuple[int, ...]]:
        """Tensors that are carried over unchanged, with their shapes."""
        a, hidden = self.attention, self.attention.q.in_features
        kept: dict[str, tuple[int, ...]] = {self.input_norm: (hidden,), self.post_attention_norm: (hidden,)}
        kept.update({key: (a.head_dim,) for key in (a.q_norm, a.k_norm) if key})
        if isinstance(self.mlp, MoE):
            router = self.mlp.router
            kept[router.weight] = (router.out_features, router.in_features)
        return kept


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding, rotate-half form. `base` already holds any NTK factor."""

    head_dim: int
    base: float
    bf16_frequencies: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. `head` is None when the output head is tied to the embedding."""

    architecture: str
    hidden: int
    vocab: int
    eps: float
    rope: Rope
    layers: tuple[Layer, ...]
    embedding: str
    final_norm: str
    head: str | None

    def linears(self) -> Iterator[Linear]:
        for layer in self.layers:
            yield from layer.linears()

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the unquantised checkpoint, name to shape."""
        shapes: dict[str, tuple[int, ...]] = {self.embedding: (self.vocab, self.hidden)}
        for layer in self.layers:
            shapes.update(layer.kept())
            shapes.update({ref.weight: (ref.out_features, ref.in_features) for ref in layer.linears()})
        shapes[self.final_norm] = (self.hidden,)
        if self.head:
            shapes[self.head] = (self.vocab, self.hidden)
        return shapes

    def groups(self) -> list[tuple[Layer, ...]]:
        """Layers that share one K/V, in order: the unit of commitment, so no borrowed K/V crosses a commit."""
        groups: dict[int, list[Layer]] = {}
        for layer in self.layers:
            groups.setdefault(layer.attention.kv_from, []).append(layer)
        return [tuple(layers) for layers in groups.values()]
