"""Hunyuan-A13B (80B, 13B active): `model_type` "hunyuan_v1_moe". Hunyuan-Large's layer without cross-layer attention.

32 layers, hidden 4096, 64 experts of 3072 top-8 with renormalised weights plus a shared one.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from quantkit.model.hunyuan_large import HunyuanConfig, build_spec
from quantkit.model.spec import ModelSpec

__all__ = ["build"]


class A13BConfig(HunyuanConfig):
    """`use_cla`, `use_mla` and skipped MoE layers exist as keys but never as features of a released model."""

    moe_topk: int = Field(default=1, gt=1)
    rope_parameters: dict[str, Any] | None = None
    use_cla: Literal[False] = False
    use_mla: Literal[False] = False
    moe_layer_num_skipped: Literal[0] = 0
    use_mixed_mlp_moe: Literal[True] = True
    norm_topk_prob: Literal[True] = True
    routed_scaling_factor: float = Field(default=1.0, ge=1.0, le=1.0)


def build(config: dict[str, Any]) -> ModelSpec:
    """config.json -> ModelSpec; pydantic's ValidationError names the field that is not understood."""
    # transformers 5 writes the RoPE fields together, as `rope_parameters`.
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        scaled = rope.get("rope_type", "default") != "default"
        scaling = {"type": rope["rope_type"], "alpha": rope.get("alpha")} if scaled else None
        config = {**config, "rope_theta": rope.get("rope_theta"), "rope_scaling": scaling}
    return build_spec(A13BConfig.model_validate(config), "hunyuan_a13b", bf16_frequencies=False)
