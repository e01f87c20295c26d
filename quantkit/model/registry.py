"""Which architectures are known: `model_type` in config.json to what builds the `ModelSpec`, and what engines call it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from quantkit.errors import ConfigError, shown
from quantkit.model import deepseek_v2, hunyuan_a13b, llama, mixtral, qwen3_moe
from quantkit.model.spec import ModelSpec

__all__ = ["ARCHITECTURES", "Architecture", "build_spec", "unknown_key"]


@dataclass(frozen=True)
class Architecture:
    """build: config.json -> ModelSpec; raises pydantic's ValidationError. native: the classes (`architectures` in
    config.json) that engines have, or quantkit brings to them: such a model needs no code that comes with it."""

    build: Callable[[dict[str, Any]], ModelSpec]
    native: tuple[str, ...]


ARCHITECTURES: dict[str, Architecture] = {
    "hunyuan": Architecture(hunyuan_a13b.build_hunyuan, ("HunYuanForCausalLM", "HunYuanMoEV1ForCausalLM")),
    "hunyuan_v1_moe": Architecture(hunyuan_a13b.build, ("HunYuanMoEV1ForCausalLM",)),
    "mixtral": Architecture(mixtral.build, ("MixtralForCausalLM",)),
    "deepseek_v2": Architecture(deepseek_v2.build, ("DeepseekV2ForCausalLM",)),
    "llama": Architecture(llama.build, ("LlamaForCausalLM",)),
    "qwen3_moe": Architecture(qwen3_moe.build, ("Qwen3MoeForCausalLM",)),
}


def build_spec(config: Mapping[str, Any], where: str) -> ModelSpec:
    """config.json -> ModelSpec. Raises ConfigError for an unknown architecture or a value it does not know."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ConfigError(
            f"{where}: unknown architecture, model_type {shown(repr(name))}",
            f"quantkit knows {', '.join(ARCHITECTURES)}; a new one is one file in quantkit/model; "
            "linears of any other can be named, to be rounded without calibration: --linears 'model.layers.*_proj'",
        )
    try:
        return ARCHITECTURES[name].build(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        value = "missing" if first["type"] == "missing" else repr(first["input"])  # whose input is the whole config
        prefix = f"'{field}' is {value}: " if field else ""  # no field: two that do not go together
        if first["type"] == "extra_forbidden":
            raise unknown_key(where, name, field, first["input"]) from error
        raise ConfigError(
            f"{where}: {prefix}{first['msg']}",
            "quantkit refuses what its reference model does not compute; check config.json",
        ) from error


def unknown_key(where: str, model_type: str, key: str, value: object) -> ConfigError:
    """The refusal of a key that nobody has looked into. No option lets it pass: what it means would be guessed."""
    return ConfigError(
        f"{where}: '{key}' is {repr(value)[:80]}, and quantkit does not know what that changes in a {model_type} model",
        "if it changes nothing that the model computes, take it out of config.json; else quantkit must learn it: "
        "a field of the model's config class, or a line with the reason in quantkit/model/keys.py",
    )
