"""Hunyuan-Large's config.json (`model_type` "hunyuan") as a transformers config class, for both engines that need one.

The fields that matter are checked by `quantkit.model`, which refuses a value or a key that it does not compute. A missing
key must mean here what it means there.
"""

from typing import Any

from transformers import AutoConfig, HunYuanMoEV1Config, PreTrainedConfig

from quantkit.model.hunyuan_a13b import is_a13b
from quantkit.model.hunyuan_large import HunyuanConfig
from quantkit.model.registry import build_spec, unknown_key
from quantkit.model.spec import ModelSpec

__all__ = ["HunyuanLargeConfig", "register_config"]


class HunyuanLargeConfig(PreTrainedConfig):
    """The keys of a released config.json, under their own names. No remote code is involved."""

    model_type = "hunyuan"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {"num_experts_per_tok": "moe_topk", "num_local_experts": "num_experts"}

    vocab_size: int = 129024
    hidden_size: int = 6400
    intermediate_size: int = 18304
    num_hidden_layers: int = 64
    num_attention_heads: int = 80
    num_key_value_heads: int = 8
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    num_experts: int = 1
    moe_topk: int = 1
    use_mixed_mlp_moe: bool = False
    num_shared_expert: int = 1
    use_qk_norm: bool = False
    use_cla: bool = False
    cla_share_factor: int = 1

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Hunyuan-A13B's quantized releases say "hunyuan" too; they get the config class of their own architecture.

        Raises ConfigError for a key whose meaning is not known.
        """
        if is_a13b(config_dict):
            theirs = {key: value for key, value in config_dict.items() if key != "auto_map"}
            return HunYuanMoEV1Config.from_dict({**theirs, "model_type": HunYuanMoEV1Config.model_type}, **kwargs)
        if unknown := HunyuanConfig.unknown(config_dict):
            raise unknown_key("config.json", cls.model_type, unknown[0], config_dict[unknown[0]])
        return super().from_dict(config_dict, **kwargs)

    def spec(self) -> ModelSpec:
        """Raises ConfigError for a value that the reference model does not compute. Attributes that engines add say nothing
        of the model; `from_dict` has seen what the file says."""
        stated = self.to_dict()
        added = HunyuanConfig.unknown(stated)
        return build_spec({key: value for key, value in stated.items() if key not in added}, "config.json")


def register_config() -> None:
    """AutoConfig reads `model_type` "hunyuan". May be called again."""
    AutoConfig.register(HunyuanLargeConfig.model_type, HunyuanLargeConfig, exist_ok=True)
