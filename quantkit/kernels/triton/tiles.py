"""The sizes of the kernels' tiles: the one table to tune (`python bench/gpu_kernels.py --tune` prints it anew).

No row has been tuned on a GPU yet: they are what compiles without spills and reads enough bytes ahead on paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

__all__ = ["SCRATCH_FROM", "TABLE", "Tile", "pick", "splits", "that_fits"]


@dataclass(frozen=True)
class Tile:
    """bm rows of x by bn rows of the weight, warps a program, and stages: how many steps of K are in flight.

    fill: K is split until each processor has so many programs.
    """

    bm: int
    bn: int
    warps: int
    stages: int
    fill: int = 4


# Kind of weight -> (up to so many rows of x for each weight, tile), in order.
TABLE: dict[str, tuple[tuple[float, Tile], ...]] = {
    "int4": (
        (12, Tile(16, 128, 4, 4)),
        (32, Tile(32, 64, 4, 4)),
        (96, Tile(64, 128, 8, 3)),
        (inf, Tile(128, 128, 8, 2)),
    ),
    "int8": (
        (12, Tile(16, 128, 4, 4)),
        (32, Tile(32, 64, 4, 4)),
        (96, Tile(64, 128, 8, 3)),
        (inf, Tile(128, 128, 8, 3)),
    ),
    "row8": (
        (12, Tile(16, 64, 4, 5)),
        (32, Tile(32, 64, 4, 4)),
        (96, Tile(64, 128, 8, 4)),
        (inf, Tile(128, 128, 8, 4)),
    ),
    "block8": (
        (12, Tile(16, 64, 4, 5)),
        (32, Tile(32, 64, 4, 4)),
        (inf, Tile(64, 128, 8, 4)),  # two sums a thread: a larger tile runs out of registers
    ),
}
SCRATCH_FROM = 2048  # rows of x for each integer weight from which it is widened to a scratch in bfloat16 first. Not tuned.


def pick(kind: str, rows_per_weight: float) -> Tile:
    """The tile for a kind of weight of which each meets so many rows of x on average."""
    return next(tile for limit, tile in TABLE[kind] if rows_per_weight <= limit)


def that_fits(tile: Tile, step_bytes: int, limit: int) -> int:
    """How many stages of step_bytes fit into a GPU's shared memory, at most those of the tile."""
    return max(1, min(tile.stages, limit // step_bytes))


def splits(tile: Tile, programs: int, steps: int, processors: int) -> int:
    """Into how many parts K is cut: enough to fill the processors, with four steps or more left to each part."""
    return max(1, min(tile.fill * processors // programs, steps // 4, 16))
