"""Hunyuan-A13B (80B, 13B active): `model_type` "hunyuan_v1_moe". Hunyuan-Large's layer without cross-layer attention.

32 layers, hidden 4096, 64 experts of 3072 top-8 with renormalised weights plus a shared one. Its quantized releases say
"hunyuan", as Hunyuan-Large does; `is_a13b` tells them apart.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from quantkit.model import hunyuan_large
from quantkit.model.hunyuan_large import HunyuanConfig, build_spec
from quantkit.model.spec import ModelSpec

__all__ = ["build", "build_hunyuan", "is_a13b"]


class A13BConfig(HunyuanConfig):
    """transformers' class always normalises query and key, always renormalises, and does not read the keys that say so."""

    classes = ("HunYuanMoEV1ForCausalLM",)
    moe_topk: int = Field(gt=1)
    use_qk_norm: Literal[True] = True
    use_cla: Literal[False] = False
    use_mixed_mlp_moe: Literal[True] = True


def build(config: dict[str, Any]) -> ModelSpec:
    """config.json -> ModelSpec; pydantic's ValidationError names the field that is not understood."""
    return build_spec(A13BConfig.model_validate(config), "hunyuan_a13b", bf16_frequencies=False)


def is_a13b(config: dict[str, Any]) -> bool:
    """Of a config with `model_type` "hunyuan": whether its class, or a key that only this model's configs have, says so."""
    classes = config.get("architectures")
    return isinstance(classes, list) and "HunYuanMoEV1ForCausalLM" in classes or "moe_layer_num_skipped" in config


def build_hunyuan(config: dict[str, Any]) -> ModelSpec:
    """config.json with `model_type` "hunyuan", of either model, to its ModelSpec."""
    return (build if is_a13b(config) else hunyuan_large.build)(config)
