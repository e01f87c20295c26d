"""Mixtral (arXiv 2401.04088), `model_type` "mixtral": every layer routes each token to 2 of 8 experts; no shared expert.

8x22B: 56 layers, hidden 6144, 48 query and 8 key/value heads of 128, experts of 16384. On disk an expert's gate, up and
down are w1, w3 and w2.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from quantkit.model.decoder import DecoderConfig, decoder, gqa, mlp, rope
from quantkit.model.spec import ModelSpec, MoE, Role, Router

__all__ = ["build"]


class MixtralConfig(DecoderConfig):
    classes = ("MixtralForCausalLM",)
    rope_theta: float = Field(gt=1)
    rope_scaling: None = None
    num_local_experts: int = Field(gt=1, le=1000)
    num_experts_per_tok: int = Field(gt=0)

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} of num_local_experts {self.num_local_experts}")
        return self


def moe(c: MixtralConfig, index: int) -> MoE:
    prefix, hidden = f"model.layers.{index}.block_sparse_moe", c.hidden_size
    names = ("w1", "w3", "w2")
    return MoE(
        router=Router(f"{prefix}.gate", c.num_local_experts, hidden, Role.ROUTER, c.num_experts_per_tok, renormalise=True),
        experts=tuple(
            mlp(f"{prefix}.experts.{e}", hidden, c.intermediate_size, Role.EXPERTS, names)
            for e in range(c.num_local_experts)
        ),
        shared=None,
    )


def build(config: dict[str, Any]) -> ModelSpec:
    """config.json -> ModelSpec; pydantic's ValidationError names the field that is not understood."""
    c = MixtralConfig.model_validate(config)
    return decoder("mixtral", c, rope(c), lambda i: gqa(c, i), lambda i: moe(c, i))
