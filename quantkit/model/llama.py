"""Llama and what is built like it, `model_type` "llama": dense, grouped-query attention, Llama 3.1's RoPE scaling or none.

Llama-3.1-405B (arXiv 2407.21783): 126 layers, hidden 16384, 128 query and 8 key/value heads of 128, MLP 53248.
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from quantkit.model.decoder import DecoderConfig, Llama3Scaling, decoder, gqa, mlp, rope
from quantkit.model.spec import ModelSpec, Role

__all__ = ["build"]


class LlamaConfig(DecoderConfig):
    classes = ("LlamaForCausalLM", "LLaMAForCausalLM")
    rope_scaling: Llama3Scaling | None = None

    @model_validator(mode="before")
    @classmethod
    def _every_head_its_own_key(cls, config: Any) -> Any:
        """The first Llama's configs do not state num_key_value_heads: as many as there are query heads."""
        if isinstance(config, dict) and config.get("num_key_value_heads") is None:
            return {**config, "num_key_value_heads": config.get("num_attention_heads")}
        return config


def build(config: dict[str, Any]) -> ModelSpec:
    """config.json -> ModelSpec; pydantic's ValidationError names the field that is not understood."""
    c = LlamaConfig.model_validate(config)
    return decoder(
        "llama",
        c,
        rope(c),
        lambda i: gqa(c, i),
        lambda i: mlp(f"model.layers.{i}.mlp", c.hidden_size, c.intermediate_size, Role.MLP),
    )
