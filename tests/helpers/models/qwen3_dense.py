"""Dense Qwen3 (arXiv 2505.09388), `model_type` "qwen3": query and key are normalised by head, before RoPE; no biases.

8B: 36 layers, hidden 4096, 32 query and 8 key/value heads of 128, MLP 12288; 0.6B to 4B tie their head.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from quantkit.model.decoder import DecoderConfig, decoder, gqa, mlp, rope
from quantkit.model.spec import ModelSpec, Role

__all__ = ["build"]


class Qwen3Config(DecoderConfig):
    classes = ("Qwen3ForCausalLM",)
    harmless = {"max_window_layers": "means nothing without use_sliding_window"}
    head_dim: int = Field(gt=0)  # its class takes 128 where it is missing, whatever the sizes are
    rope_theta: float = Field(gt=1)
    rope_scaling: None = None
    use_sliding_window: Literal[False] = False


def build(config: dict[str, Any]) -> ModelSpec:
    """config.json -> ModelSpec; pydantic's ValidationError names the field that is not understood."""
    c = Qwen3Config.model_validate(config)
    return decoder(
        "qwen3",
        c,
        rope(c),
        lambda i: gqa(c, i, ("q_norm", "k_norm"), norm_first=True),
        lambda i: mlp(f"model.layers.{i}.mlp", c.hidden_size, c.intermediate_size, Role.MLP),
    )
