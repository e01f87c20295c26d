"""The sizes of the kernels' tiles: the one table to tune (`python bench/gpu_kernels.py --tune` prints it anew).

The rows of int4 are the fastest of those tried on an H100; the others are what compiles without spills and reads enough
bytes ahead on paper. Each byte of a 4-bit weight makes a program read 4 bm / bn bytes of x through the second-level cache,
so few rows want bn >= 7 bm.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt

__all__ = ["CUDA_UP_TO", "SCRATCH_FROM", "TABLE", "Tile", "crowd", "pick", "splits", "that_fits"]


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


# Kind of weight -> (up to so many rows of x for a weight, tile), in order. For experts these are `crowd` of the mean.
TABLE: dict[str, tuple[tuple[float, Tile], ...]] = {
    "int4": (
        (16, Tile(16, 128, 4, 4)),
        (32, Tile(32, 128, 8, 3)),
        (64, Tile(64, 128, 8, 4)),
        (inf, Tile(128, 256, 8, 2)),
    ),
    "int8": (
        (16, Tile(16, 128, 4, 4)),
        (32, Tile(32, 128, 8, 4)),
        (64, Tile(64, 128, 8, 3)),
        (inf, Tile(128, 128, 8, 3)),
    ),
    "row8": (
        (16, Tile(16, 64, 4, 5)),
        (32, Tile(32, 64, 4, 4)),
        (64, Tile(64, 128, 8, 4)),
        (inf, Tile(128, 128, 8, 4)),
    ),
    "block8": (
        (16, Tile(16, 64, 4, 5)),
        (32, Tile(32, 64, 4, 4)),
        (inf, Tile(64, 128, 8, 4)),
    ),
}
# Mean rows of x, as measured on an H100: from so many an integer weight is widened to a bfloat16 scratch first; up to so
# many the CUDA kernel serves 4-bit weights.
SCRATCH_FROM = 2048
CUDA_UP_TO = 0.5


def crowd(mean: float) -> float:
    """Rows of x that few experts exceed where each has so many on average and routing is random: two standard deviations
    more. Blocks of fewer make many experts fill a second one, which reads their weight again."""
    return mean + 2 * sqrt(mean)


def pick(kind: str, rows: float) -> Tile:
    """The tile for a kind of weight that meets so many rows of x."""
    return next(tile for limit, tile in TABLE[kind] if rows <= limit)


def that_fits(tile: Tile, step_bytes: int, limit: int) -> int:
    """How many stages of step_bytes fit into a GPU's shared memory, at most those of the tile."""
    return max(1, min(tile.stages, limit // step_bytes))


def splits(tile: Tile, programs: int, steps: int, processors: int) -> int:
    """Into how many parts K is cut: enough to fill the processors, with four steps or more left to each part."""
    return max(1, min(tile.fill * processors // programs, steps // 4, 16))
