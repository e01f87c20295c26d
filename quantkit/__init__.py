"""quantkit: take a Mixture-of-Experts language model from BF16 to INT4 or FP8, run it, and know what it lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.conversion import convert
    from quantkit.evals.evaluate import evaluate
    from quantkit.pipeline import quantize
    from quantkit.runtime import load
    from quantkit.scheme import Recipe

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "convert", "evaluate", "load", "quantize"]

_HOME = {
    "Recipe": "quantkit.scheme",
    "convert": "quantkit.conversion",
    "evaluate": "quantkit.evals.evaluate",
    "load": "quantkit.runtime",
    "quantize": "quantkit.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import the library's functions when first used, so that `quantkit --help` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
