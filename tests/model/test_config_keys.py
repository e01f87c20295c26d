"""Every key of a config.json is used, harmless, or refused by name; a missing one means what engines take it to mean."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from quantkit.engines.hunyuan_config import HunyuanLargeConfig
from quantkit.errors import ConfigError
from quantkit.model import deepseek_v2, hunyuan_a13b, hunyuan_large, keys, llama, mixtral, qwen3_moe
from quantkit.model.decoder import DecoderConfig
from quantkit.model.registry import build_spec
from tests.conftest import CONFIG
from tests.helpers.architectures import A13B, RELEASED, SMALLER, TINY
from tests.helpers.commands import not_quantized, refused

Config = dict[str, Any]
CLASSES: dict[str, type[DecoderConfig]] = {
    "llama": llama.LlamaConfig,
    "mixtral": mixtral.MixtralConfig,
    "qwen3_moe": qwen3_moe.Qwen3MoeConfig,
    "deepseek_v2": deepseek_v2.DeepseekV2Config,
    "hunyuan": hunyuan_large.HunyuanConfig,
    "hunyuan_v1_moe": hunyuan_a13b.A13BConfig,
}
EVERY = {**TINY, "hunyuan_v1_moe": A13B, "hunyuan": CONFIG}

# What released configs hold beside the keys that RELEASED and SMALLER have.
_SAID = {"bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True}
_SAID |= {"attention_dropout": 0.0, "transformers_version": "4.40.1"}
_MIXTRAL = {**_SAID, "output_router_logits": False, "router_aux_loss_coef": 0.001}
_DEEPSEEK = {**_SAID, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "aux_loss_alpha": 0.001}
_DEEPSEEK |= {"ep_size": 1, "seq_aux": True}
_QWEN3 = {**_SAID, "max_window_layers": 48, "output_router_logits": False, "router_aux_loss_coef": 0.001}
_HUNYUAN = {**_SAID, "auto_map": {"AutoConfig": "configuration_hunyuan.HunYuanConfig"}, "capacity_factor": 1.0}
_HUNYUAN |= {"moe_drop_tokens": False, "moe_random_routing_dropped_token": False, "max_position_embeddings": 131072}
_HUNYUAN |= {"pad_token_id": 127961, "eod_token_id": 127967, "sep_token_id": 127962, "mlp_bias": False}
_VISION: Config = {"anyres_pooling_size": 2, "anyres_vit_max_image_size": None, "anyres_vit_two_views": False}
_VISION |= {"im_end_id": 6, "im_newline_id": 12, "im_start_id": 5, "image_token_id": 9, "mask_init_id": 13}
_VISION |= {"num_media_embeds": 257, "skip_cls_token": False, "text_end_id": 8, "text_start_id": 7, "video_end_id": 11}
_VISION |= {"video_start_id": 10, "vit_add_patchemb_bias": False, "vit_input_resolution": 224, "vit_path": None}
_VISION |= {"vit_mapping_type": "resampler", "vit_norm_type": "fused", "vit_patch": 1, "vit_remove_prenorm": False}
_VISION |= {"vit_token": 64, "vit_type": None, "vit_used_rms_norm": False}
_A13B = {**_HUNYUAN, **_VISION, "add_classification_head": False, "class_num": 0, "dense_list": [4096, 0]}
_A13B |= {"group_limited_greedy": False, "kv_lora_rank": None, "n_group": None, "topk_group": None, "norm_type": "rms"}
_A13B |= {"org_vocab_size": 128167, "pad_id": 127961, "pool_type": "last", "position_embedding_xdrope": False}
_A13B |= {"pretraining_tp": 1, "q_lora_rank": None, "qk_nope_head_dim": None, "qk_rope_head_dim": None}
_A13B |= {"use_rotary_pos_emb": True, "v_head_dim": None, "xdrope_section": None, "routed_scaling_factor": False}
BESIDE = {
    "hunyuan-large": _HUNYUAN,
    "hunyuan-a13b": _A13B,
    "mixtral-8x22b": _MIXTRAL,
    "mixtral-8x7b": _MIXTRAL,
    "deepseek-v2": _DEEPSEEK,
    "deepseek-v2-lite": _DEEPSEEK,
    "llama-3.1-70b": _SAID,
    "llama-3.1-405b": {**_SAID, "eos_token_id": [128001, 128008, 128009]},
    # Qwen3-Coder has keys of its own.
    "qwen3-30b-a3b": {**_QWEN3, "use_qk_norm": True, "shared_expert_intermediate_size": 0, "qkv_bias": False},
}
# What transformers 4 wrote of every model, when it differed from a default; and settings of generation in older configs.
FOUR: Config = {
    "_attn_implementation_autoset": True,
    "_name_or_path": "somewhere",
    "add_cross_attention": False,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "do_sample": False,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0},
    "max_length": 20,
    "output_hidden_states": False,
    "problem_type": None,
    "pruned_heads": {},
    "quantization_config": None,
    "return_dict": True,
    "task_specific_params": None,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "tokenizer_class": None,
    "torchscript": False,
    "use_bfloat16": False,
}


@pytest.mark.parametrize("name", BESIDE)
def test_released_configs_pass(name: str) -> None:
    config = {**RELEASED, **SMALLER}[name]
    assert build_spec({**config, **BESIDE[name]}, name) == build_spec(config, name)
    assert build_spec({**config, **BESIDE[name], **FOUR}, name) == build_spec(config, name)


def theirs(config: Config) -> Any:
    """transformers' config object, or for Hunyuan-Large the class that quantkit gives both engines."""
    config = copy.deepcopy(config)  # it writes into rope_scaling
    if config["model_type"] == "hunyuan":
        return HunyuanLargeConfig.from_dict(config)
    return type(AutoConfig.for_model(config["model_type"])).from_dict(config)


@pytest.mark.parametrize("name", EVERY)
def test_what_transformers_saves_is_read_alike(name: str, tmp_path: Path) -> None:
    theirs(EVERY[name]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    again = build_spec({**saved, "architectures": EVERY[name]["architectures"]}, name)
    assert again == build_spec(EVERY[name], name)


STRANGERS: Config = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.01,
    "no_rope_layers": [0],
    "per_layer_config": {"0": {"intermediate_size": 8}},
    "transformers_weights": "other.safetensors",
    "rope_interleave": True,
    "swiglu_limit": 7.0,
    "compression_config": {},
    "num_nextn_predict_layers": 1,
    "attention_sinks": None,
}


@pytest.mark.parametrize("name", EVERY)
def test_unknown_keys_are_refused_by_name(name: str) -> None:
    for key, value in STRANGERS.items():
        with pytest.raises(ConfigError, match=f"^config.json: '{key}' is ") as error:
            build_spec({**EVERY[name], key: value}, "config.json")
        assert "take it out of config.json" in error.value.fix and "keys.py" in error.value.fix


def test_every_command_refuses_an_unknown_key(make_model: Callable[..., Path], tmp_path: Path) -> None:
    model = make_model()
    (model / "config.json").write_text(json.dumps({**CONFIG, "logits_scaling": 8.0}))
    assert "'logits_scaling' is 8.0" in not_quantized(model, "--group-size", "32")
    for arguments in (("plan", model), ("inspect", model), ("eval", model, "--baseline", model), ("generate", model)):
        more = ("--prompt", "x") if arguments[0] == "generate" else ()
        assert "'logits_scaling' is 8.0" in refused(*arguments, *more)
    with pytest.raises(ConfigError, match="'logits_scaling' is 8.0"):
        HunyuanLargeConfig.from_pretrained(model)


SWITCHES: dict[str, Config] = {
    "is_encoder_decoder": {"is_encoder_decoder": True},
    "add_cross_attention": {"add_cross_attention": True},
    "pruned_heads": {"pruned_heads": {"0": [1]}},
    "layer_types": {"layer_types": ["sliding_attention"]},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "rope_interleaved": {"rope_interleaved": True},
    "architectures": {"architectures": ["MistralForCausalLM"]},
}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("field", SWITCHES)
def test_switches_that_change_a_layer_are_refused(name: str, field: str) -> None:
    with pytest.raises(ConfigError, match=field):
        build_spec({**EVERY[name], **SWITCHES[field]}, "config.json")


HIDDEN: dict[str, tuple[str, Config, str]] = {
    "alpha's companion": ("hunyuan", {"rope_scaling": {"type": "dynamic", "alpha": 10.0, "partial": 0.5}}, "partial"),
    "another head size": ("hunyuan_v1_moe", {"attention_head_dim": 32}, "attention_head_dim 32 is not head_dim 16"),
    "no norm of queries": ("hunyuan_v1_moe", {"use_qk_norm": False}, "use_qk_norm"),
    "a classifier": ("hunyuan", {"add_classification_head": True}, "add_classification_head"),
    "another sum": ("deepseek_v2", {"qk_head_dim": 25}, "qk_head_dim 25"),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_values_beside_those_that_are_read_must_fit(case: str) -> None:
    name, changes, words = HIDDEN[case]
    with pytest.raises(ConfigError, match=words):
        build_spec({**EVERY[name], **changes}, "config.json")


@pytest.mark.parametrize("name", EVERY)
def test_a_missing_key_means_what_it_means_to_the_engine(name: str) -> None:
    """Of every key, one at a time: refused, or the same model as transformers' class makes of the rest."""
    compared = 0
    for key in EVERY[name].keys() - {"model_type", "rope_parameters"}:
        config = {k: v for k, v in EVERY[name].items() if k != key}
        try:
            ours = build_spec(config, "config.json")
        except ConfigError:
            continue
        stated = theirs(config)
        if isinstance(stated, HunyuanLargeConfig):
            assert ours == stated.spec(), key
        else:
            assert ours == build_spec({**stated.to_dict(), "dtype": None}, "theirs"), key
        compared += 1
    assert compared > 5


# Fields whose default no class of transformers has: it does not read them.
UNREAD = {
    *("use_qk_norm", "shared_expert_intermediate_size"),
    *("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv", "qkv_bias", "rope_interleaved"),
    *("add_cross_attention", "cross_attention_hidden_size", "pruned_heads", "partial_rotary_factor", "layer_types"),
    *("torch_dtype", "pretraining_tp", "mlp_bias", "attention_bias", "moe_layer_freq", "scoring_func", "qk_head_dim"),
    *("attention_head_dim", "add_classification_head", "use_qk_norm", "use_cla", "cla_share_factor", "use_mixed_mlp_moe"),
    *("num_shared_expert", "moe_intermediate_size", "moe_drop_tokens", "use_mla", "moe_layer_num_skipped", "norm_type"),
    *("group_limited_greedy", "use_rotary_pos_emb", "position_embedding_xdrope", "routed_scaling_factor"),
}
# What only bounds the length of a text, or follows from other fields.
HARMLESS = {"max_position_embeddings": "no figure depends on it", "head_dim": "follows from hidden_size"}
HARMLESS["qk_head_dim"] = "the sum of two others"


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "deepseek_v2", "hunyuan_v1_moe"])
def test_defaults_are_those_of_transformers(name: str) -> None:
    """Field by field, so that a default which no case above reaches is compared too."""
    stated, compared = AutoConfig.for_model(name), set()
    for key, field in CLASSES[name].model_fields.items():
        if field.is_required() or key in HARMLESS or key == "rope_scaling":
            continue
        if key == "rope_theta":
            assert field.get_default() == type(stated).default_theta
        elif hasattr(stated, key):
            default = field.get_default(call_default_factory=True)
            assert default == getattr(stated, key) or {str(default), str(getattr(stated, key))} == {"None", "[]"}, key
        else:
            assert key in UNREAD or (name == "hunyuan_v1_moe" and key == "norm_topk_prob"), key
            continue
        compared.add(key)
    assert {"tie_word_embeddings", "hidden_act", "is_encoder_decoder"} <= compared


def test_what_transformers_takes_out_of_a_config_is_harmless() -> None:
    """Settings of generation, which it removes when it reads a config, and what its base class has for every model."""
    removed = {*GenerationConfig()._get_default_generation_params(), *PreTrainedConfig().to_dict()}
    assert removed and not DecoderConfig.unknown(removed)


def test_no_key_is_both_used_and_harmless() -> None:
    assert not any(set(cls.model_fields) & set(keys.HARMLESS) for cls in CLASSES.values())
    for cls in CLASSES.values():
        both = set(cls.model_fields) & set(cls.harmless)
        assert both <= {"head_dim"}  # of DeepSeek-V2, where it is another thing
    assert all(reason for table in (keys.HARMLESS, keys.OF_HUNYUAN, keys.OF_DEEPSEEK_V2) for reason in table.values())
