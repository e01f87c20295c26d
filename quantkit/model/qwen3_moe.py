"""Qwen3-MoE (arXiv 2505.09388), `model_type` "qwen3_moe": query and key are normalised by head, before RoPE.

235B-A22B: 94 layers, hidden 4096, 64 and 4 heads of 128, 128 experts of 1536 top-8, renormalised; none is shared.
Layer i is a dense MLP when mlp_only_layers names it or (i + 1) % decoder_sparse_step is not 0.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from quantkit.model.decoder import DecoderConfig, decoder, gqa, mlp, rope
from quantkit.model.keys import OF_QWEN3_MOE
from quantkit.model.spec import MLP, ModelSpec, MoE, Role, Router

__all__ = ["build"]


class Qwen3MoeConfig(DecoderConfig):
    classes = ("Qwen3MoeForCausalLM",)
    harmless = OF_QWEN3_MOE
    rope_theta: float = Field(gt=1)
    rope_scaling: None = None
    use_sliding_window: Literal[False] = False
    # Qwen3-Coder writes these two.
    use_qk_norm: Literal[True] = True
    shared_expert_intermediate_size: Literal[0] | None = None
    sliding_window: int | None = None  # type: ignore[assignment]  # written, and means nothing without the switch above
    num_experts: int = Field(gt=1, le=1000)
    num_experts_per_tok: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    norm_topk_prob: bool
    decoder_sparse_step: int = Field(default=1, gt=0)
    mlp_only_layers: list[int] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_name(cls, config: Any) -> Any:
        """transformers writes `num_local_experts` since 5.24."""
        if not isinstance(config, dict) or "num_local_experts" not in config:
            return config
        count = config["num_local_experts"]
        if config.get("num_experts", count) != count:
            raise ValueError("num_experts is given beside another num_local_experts")
        return {**{key: value for key, value in config.items() if key != "num_local_experts"}, "num_experts": count}

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} of num_experts {self.num_experts}")
        return self


def block(c: Qwen3MoeConfig, index: int) -> MoE | MLP:
    prefix, hidden, k = f"model.layers.{index}.mlp", c.hidden_size, c.num_experts_per_tok
    if index in (c.mlp_only_layers or ()) or (index + 1) % c.decoder_sparse_step:
        return mlp(prefix, hidden, c.intermediate_size, Role.MLP)
    return MoE(
        router=Router(f"{prefix}.gate", c.num_experts, hidden, Role.ROUTER, k, renormalise=c.norm_topk_prob),
        experts=tuple(
            mlp(f"{prefix}.experts.{e}", hidden, c.moe_intermediate_size, Role.EXPERTS) for e in range(c.num_experts)
        ),
        shared=None,
    )


def build(config: dict[str, Any]) -> ModelSpec:
    """config.json -> ModelSpec; pydantic's ValidationError names the field that is not understood."""
    c = Qwen3MoeConfig.model_validate(config)
    return decoder(
        "qwen3_moe",
        c,
        rope(c),
        lambda i: gqa(c, i, ("q_norm", "k_norm"), norm_first=True),
        lambda i: block(c, i),
    )
