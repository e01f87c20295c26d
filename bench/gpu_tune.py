"""A sweep over the kernels' tiles on a GPU, printed as the table of quantkit/kernels/triton/tiles.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from gpu_runs import DEVICE, MODELS, measure, random_packed
from torch import Tensor
from triton.errors import TritonError

from quantkit.kernels.cuda import decode
from quantkit.kernels.cuda.build import Library
from quantkit.kernels.triton import ops, tiles, weight_only
from quantkit.kernels.triton.compile import step_bytes
from quantkit.kernels.triton.lang import machine
from quantkit.kernels.triton.layout import Packed
from quantkit.kernels.triton.tiles import Tile
from quantkit.scheme import PRESETS

__all__ = [
    "CANDIDATES",
    "RANGES",
    "Found",
    "beside_cuda",
    "best",
    "crossover",
    "cuda_up_to",
    "misfit",
    "scratch_from",
    "source_of",
    "sweep",
]

SCHEMES = {"int4": "W4A16", "int8": "W8A16", "row8": "FP8_DYNAMIC", "block8": "FP8_BLOCK"}
RANGES = ((16, 1), (32, 24), (64, 48), (float("inf"), 256))  # up to so many rows a weight, measured at so many
FEW = (0.125, 0.5, 1, 4, 8, 16)  # rows a weight, on average, at which the CUDA kernel is tried
CROSSING = (128, 256, 512, 768, 1024, 2048)  # rows a weight at which the scratch is tried
CANDIDATES: dict[float, tuple[Tile, ...]] = {
    16: (
        *(Tile(16, 64, 4, stages, fill) for stages in (4, 6) for fill in (2, 4)),
        *(Tile(16, 128, 4, stages, fill) for stages in (3, 4) for fill in (2, 4, 8)),
        Tile(16, 128, 8, 4),
        Tile(16, 256, 8, 3),
    ),
    32: (
        *(Tile(32, 64, 4, stages) for stages in (3, 4, 5)),
        *(Tile(32, 128, 8, stages) for stages in (3, 4)),
        Tile(32, 128, 4, 3),
        Tile(32, 256, 8, 3),
        Tile(16, 128, 4, 4),
    ),
    64: (
        *(Tile(64, 64, 4, stages) for stages in (3, 4)),
        *(Tile(64, 128, 8, stages) for stages in (3, 4)),
        Tile(32, 128, 8, 3),
    ),
    float("inf"): (
        *(Tile(64, 128, 8, stages) for stages in (3, 4)),
        *(Tile(128, 128, 8, stages) for stages in (2, 3, 4)),
        Tile(64, 256, 8, 2),
        Tile(128, 256, 8, 2),  # gate and up spill some 16 registers
        Tile(128, 64, 4, 3),
    ),
}


def misfit(kind: str, tile: Tile, memory: int = 227 * 1024) -> str | None:
    """Why a tile is not worth compiling for a kind of weight, or None. memory: bytes a block may share."""
    if tile.bn < 16 * tile.warps:
        return f"{tile.warps} warps have no 16 rows each"
    sums = tile.bm * tile.bn // (32 * tile.warps)
    early = kind.startswith("int") and weight_only.early(tile.bm, 64, 2)
    if sums > (
        32 if kind == "block8" else 128 if early else 64
    ):  # unless scales go first, there are two of each in the loop
        return f"{sums} registers of sums a thread"
    wanted = tile.stages * step_bytes(kind, tile)
    return f"{wanted} bytes shared" if wanted > memory else None


@dataclass(frozen=True)
class _Layer:
    """The experts of Hunyuan-Large with the same number of rows for each, or with one row for some of them."""

    x: Tensor
    gate_up: Packed
    down: Packed
    ids: Tensor
    router: Tensor

    def seconds(self, rounds: int, way: Callable[..., Tensor]) -> float:
        """The median of a way to compute it."""
        call = partial(way, self.x, self.gate_up, self.down, self.ids, self.router)
        return sorted(measure(call, rounds, waits=way is ops.moe_by_scratch)[0])[rounds // 2]


def _layer(name: str, rows: float) -> _Layer:
    model, scheme = MODELS["hunyuan-large"], PRESETS[name]
    tokens = round(rows * model.experts)
    return _Layer(
        torch.randn(tokens, model.hidden, device=DEVICE).bfloat16(),
        random_packed(scheme, model.experts, 2 * model.inner, model.hidden),
        random_packed(scheme, model.experts, model.hidden, model.inner),
        torch.arange(tokens, device=DEVICE)[:, None] % model.experts,
        torch.rand(tokens, 1, device=DEVICE),
    )


@dataclass(frozen=True)
class Found:
    """Median seconds of Hunyuan-Large's layer with a tile, up to `limit` rows a weight; problem: why there are none."""

    kind: str
    limit: float
    tile: Tile
    seconds: float
    problem: str | None = None


def sweep(kind: str, rounds: int) -> Iterator[Found]:
    """Each candidate that fits this GPU on paper."""
    memory = machine(DEVICE)[1]
    for limit, rows in RANGES:
        layer = _layer(SCHEMES[kind], rows)
        for tile in CANDIDATES[limit]:
            if misfit(kind, tile, memory) is None:
                try:
                    yield Found(kind, limit, tile, layer.seconds(rounds, partial(ops.moe, tile=tile)))
                except (RuntimeError, TritonError) as error:  # the compiler may need more shared memory than counted
                    yield Found(kind, limit, tile, math.inf, f"{type(error).__name__}: {error}")


def best(found: Iterable[Found], kind: str) -> dict[float, Tile]:
    """The fastest tile of a kind for each range in which one ran."""
    least: dict[float, Found] = {}
    for one in found:
        if one.kind == kind and one.problem is None and (one.limit not in least or one.seconds < least[one.limit].seconds):
            least[one.limit] = one
    return {limit: one.tile for limit, one in sorted(least.items())}


def crossover(rounds: int, tile_of: dict[float, Tile]) -> Iterator[tuple[int, float, float]]:
    """(rows a weight, seconds of the fused kernel with the best tile for many rows, of the scratch) of the W4A16 layer."""
    fused = partial(ops.moe, tile=tile_of.get(math.inf))
    for rows in CROSSING:
        layer = _layer("W4A16", rows)
        yield rows, layer.seconds(rounds, fused), layer.seconds(rounds, ops.moe_by_scratch)


def source_of(found: Sequence[Found]) -> str:
    """The fastest tile of each kind and range as tiles.TABLE has them; what was not swept whole stays as it is."""
    lines = ["TABLE: dict[str, tuple[tuple[float, Tile], ...]] = {"]
    for kind, rows in tiles.TABLE.items():
        swept = list(best(found, kind).items())
        swept = swept if swept and swept[-1][0] == math.inf else []  # a table without a last range is none
        lines.append(f'    "{kind}": (')
        for limit, tile in swept or rows:
            fill = "" if tile.fill == Tile.fill else f", fill={tile.fill}"
            lines.append(f"        ({limit}, Tile({tile.bm}, {tile.bn}, {tile.warps}, {tile.stages}{fill})),")
        lines.append("    ),")
    return "\n".join([*lines, "}"])


def beside_cuda(rounds: int, tile_of: dict[float, Tile], library: Library) -> Iterator[tuple[float, float, float]]:
    """(rows a weight, seconds of Triton's kernel with the best tile for few rows, of the CUDA kernel) of the W4A16 layer."""
    fused = partial(ops.moe, tile=tile_of.get(RANGES[0][0]))
    for rows in FEW:
        layer = _layer("W4A16", rows)
        yield rows, layer.seconds(rounds, fused), layer.seconds(rounds, partial(decode.moe, library=library))


def cuda_up_to(crossing: Iterable[tuple[float, float, float]]) -> float:
    """The most rows a weight up to which the CUDA kernel of `beside_cuda` was always faster; 0 where it never was."""
    most = 0.0
    for rows, fused, cuda in sorted(crossing):
        if cuda >= fused:
            break
        most = rows
    return most


def scratch_from(crossing: Iterable[tuple[int, float, float]]) -> int | None:
    """The least rows a weight from which on the scratch of `crossover` was always faster; None where it never was."""
    least = None
    for rows, fused, scratch in sorted(crossing, reverse=True):
        if scratch >= fused:
            break
        least = rows
    return least
