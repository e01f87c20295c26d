"""What a time on a GPU means: rates, shares of the roofline, speed-ups, and which goals are met. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

__all__ = ["BASELINES", "GOALS", "Goal", "Peaks", "Verdict", "compare", "judge", "row"]

BASELINES = ("bf16", "bf16 torch")  # the fused kernel of bench/gpu_dense.py, and torch's own products


@dataclass(frozen=True)
class Peaks:
    """What this GPU reached in this run: bytes a second from its memory, and operations a second of each type.

    A type that it does not have is absent.
    """

    bandwidth: float
    operations: dict[str, float]


def row(seconds: Sequence[float], moved: float, operations: float, peaks: Peaks, kind: str) -> dict[str, Any]:
    """Of the seconds of a call that must move so many bytes and do so many operations of a type of Peaks.operations."""
    p20, median, p80 = np.quantile(seconds, (0.2, 0.5, 0.8))
    least = max(moved / peaks.bandwidth, operations / peaks.operations[kind])
    return {
        "median_us": round(median * 1e6, 2),
        "p20_us": round(p20 * 1e6, 2),
        "p80_us": round(p80 * 1e6, 2),
        "gb_per_s": round(moved / median / 1e9, 1),
        "tflop_per_s": round(operations / median / 1e12, 2),
        "of_bandwidth": round(moved / median / peaks.bandwidth, 4),
        "of_roofline": round(least / median, 4),
    }


def compare(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with of_bf16: how many times as fast as the faster of the kernels BASELINES at its model, layer and tokens;
    None without one."""
    rows = list(rows)
    dense: dict[tuple[str, str, int], float] = {}
    for r in rows:
        if r["kernel"] in BASELINES:
            dense[_place(r)] = min(r["median_us"], dense.get(_place(r), inf))
    return [{**r, "of_bf16": round(dense[_place(r)] / r["median_us"], 3) if _place(r) in dense else None} for r in rows]


def _place(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["model"], row["layer"], row["tokens"]


@dataclass(frozen=True)
class Goal:
    """`value` of a kernel at each of these tokens is at least so much. gpu: part of the name of the GPU that it is for."""

    text: str
    kernel: str
    tokens: tuple[int, ...]
    at_least: float
    value: str = "of_bf16"
    gpu: str = ""
    model: str = "hunyuan-large"
    layer: str = "moe"


GOALS = (
    Goal("W4A16 experts of Hunyuan-Large move 75 % of bandwidth at 4 to 64", "W4A16", (4, 16, 64), 0.75, "of_bandwidth"),
    Goal("and at 1 token on an H100", "W4A16", (1,), 0.75, "of_bandwidth", "H100"),
    Goal("and 60 % at 1 token on an H200", "W4A16", (1,), 0.6, "of_bandwidth", "H200"),
    Goal("they are 2 times as fast as BF16 at 256 tokens", "W4A16", (256,), 2.0),
    Goal("they are never slower than BF16 at 4096 tokens", "W4A16", (4096,), 1.0),
    Goal("FP8_DYNAMIC experts are 1.6 times as fast as BF16 at 4096 tokens", "FP8_DYNAMIC", (4096,), 1.6),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """met: None where a number is missing. worst: the least value seen, at `tokens`."""

    goal: Goal
    met: bool | None
    worst: float | None
    tokens: int | None

    def __str__(self) -> str:
        word = {True: "met", False: "missed", None: "not measured"}[self.met]
        seen = "" if self.worst is None else f": {self.worst:.2f} at {self.tokens} tokens, {self.goal.at_least:g} asked"
        return f"{word:12} {self.goal.text}{seen}"


def judge(rows: Iterable[dict[str, Any]], gpu: str = "", goals: Iterable[Goal] = GOALS) -> list[Verdict]:
    """Which goals for this GPU these rows (from `compare`) meet. One is met only if all its token counts were measured."""
    table = {(r["model"], r["layer"], r["tokens"], r["kernel"]): r for r in rows}
    verdicts = []
    for goal in goals:
        if goal.gpu not in gpu:
            continue
        places = ((goal.model, goal.layer, tokens, goal.kernel) for tokens in goal.tokens)
        mine = [table[place] for place in places if place in table]
        seen = [(row[goal.value], row["tokens"]) for row in mine if row[goal.value] is not None]
        worst, tokens_at = min(seen) if seen else (None, None)
        missed = worst is not None and worst < goal.at_least
        met = False if missed else True if len(seen) == len(goal.tokens) else None
        verdicts.append(Verdict(goal, met, worst, tokens_at))
    return verdicts
