"""quantkit: take a Mixture-of-Experts language model from BF16 to INT4 or FP8, run it, and know what it lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quantkit.job.conversion import convert
    from quantkit.job.pipeline import quantize
    from quantkit.measure.evaluate import evaluate
    from quantkit.recipe import Recipe
    from quantkit.run.model import load

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "convert", "evaluate", "load", "quantize"]

_HOME = {
    "Recipe": "quantkit.recipe",
    "convert": "quantkit.job.conversion",
    "evaluate": "quantkit.measure.evaluate",
    "load": "quantkit.run.model",
    "quantize": "quantkit.job.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import the library's functions when first used, so that `quantkit --help` need not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'quantkit' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
