"""What every wrapper of a kernel asks before a launch. Needs torch only, so that asking costs nothing."""

from __future__ import annotations

__all__ = ["check", "cut"]


def check(condition: bool, problem: str) -> None:
    """Raises ValueError(problem) unless the condition holds."""
    if not condition:
        raise ValueError(problem)


def cut(size: int, by: int) -> int:
    """How many pieces of `by` cover `size`."""
    return -(-size // by)
