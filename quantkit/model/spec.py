"""What a model is made of, as data: every linear with its name on disk, shape and role, and how layers are wired.

A spec holds no weights and no tensors. `layer.py` computes it, `job/plan.py` compares its names with
a checkpoint's. A new architecture is one file that maps a config.json to a `ModelSpec`, and one row in `registry.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

__all__ = [
    "GQA",
    "HEAD",
    "MLA",
    "MLP",
    "OPTION_ROLES",
    "Attention",
    "Layer",
    "Linear",
    "Llama3",
    "MoE",
    "ModelSpec",
    "Role",
    "Rope",
    "Router",
    "Yarn",
]

HEAD = "lm_head.weight"  # which a tied model may store too


class Role(str, Enum):
    """What a linear is for. Recipes speak in these words; router and head are never quantized."""

    ATTENTION = "attention"
    EXPERTS = "experts"
    SHARED_EXPERTS = "shared_experts"
    MLP = "mlp"
    ROUTER = "router"
    HEAD = "head"
    LINEAR = "linear"  # of a model whose architecture is not known

    @property
    def option(self) -> str:
        """What the command line calls its scheme, if it is one of OPTION_ROLES."""
        return f"--{self.value.replace('_', '-')}"


# Roles for which a recipe has a scheme of its own, in a field that is called as the role is.
OPTION_ROLES = (Role.EXPERTS, Role.SHARED_EXPERTS, Role.ATTENTION, Role.MLP)


@dataclass(frozen=True, slots=True)
class Linear:
    """y = x W^T without bias; W is stored as `key` + '.weight', shape [out_features, in_features]."""

    key: str
    out_features: int
    in_features: int
    role: Role

    @property
    def weight(self) -> str:
        return f"{self.key}.weight"


@dataclass(frozen=True, slots=True)
class Router(Linear):
    """softmax(x W^T), best `top_k`, and the weight each of them gets.

    renormalise: divide the chosen probabilities by their sum. scale: multiply them. groups, top_groups: cut the experts
    into that many groups of equal size and choose among the experts of the best groups only, where a group is as good as
    its best expert (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
    """

    top_k: int
    renormalise: bool
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True)
class GQA:
    """Grouped-query attention. A cross layer (k and v are None) borrows K and V from layer `kv_from`.

    q_norm, k_norm: RMS norms of each head, before RoPE if `norm_first`, else after it.
    """

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
    norm_first: bool = False

    @property
    def kv_width(self) -> int:
        """Elements of raw K and V for a token."""
        return 2 * self.kv_heads * self.head_dim

    def linears(self) -> tuple[Linear, ...]:
        return tuple(ref for ref in (self.q, self.k, self.v, self.o) if ref is not None)

    def waves(self) -> list[list[tuple[Linear, ...]]]:
        """Groups of linears that read one input; what a wave reads is made by the waves before it."""
        return [[self.linears()[:-1]], [(self.o,)]]

    def absorbed(self) -> tuple[Linear, ...]:
        """Linears of which decoding needs the plain matrix (`Weights.matrix`)."""
        return ()

    def norms(self) -> dict[str, tuple[int, ...]]:
        return {key: (self.head_dim,) for key in (self.q_norm, self.k_norm) if key}


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    kv_a gives a latent of `rank`, normalised, from which kv_b makes each head's key (`nope_dim`) and value (`v_dim`), and
    one more key part (`rope_dim`) that is rotated and that all heads share. q reads norm(q_a(x)), or x where q_a is None.
    RoPE pairs neighbouring elements. scale multiplies the scores. eps is that of the two inner norms.
    """

    q_a: Linear | None
    q_a_norm: str | None
    q: Linear
    kv_a: Linear
    kv_a_norm: str
    kv_b: Linear
    o: Linear
    heads: int
    rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    scale: float
    eps: float
    kv_from: int

    @property
    def kv_width(self) -> int:
        """Elements of latent and shared key for a token: all that a cache keeps."""
        return self.rank + self.rope_dim

    def linears(self) -> tuple[Linear, ...]:
        return tuple(ref for wave in self.waves() for group in wave for ref in group)

    def waves(self) -> list[list[tuple[Linear, ...]]]:
        if self.q_a is None:
            return [[(self.q, self.kv_a)], [(self.kv_b,)], [(self.o,)]]
        return [[(self.q_a, self.kv_a)], [(self.q,), (self.kv_b,)], [(self.o,)]]

    def absorbed(self) -> tuple[Linear, ...]:
        return (self.kv_b,)

    def norms(self) -> dict[str, tuple[int, ...]]:
        norms: dict[str, tuple[int, ...]] = {self.kv_a_norm: (self.rank,)}
        return {self.q_a_norm: (self.q.in_features,), **norms} if self.q_a_norm else norms


Attention = GQA | MLA


@dataclass(frozen=True, slots=True)
class MLP:
    """down(silu(gate(x)) * up(x))."""

    gate: Linear
    up: Linear
    down: Linear

    def linears(self) -> tuple[Linear, ...]:
        return (self.gate, self.up, self.down)

    def waves(self) -> list[list[tuple[Linear, ...]]]:
        return [[(self.gate, self.up)], [(self.down,)]]


@dataclass(frozen=True)
class MoE:
    """Routed experts plus an ungated shared one."""

    router: Router
    experts: tuple[MLP, ...]
    shared: MLP | None

    def mlps(self) -> tuple[MLP, ...]:
        return (*([self.shared] if self.shared else []), *self.experts)


@dataclass(frozen=True)
class Layer:
    """h += attention(norm(h)); h += mlp(norm(h)). eps: of its norms."""

    index: int
    eps: float
    input_norm: str
    post_attention_norm: str
    attention: Attention
    mlp: MoE | MLP

    def linears(self) -> tuple[Linear, ...]:
        """The linears that a recipe may quantize (the router is not among them), in the order they are quantized."""
        return tuple(ref for group in self.same_input() for ref in group)

    def mlps(self) -> tuple[MLP, ...]:
        return self.mlp.mlps() if isinstance(self.mlp, MoE) else (self.mlp,)

    def same_input(self) -> list[tuple[Linear, ...]]:
        """The same linears, grouped by the tensor they read: q, k, v together, gate and up together."""
        parts = self.attention.waves(), *(mlp.waves() for mlp in self.mlps())
        return [group for waves in parts for wave in waves for group in wave]

    def kept(self) -> dict[str, tuple[int, ...]]:
        """Tensors that are carried over unchanged, with their shapes."""
        hidden = self.attention.o.out_features
        shapes = {self.input_norm: (hidden,), self.post_attention_norm: (hidden,), **self.attention.norms()}
        if isinstance(self.mlp, MoE):
            router = self.mlp.router
            shapes[router.weight] = (router.out_features, router.in_features)
        return shapes


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: wavelengths above original_context / low_freq_factor are stretched by `factor`, those below
    original_context / high_freq_factor are not, and between them the frequency is interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071) as DeepSeek-V2 uses it: frequencies that turn less than beta_slow times in original_context
    are divided by `factor`, those that turn more than beta_fast times are not, with a linear ramp between."""

    factor: float
    original_context: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float

    def _amplitude(self, mscale: float) -> float:
        return 0.1 * mscale * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def rope_factor(self) -> float:
        """What cos and sin are multiplied by."""
        return self._amplitude(self.mscale) / self._amplitude(self.mscale_all_dim)

    @property
    def score_factor(self) -> float:
        """What attention scores are multiplied by, beside 1 / sqrt(head_dim)."""
        return self._amplitude(self.mscale_all_dim) ** 2


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of `dim` elements. `base` already holds any NTK factor."""

    dim: int
    base: float
    scaling: Llama3 | Yarn | None = None
    bf16_frequencies: bool = False


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. `head` is None when the output head is tied to the embedding.

    positions: how many the config allows, if it says; two models that differ in that alone are the same.
    """

    architecture: str
    hidden: int
    vocab: int
    eps: float
    rope: Rope
    layers: tuple[Layer, ...]
    embedding: str
    final_norm: str
    head: str | None
    positions: int | None = field(default=None, compare=False)

    def linears(self) -> Iterator[Linear]:
        for layer in self.layers:
            yield from layer.linears()

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the unquantized checkpoint, name to shape."""
        shapes: dict[str, tuple[int, ...]] = {self.embedding: (self.vocab, self.hidden)}
        for layer in self.layers:
            shapes.update(layer.kept())
            shapes.update({ref.weight: (ref.out_features, ref.in_features) for ref in layer.linears()})
        shapes[self.final_norm] = (self.hidden,)
        if self.head:
            shapes[self.head] = (self.vocab, self.hidden)
        return shapes

    def moes(self) -> list[MoE]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

    def around(self) -> tuple[str, ...]:
        """Tensors of no layer. A tied head may be stored once more."""
        return self.embedding, self.final_norm, HEAD

    @property
    def parameters(self) -> int:
        """How many, a tied head counted once."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def groups(self) -> list[tuple[Layer, ...]]:
        """Layers that share one K/V, in order: the unit of commitment, so no borrowed K/V crosses a commit."""
        groups: dict[int, list[Layer]] = {}
        for layer in self.layers:
            groups.setdefault(layer.attention.kv_from, []).append(layer)
        return [tuple(layers) for layers in groups.values()]
