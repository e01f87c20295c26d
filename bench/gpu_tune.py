"""A sweep over the kernels' tiles on a GPU, printed as the table of quantkit/kernels/triton/tiles.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from gpu_runs import DEVICE, MODELS, measure, random_packed
from torch import Tensor

from quantkit.kernels.triton import ops, tiles
from quantkit.kernels.triton.compile import step_bytes
from quantkit.kernels.triton.lang import machine
from quantkit.kernels.triton.layout import Packed
from quantkit.kernels.triton.tiles import Tile
from quantkit.scheme import PRESETS

__all__ = ["CANDIDATES", "RANGES", "crossover", "misfit", "source_of", "sweep"]

SCHEMES = {"int4": "W4A16", "int8": "W8A16", "row8": "FP8_DYNAMIC", "block8": "FP8_BLOCK"}
RANGES = ((12, 1), (32, 24), (96, 64), (float("inf"), 256))  # up to so many rows a weight, measured at so many
CANDIDATES: dict[float, tuple[Tile, ...]] = {
    12: (
        *(Tile(16, 64, 4, stages, fill) for stages in (4, 6) for fill in (2, 4)),
        *(Tile(16, 128, 4, stages, fill) for stages in (3, 4) for fill in (2, 4, 8)),
        Tile(16, 128, 8, 4),
    ),
    32: (
        *(Tile(32, 64, 4, stages) for stages in (3, 4, 5)),
        *(Tile(32, 128, warps, 3) for warps in (4, 8)),
        Tile(16, 128, 4, 4),
    ),
    96: (
        *(Tile(64, 64, 4, stages) for stages in (3, 4)),
        *(Tile(64, 128, 8, stages) for stages in (3, 4)),
        Tile(32, 128, 8, 3),
    ),
    float("inf"): (
        *(Tile(64, 128, 8, stages) for stages in (3, 4)),
        *(Tile(128, 128, 8, stages) for stages in (2, 3, 4)),
        Tile(64, 256, 8, 2),
        Tile(128, 64, 4, 3),
    ),
}


def misfit(kind: str, tile: Tile, memory: int = 227 * 1024) -> str | None:
    """Why a tile is not worth compiling for a kind of weight, or None. memory: bytes a block may share."""
    if tile.bn < 16 * tile.warps:
        return f"{tile.warps} warps have no 16 rows each"
    sums = tile.bm * tile.bn // (32 * tile.warps)
    if sums > (32 if kind == "block8" else 64):  # there are two of each in the loop
        return f"{sums} registers of sums a thread"
    wanted = tile.stages * step_bytes(kind, tile)
    return f"{wanted} bytes shared" if wanted > memory else None


@dataclass(frozen=True)
class _Layer:
    """The experts of Hunyuan-Large with the same number of rows for each."""

    x: Tensor
    gate_up: Packed
    down: Packed
    ids: Tensor
    router: Tensor

    def seconds(self, rounds: int, way: Callable[..., Tensor]) -> float:
        """The median of a way to compute it."""
        call = partial(way, self.x, self.gate_up, self.down, self.ids, self.router)
        return sorted(measure(call, rounds, waits=way is ops.moe_by_scratch)[0])[rounds // 2]


def _layer(name: str, rows: int) -> _Layer:
    model, scheme = MODELS["hunyuan-large"], PRESETS[name]
    tokens = rows * model.experts
    return _Layer(
        torch.randn(tokens, model.hidden, device=DEVICE).bfloat16(),
        random_packed(scheme, model.experts, 2 * model.inner, model.hidden),
        random_packed(scheme, model.experts, model.hidden, model.inner),
        torch.arange(tokens, device=DEVICE)[:, None] % model.experts,
        torch.rand(tokens, 1, device=DEVICE),
    )


def sweep(kinds: tuple[str, ...], rounds: int) -> Iterator[tuple[str, float, Tile, float]]:
    """(kind, range, tile, median seconds of Hunyuan-Large's layer) of each candidate that fits this GPU."""
    memory = machine(DEVICE)[1]
    for kind in kinds:
        for limit, rows in RANGES:
            layer = _layer(SCHEMES[kind], rows)
            for tile in CANDIDATES[limit]:
                if misfit(kind, tile, memory) is None:
                    yield kind, limit, tile, layer.seconds(rounds, partial(ops.moe, tile=tile))


def crossover(rounds: int) -> Iterator[tuple[int, float, float]]:
    """(rows a weight, seconds of the fused kernel, of the scratch) of Hunyuan-Large's W4A16 layer."""
    for rows in (128, 256, 512, 1024, 2048):
        layer = _layer("W4A16", rows)
        yield rows, layer.seconds(rounds, ops.moe), layer.seconds(rounds, ops.moe_by_scratch)


def source_of(found: list[tuple[str, float, Tile, float]]) -> str:
    """The fastest tile of each kind and range as tiles.TABLE has them; what was not swept stays as it is."""
    best: dict[tuple[str, float], tuple[float, Tile]] = {}
    for kind, limit, tile, seconds in found:
        if (kind, limit) not in best or seconds < best[kind, limit][0]:
            best[kind, limit] = seconds, tile
    lines = ["TABLE: dict[str, tuple[tuple[float, Tile], ...]] = {"]
    for kind, rows in tiles.TABLE.items():
        swept = [(limit, tile) for (name, limit), (_, tile) in sorted(best.items()) if name == kind]
        lines.append(f'    "{kind}": (')
        for limit, tile in swept or rows:
            fill = "" if tile.fill == Tile.fill else f", fill={tile.fill}"
            lines.append(f"        ({limit}, Tile({tile.bm}, {tile.bn}, {tile.warps}, {tile.stages}{fill})),")
        lines.append("    ),")
    return "\n".join([*lines, "}"])
