"""Which engines have rules."""

from __future__ import annotations

from quantkit.engines.rules import Engine
from quantkit.engines.sglang import SGLANG
from quantkit.engines.transformers import TRANSFORMERS
from quantkit.engines.vllm import VLLM
from quantkit.errors import ConfigError

__all__ = ["ENGINES", "engine_named"]

ENGINES: dict[str, Engine] = {engine.name: engine for engine in (VLLM, SGLANG, TRANSFORMERS)}


def engine_named(text: str) -> Engine:
    """`vllm`, or `vllm==0.32`, where a patch release counts as its release. Raises ConfigError for any other."""
    name, given, version = text.partition("==")
    if name not in ENGINES:
        raise ConfigError(f"unknown engine '{name}'", f"there are rules for {', '.join(ENGINES)}")
    engine = ENGINES[name]
    if given and version != engine.version and not version.startswith(f"{engine.version}."):
        raise ConfigError(
            f"there are no rules for {text}", f"use --engine {name}, whose rules are of version {engine.version}"
        )
    return engine
