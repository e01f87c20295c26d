"""What OUT says otherwise than its source beside the weights: known here to those who write it and to `verify`.

An architecture that quantkit and engines know themselves needs no code that comes with the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["NATIVE", "native", "published_config"]

# model_type -> the classes (`architectures` in config.json) that engines have, or quantkit brings to them
NATIVE: dict[str, tuple[str, ...]] = {
    "hunyuan": ("HunYuanForCausalLM", "HunYuanMoEV1ForCausalLM"),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM",),
    "mixtral": ("MixtralForCausalLM",),
    "deepseek_v2": ("DeepseekV2ForCausalLM",),
    "llama": ("LlamaForCausalLM",),
    "qwen3_moe": ("Qwen3MoeForCausalLM",),
}


def native(config: Mapping[str, Any]) -> bool:
    """Whether engines run this model without code of its own. config: config.json."""
    known, classes = NATIVE.get(str(config.get("model_type"))), config.get("architectures")
    return known is not None and (not isinstance(classes, list) or all(name in known for name in classes))


def published_config(source: Mapping[str, Any], quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json of OUT from that of its source: with this `quantization_config` or (None) without one, and without
    `auto_map` where no code of the model's own is needed."""
    dropped = {"quantization_config", *(["auto_map"] if native(source) else [])}
    config = {key: value for key, value in source.items() if key not in dropped}
    return config if quantization is None else {**config, "quantization_config": dict(quantization)}
