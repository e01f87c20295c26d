"""Which architectures are known: `model_type` in config.json to the function that builds the `ModelSpec`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from quantkit.errors import ConfigError, shown
from quantkit.model import deepseek_v2, hunyuan_a13b, llama, mixtral, qwen3_moe
from quantkit.model.spec import ModelSpec

__all__ = ["ARCHITECTURES", "build_spec", "unknown_key"]

ARCHITECTURES: dict[str, Callable[[dict[str, Any]], ModelSpec]] = {
    "hunyuan": hunyuan_a13b.build_hunyuan,
    "hunyuan_v1_moe": hunyuan_a13b.build,
    "mixtral": mixtral.build,
    "deepseek_v2": deepseek_v2.build,
    "llama": llama.build,
    "qwen3_moe": qwen3_moe.build,
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
        return ARCHITECTURES[name](dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        value = "missing" if first["type"] == "missing" else repr(first["input"])  # whose input is the whole config
        seen = f"'{field}' is {value}: " if field else ""  # no field: two that do not go together
        if first["type"] == "extra_forbidden":
            raise unknown_key(where, name, field, first["input"]) from error
        raise ConfigError(
            f"{where}: {seen}{first['msg']}",
            "quantkit refuses what its reference model does not compute; check config.json",
        ) from error


def unknown_key(where: str, model_type: str, key: str, value: object) -> ConfigError:
    """The refusal of a key that nobody has looked into. No option lets it pass: what it means would be guessed."""
    return ConfigError(
        f"{where}: '{key}' is {repr(value)[:80]}, and quantkit does not know what that changes in a {model_type} model",
        "if it changes nothing that the model computes, take it out of config.json; else quantkit must learn it: "
        "a field of the model's config class, or a line with the reason in quantkit/model/keys.py",
    )
