"""How much text learning reads, by numbers alone: a plan says it before any library is imported."""

from __future__ import annotations

__all__ = ["APART", "STEP_TOKENS", "apart", "fisher_windows"]

STEP_TOKENS = 2048  # of a step of learning, in a part that all tokens pass
APART = 16  # of so many windows one is not learned from


def apart(windows: int) -> int:
    """How many windows are not learned from."""
    return windows // min(APART, windows)


def fisher_windows(windows: int, length: int, tokens: int) -> int:
    """How many windows the Fisher pass reads: of so many tokens, or one."""
    return min(windows, max(1, tokens // length))
