"""DeepSeek-V2, V2.5 and V2-Lite (arXiv 2405.04434), `model_type` "deepseek_v2": latent attention, group-limited routing.

V2: 60 layers, hidden 5120, 128 heads of 128 + 64, latents of 1536 (query) and 512 (key and value), a dense first layer
of 12288, then 160 experts of 1536 top-6 from the best 3 of 8 groups, and two shared ones. V2-Lite has no query latent and
no groups. Meanings are those of the released modelling code; transformers' own class reads neither `norm_topk_prob` nor
`moe_layer_freq`, and needs `n_shared_experts`.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from quantkit.model.decoder import DecoderConfig, YarnScaling, decoder, mlp
from quantkit.model.keys import OF_DEEPSEEK_V2
from quantkit.model.spec import MLA, MLP, Linear, ModelSpec, MoE, Role, Rope, Router

__all__ = ["build"]

_INNER_EPS = 1e-6  # of the norms of latents: the released code does not take it from the config


class DeepseekV2Config(DecoderConfig):
    classes = ("DeepseekV2ForCausalLM",)
    harmless = OF_DEEPSEEK_V2
    rope_scaling: YarnScaling | None = None
    q_lora_rank: int | None = Field(gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(ge=4, multiple_of=2)
    qk_head_dim: int | None = None  # the sum of both, as transformers writes it
    v_head_dim: int = Field(gt=0)
    n_routed_experts: int = Field(gt=1, le=1000)
    n_shared_experts: int | None = Field(ge=0)
    num_experts_per_tok: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    first_k_dense_replace: int = Field(ge=0)
    moe_layer_freq: int = Field(default=1, gt=0)
    routed_scaling_factor: float = Field(gt=0)
    norm_topk_prob: Literal[False] = False
    scoring_func: Literal["softmax"] = "softmax"
    topk_method: Literal["greedy", "group_limited_greedy"]
    n_group: int | None = Field(default=None, gt=0)
    topk_group: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} is not num_attention_heads {self.num_attention_heads}: "
                "latent attention makes a key for every head"
            )
        if self.qk_head_dim not in (None, self.qk_nope_head_dim + self.qk_rope_head_dim):
            raise ValueError(f"qk_head_dim {self.qk_head_dim} is not the sum of qk_nope_head_dim and qk_rope_head_dim")
        groups, best = self.groups()
        if self.n_routed_experts % groups or not 1 <= best <= groups:
            raise ValueError(f"topk_group {best} of n_group {groups} groups of n_routed_experts {self.n_routed_experts}")
        if self.num_experts_per_tok > self.n_routed_experts // groups * best:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} is more than there are to choose from")
        return self

    def groups(self) -> tuple[int, int]:
        """Groups of experts, and how many of them a token may use."""
        if self.topk_method == "greedy":
            return 1, 1
        if self.n_group is None or self.topk_group is None:
            raise ValueError("topk_method 'group_limited_greedy' needs n_group and topk_group")
        return self.n_group, self.topk_group


def attention(c: DeepseekV2Config, index: int) -> MLA:
    prefix, hidden, heads = f"model.layers.{index}.self_attn", c.hidden_size, c.num_attention_heads
    head_dim = c.qk_nope_head_dim + c.qk_rope_head_dim

    def linear(name: str, out: int, inputs: int) -> Linear:
        return Linear(f"{prefix}.{name}", out, inputs, Role.ATTENTION)

    rank = c.q_lora_rank
    return MLA(
        q_a=linear("q_a_proj", rank, hidden) if rank else None,
        q_a_norm=f"{prefix}.q_a_layernorm.weight" if rank else None,
        q=linear("q_b_proj", heads * head_dim, rank) if rank else linear("q_proj", heads * head_dim, hidden),
        kv_a=linear("kv_a_proj_with_mqa", c.kv_lora_rank + c.qk_rope_head_dim, hidden),
        kv_a_norm=f"{prefix}.kv_a_layernorm.weight",
        kv_b=linear("kv_b_proj", heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        o=linear("o_proj", hidden, heads * c.v_head_dim),
        heads=heads,
        rank=c.kv_lora_rank,
        nope_dim=c.qk_nope_head_dim,
        rope_dim=c.qk_rope_head_dim,
        v_dim=c.v_head_dim,
        scale=head_dim**-0.5 * (c.rope_scaling.spec().score_factor if c.rope_scaling else 1.0),
        eps=_INNER_EPS,
        kv_from=index,
    )


def block(c: DeepseekV2Config, index: int) -> MoE | MLP:
    prefix, hidden, size = f"model.layers.{index}.mlp", c.hidden_size, c.moe_intermediate_size
    if index < c.first_k_dense_replace or index % c.moe_layer_freq:
        return mlp(prefix, hidden, c.intermediate_size, Role.MLP)
    groups, top_groups = c.groups()
    shared = size * (c.n_shared_experts or 0)
    return MoE(
        router=Router(
            f"{prefix}.gate",
            c.n_routed_experts,
            hidden,
            Role.ROUTER,
            top_k=c.num_experts_per_tok,
            renormalise=False,
            scale=c.routed_scaling_factor,
            groups=groups,
            top_groups=top_groups,
        ),
        experts=tuple(mlp(f"{prefix}.experts.{e}", hidden, size, Role.EXPERTS) for e in range(c.n_routed_experts)),
        shared=mlp(f"{prefix}.shared_experts", hidden, shared, Role.SHARED_EXPERTS) if shared else None,
    )


def build(config: dict[str, Any]) -> ModelSpec:
    """config.json -> ModelSpec; pydantic's ValidationError names the field that is not understood."""
    c = DeepseekV2Config.model_validate(config)
    rope = Rope(c.qk_rope_head_dim, c.rope_theta, c.rope_scaling.spec() if c.rope_scaling else None)
    return decoder("deepseek_v2", c, rope, lambda i: attention(c, i), lambda i: block(c, i))
