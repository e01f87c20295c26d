"""Hunyuan-Large (389B, 52B active; arXiv 2411.02265): `model_type` "hunyuan", config.json to `ModelSpec`.

64 layers in CLA pairs, hidden 6400, 80 query and 8 key/value heads of 80, 16 experts of 18304 top-1 plus a shared one.
Layer i is a cross layer when use_cla and i % cla_share_factor != 0: no k_proj and v_proj, but norms of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from quantkit.model.decoder import KIND, DecoderConfig, Scaling, decoder, gqa, mlp
from quantkit.model.keys import OF_HUNYUAN
from quantkit.model.spec import GQA, MLP, ModelSpec, MoE, Role, Rope, Router

__all__ = ["HunyuanConfig", "build", "build_spec"]


class NtkScaling(Scaling):
    """Only the static NTK form is released: base = theta * alpha ** (d / (d - 2)), whatever the length.

    The keys of other forms, from `factor` on, stand beside it in released configs, and mean nothing where alpha is given.
    """

    rope_type: Literal["dynamic"] = Field(validation_alias=KIND)
    alpha: float = Field(gt=0, le=1e9)
    factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None


class HunyuanConfig(DecoderConfig):
    """Keys of both Hunyuan MoE models. `use_mla` and skipped MoE layers never are features of a released one.

    What a missing key means is what it means to the released configuration class.
    """

    classes = ("HunYuanForCausalLM",)
    harmless = OF_HUNYUAN
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    rope_scaling: NtkScaling | None = None
    attention_head_dim: int | None = None  # another name of head_dim
    add_classification_head: Literal[False] = False
    use_qk_norm: bool = False
    use_cla: bool = False
    cla_share_factor: int = Field(default=1, gt=0)
    num_experts: int = Field(default=1, gt=0, le=1000)
    moe_topk: int = Field(default=1, gt=0)
    moe_intermediate_size: int | None = Field(default=None, gt=0)
    use_mixed_mlp_moe: bool = False
    num_shared_expert: int = Field(default=1, ge=0)
    moe_drop_tokens: Literal[False] = False
    use_mla: Literal[False] = False
    moe_layer_num_skipped: Literal[0] = 0
    norm_topk_prob: Literal[True] = True  # of the weights of more than one expert
    routed_scaling_factor: float = Field(default=1.0, ge=1.0, le=1.0)
    group_limited_greedy: Literal[False] = False
    norm_type: Literal["rms", "hf_rms"] = "rms"
    use_rotary_pos_emb: Literal[True] = True
    position_embedding_xdrope: Literal[False] = False

    @field_validator("routed_scaling_factor", mode="before")
    @classmethod
    def _none_is_one(cls, value: object) -> object:
        return 1.0 if value is None or value is False else value

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
        if self.attention_head_dim not in (None, self.head_size):
            raise ValueError(f"attention_head_dim {self.attention_head_dim} is not head_dim {self.head_size}")
        if 1 < self.num_experts < self.moe_topk:
            raise ValueError(f"moe_topk {self.moe_topk} is more than num_experts {self.num_experts}")
        return self


def attention(c: HunyuanConfig, index: int) -> GQA:
    share = c.cla_share_factor if c.use_cla else 1
    norms = ("query_layernorm", "key_layernorm") if c.use_qk_norm else None
    a, owner = gqa(c, index, norms), index - index % share
    return a if owner == index else dataclasses.replace(a, k=None, v=None, kv_from=owner)


def block(c: HunyuanConfig, index: int) -> MoE | MLP:
    prefix, hidden = f"model.layers.{index}.mlp", c.hidden_size
    if c.num_experts == 1:
        return mlp(prefix, hidden, c.intermediate_size, Role.MLP)
    size = c.moe_intermediate_size or c.intermediate_size
    shared_size = size * c.num_shared_expert if c.use_mixed_mlp_moe else 0
    return MoE(
        router=Router(f"{prefix}.gate.wg", c.num_experts, hidden, Role.ROUTER, top_k=c.moe_topk, renormalise=c.moe_topk > 1),
        experts=tuple(mlp(f"{prefix}.experts.{e}", hidden, size, Role.EXPERTS) for e in range(c.num_experts)),
        shared=mlp(f"{prefix}.shared_mlp", hidden, shared_size, Role.SHARED_EXPERTS) if shared_size else None,
    )


def build_spec(c: HunyuanConfig, architecture: str, bf16_frequencies: bool) -> ModelSpec:
    d, alpha = c.head_size, c.rope_scaling.alpha if c.rope_scaling else 1.0
    rope = Rope(d, c.rope_theta * alpha ** (d / (d - 2)), bf16_frequencies=bf16_frequencies)
    return decoder(architecture, c, rope, lambda i: attention(c, i), lambda i: block(c, i))


def build(config: dict[str, Any]) -> ModelSpec:
    """config.json -> ModelSpec; pydantic's ValidationError names the field that is not understood."""
    c = HunyuanConfig.model_validate(config)
    # Without scaling the released code builds its inverse frequencies in bfloat16.
    return build_spec(c, "hunyuan_large", bf16_frequencies=c.rope_scaling is None)
