"""Which engines have rules."""

from __future__ import annotations

from quantkit.engines.rules import Engine
from quantkit.engines.sglang import SGLANG
from quantkit.engines.transformers import TRANSFORMERS
from quantkit.engines.vllm import VLLM
from quantkit.errors import ConfigError

__all__ = ["ENGINES", "VERSIONS", "engine_named"]

VERSIONS: dict[str, tuple[Engine, ...]] = {rows[-1].name: rows for rows in (VLLM, SGLANG, TRANSFORMERS)}
ENGINES: dict[str, Engine] = {name: rows[-1] for name, rows in VERSIONS.items()}  # the newest


def engine_named(text: str) -> Engine:
    """`vllm`, the newest that there are rules for, or `vllm==0.32`, where a patch release counts as its release.

    Raises ConfigError for any other.
    """
    name, separator, version = text.partition("==")
    if name not in ENGINES:
        raise ConfigError(f"unknown engine '{name}'", f"there are rules for {', '.join(ENGINES)}")
    if not separator:
        return ENGINES[name]
    for engine in VERSIONS[name]:
        if version == engine.version or version.startswith(f"{engine.version}."):
            return engine
    versions = ", ".join(f"{name}=={engine.version}" for engine in VERSIONS[name])
    raise ConfigError(f"there are no rules for {text}", f"there are for {versions}")
