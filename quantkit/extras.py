"""Libraries that only some commands need: which extra of pyproject.toml brings each, and whether it is there."""

from __future__ import annotations

from importlib.util import find_spec

from quantkit.errors import ConfigError

__all__ = ["LIBRARIES", "install", "lacking", "need"]

LIBRARIES: dict[str, tuple[str, ...]] = {
    "report": ("matplotlib", "jinja2"),
    "chat": ("jinja2",),
    "allocate": ("scipy",),
    "parquet": ("pyarrow",),
    "datasets": ("datasets",),
    "tasks": ("lm_eval",),
}


def lacking(extra: str) -> str | None:
    """The first library of an extra that is not installed, or None."""
    return next((name for name in LIBRARIES[extra] if find_spec(name) is None), None)


def install(extra: str) -> str:
    return f"pip install 'quantkit[{extra}]'"


def need(extra: str, what: str) -> None:
    """To be asked before the work that ends in it. Raises ConfigError where a library of the extra is not installed."""
    if name := lacking(extra):
        raise ConfigError(f"{what} needs the library {name}, which is not installed", install(extra))
