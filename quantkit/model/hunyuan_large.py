"""Hunyuan-Large (389B, 52B active; arXiv 2411.02265): `model_type` "hunyuan", config.json to `ModelSpec`.

64 layers in CLA pairs, hidden 6400, 80 query and 8 key/value heads of 80, 16 experts of 18304 top-1 plus a shared one.
Layer i is a cross layer when use_cla and i % cla_share_factor != 0: no k_proj and v_proj, but norms of its own.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from quantkit.model.spec import MLP, Attention, Layer, Linear, ModelSpec, MoE, Role, Rope

__all__ = ["HunyuanConfig", "build"]


class RopeScaling(BaseModel):
    """Only the static NTK form is released: base = theta * alpha ** (d / (d - 2)), whatever the length."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    type: Literal["dynamic"]
    alpha: float = Field(gt=0, le=1e9)
    factor: float = 1.0


class HunyuanConfig(BaseModel):
    """The fields that change the mathematics. A value outside what is written here is refused, not guessed."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0, le=1000)
    vocab_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int | None = Field(default=None, gt=0)
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = True
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False
    use_qk_norm: bool = True
    use_cla: bool = False
    cla_share_factor: int = Field(default=1, gt=0)
    num_experts: int = Field(default=1, gt=0, le=1000)
    moe_topk: int = Field(default=1, gt=0)
    moe_intermediate_size: int | None = Field(default=None, gt=0)
    use_mixed_mlp_moe: bool = False
    num_shared_expert: int = Field(default=1, ge=0)
    moe_drop_tokens: Literal[False] = False
    pretraining_tp: Literal[1] = 1

    @field_validator("moe_topk", "num_shared_expert", "moe_intermediate_size", mode="before")
    @classmethod
    def _same_in_all_layers(cls, value: object) -> object:
        """Hunyuan-A13B's config writes a list with one value per layer."""
        if not isinstance(value, list):
            return value
        if not value or any(other != value[0] for other in value):
            raise ValueError("layers differ, which the reference model does not compute")
        return value[0]

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if head_dim < 4 or head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}, and must be even and at least 4")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if 1 < self.num_experts < self.moe_topk:
            raise ValueError(f"moe_topk {self.moe_topk} is more than num_experts {self.num_experts}")
        return self


def mlp_spec(prefix: str, hidden: int, intermediate: int, role: Role) -> MLP:
    return MLP(
        gate=Linear(f"{prefix}.gate_proj", intermediate, hidden, role),
        up=Linear(f"{prefix}.up_proj", intermediate, hidden, role),
        down=Linear(f"{prefix}.down_proj", hidden, intermediate, role),
    )


def attention_spec(c: HunyuanConfig, index: int) -> Attention:
    prefix = f"model.layers.{index}.self_attn"
    head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
    q_size, kv_size = c.num_attention_heads * head_dim, c.num_key_value_heads * head_dim
    share = c.cla_share_factor if c.use_cla else 1
    owner = index - index % share

    def linear(name: str, out: int, inputs: int) -> Linear:
        return Linear(f"{prefix}.{name}", out, inputs, Role.ATTENTION)

    return Attention(
        q=linear("q_proj", q_size, c.hidden_size),
        k=linear("k_proj", kv_size, c.hidden_size) if owner == index else None,
        v=linear("v_proj", kv_size, c.hidden_size) if owner == index else None,
        o=linear("o_proj", c.hidden_size, q_size),
        q_norm=f"{prefix}.query_layernorm.weight" if c.use_qk_norm else None,
        k_norm=f"{prefix}.key_layernorm.weight" if c.use_qk_norm else None,
        heads=c.num_attention_heads,
        kv_heads=c.num_key_value_heads,
        head_dim=head_dim,
        kv_from=owner,
    )


def moe_spec(c: HunyuanConfig, index: int) -> MoE | MLP:
    prefix, hidden = f"model.layers.{index}.mlp", c.hidden_size
    if c.num_experts == 1:
        return mlp_spec(prefix, hidden, c.intermediate_size, Role.MLP)
    size = c.moe_intermediate_size or c.intermediate_size
    shared_size = size * c.num_shared_expert if c.use_mixed_mlp_moe else 0
    return MoE(
        router=Linear(f"{prefix}.gate.wg", c.num_experts, hidden, Role.ROUTER),
        experts=tuple(mlp_spec(f"{prefix}.experts.{e}", hidden, size, Role.EXPERTS) for e in range(c.num_experts)),
        shared=mlp_spec(f"{prefix}.shared_mlp", hidden, shared_size, Role.SHARED_EXPERTS) if shared_size else None,
        top_k=c.moe_topk,
        renormalise=c.moe_topk > 1,
    )


def build_spec(c: HunyuanConfig, architecture: str, bf16_frequencies: bool) -> ModelSpec:
    head_dim = c.head_dim or c.hidden_size // c.num_attention_heads
    alpha = c.rope_scaling.alpha if c.rope_scaling else 1.0
    return ModelSpec(
        architecture=architecture,
        hidden=c.hidden_size,
        vocab=c.vocab_size,
        eps=c.rms_norm_eps,
        rope=Rope(head_dim, c.rope_theta * alpha ** (head_dim / (head_dim - 2)), bf16_frequencies),
        layers=tuple(
            Layer(
                index=i,
                input_norm=f"model.layers.{i}.input_layernorm.weight",
                post_attention_norm=f"model.layers.{i}.post_attention_layernorm.weight",
                attention=attention_spec(c, i),
                mlp=moe_spec(c, i),
            )
            for i in range(c.num_hidden_layers)
        ),
        embedding="model.embed_tokens.weight",
        final_norm="model.norm.weight",
        head=None if c.tie_word_embeddings else "lm_head.weight",
    )


def build(config: dict[str, object]) -> ModelSpec:
    """config.json -> ModelSpec; pydantic's ValidationError names the field that is not understood."""
    c = HunyuanConfig.model_validate(config)
    # Without scaling the released code builds its inverse frequencies in bfloat16.
    return build_spec(c, "hunyuan_large", bf16_frequencies=c.rope_scaling is None)
