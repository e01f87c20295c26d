"""What a config.json may say: both spellings of what has two, and a refusal by name of what is not known."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.errors import ConfigError
from quantkit.model.registry import build_spec
from quantkit.model.spec import MoE
from tests.helpers.architectures import RELEASED, TINY


def test_hunyuan_a13b_under_both_names() -> None:
    """Its quantized releases have Hunyuan-Large's model_type; Hunyuan-Large's configs still mean Hunyuan-Large."""
    released = RELEASED["hunyuan-a13b"]
    spec = build_spec(released, "a13b")
    for other in ({**released, "model_type": "hunyuan"}, {**released, "model_type": "hunyuan", "architectures": None}):
        assert build_spec(other, "a13b") == spec and spec.architecture == "hunyuan_a13b"
    assert build_spec(RELEASED["hunyuan-large"], "large").architecture == "hunyuan_large"
    for changes in (
        {"use_cla": True},
        {"use_mla": True},
        {"norm_topk_prob": False},
        {"moe_layer_num_skipped": 1},
        {"norm_type": "fused"},
        {"group_limited_greedy": True},
    ):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            build_spec({**released, "model_type": "hunyuan", **changes}, "config.json")


def test_qwen3_under_both_names_of_its_number_of_experts() -> None:
    config = {k: v for k, v in TINY["qwen3_moe"].items() if k != "num_experts"}
    count = TINY["qwen3_moe"]["num_experts"]
    assert build_spec({**config, "num_local_experts": count}, "config.json") == build_spec(TINY["qwen3_moe"], "config.json")
    with pytest.raises(ConfigError, match=r"^config.json: 'num_experts' is missing: ") as error:
        build_spec(config, "config.json")
    assert len(str(error.value)) < 200  # and not the whole config


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama, linear scaling": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type.*'linear'"),
    "llama, bias": ("llama", {"attention_bias": True}, "attention_bias"),
    "llama, activation": ("llama", {"hidden_act": "gelu"}, "hidden_act.*'gelu'"),
    "llama, RoPE on a part": ("llama", {"rope_scaling": {**TINY["llama"]["rope_scaling"], "partial": 0.5}}, "partial"),
    "llama, two RoPEs": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope_parameters"),
    "mixtral, window": ("mixtral", {"sliding_window": 4096}, "sliding_window.*4096"),
    "llama, soft cap": ("llama", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping.*50"),
    "llama, biases": ("llama", {"qkv_bias": True}, "qkv_bias"),
    "mixtral, more than all": ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok 5"),
    "mixtral, YaRN": ("mixtral", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
    "qwen3, window": ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window"),
    "qwen3, two numbers of experts": ("qwen3_moe", {"num_local_experts": 7}, "num_local_experts"),
    "qwen3, no word of norm_topk_prob": ("qwen3_moe", {"norm_topk_prob": None}, "norm_topk_prob"),
    "deepseek, sigmoid": ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func.*'sigmoid'"),
    "deepseek, V3 routing": ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method.*'noaux_tc'"),
    "deepseek, renormalised": ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob"),
    "deepseek, no groups": ("deepseek_v2", {"n_group": None}, "n_group"),
    "deepseek, groups do not fit": ("deepseek_v2", {"n_group": 5}, "n_group 5"),
    "deepseek, fewer keys than heads": ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads 2"),
    "deepseek, one mscale": (
        "deepseek_v2",
        {"rope_scaling": {"type": "yarn", "factor": 40}},
        "rope_scaling.*mscale|original",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unknown_values_are_refused_by_name(case: str) -> None:
    name, changes, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        build_spec({**TINY[name], **changes}, "config.json")


def test_moe_layer_freq() -> None:
    """transformers' class does not read it; the released code makes layers that it does not divide dense."""
    config = {**TINY["deepseek_v2"], "num_hidden_layers": 6, "moe_layer_freq": 2}
    routed = [layer.index for layer in build_spec(config, "test").layers if isinstance(layer.mlp, MoE)]
    assert routed == [2, 4]
