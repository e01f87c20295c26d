"""What a layer of experts should take on a GPU, from an analytic model: python bench/gpu_roofline.py. Not a measurement.

A product takes the longest of three: its bytes through HBM, the same and what is read again through the second-level cache,
and what its programs can do, wave after wave, each bound by the instructions it issues or by the latency that it does not
hide. Instructions and programs a processor are those of the compiled code (quantkit/kernels/triton/compile.py); the rates
and latencies are assumptions, named below. Trust it to some 20 %.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, comb

__all__ = ["GPUS", "KERNELS", "LAYERS", "TOKENS", "Gpu", "Kernel", "Layer", "Predicted", "predict", "predictions"]

PROCESSORS = 132
CYCLES = 1755.0  # a microsecond
ISSUE = 0.62  # instructions a cycle that a scheduler with a few warps reaches
LATENCY = 0.75  # microseconds of a load from HBM under load
CACHE = 5.7e6  # bytes a microsecond of the second-level cache
SHARE = 0.93  # of the measured bandwidth that a kernel which only reads reaches
LAUNCH = 2.0  # microseconds between kernels in a graph


@dataclass(frozen=True)
class Gpu:
    """bandwidth: bytes a microsecond of a copy, as seen on such a machine; bf16: operations a microsecond."""

    bandwidth: float
    bf16: float = 7.8e8


@dataclass(frozen=True)
class Layer:
    """The routed experts of a layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int


@dataclass(frozen=True)
class Kernel:
    """Of a product. bm, bn: rows of x and of the weight a program. warps: that read side by side. programs: a processor's.

    columns: of a step. instructions: of a step, for each warp. exposed: latencies of HBM a step that nothing hides. fixed:
    microseconds of a program before and after its loop. splits: K of down is cut where programs are few.
    """

    bm: int
    bn: int
    warps: int
    programs: int
    columns: int
    instructions: float
    exposed: float = 0.0
    fixed: float = 1.9
    splits: bool = True
    most: float = float("inf")  # rows a weight


GPUS = {"H100": Gpu(3.05e6), "H200": Gpu(4.3e6)}
LAYERS = {
    "Hunyuan-Large": Layer(6400, 18304, 16, 1),
    "Hunyuan-A13B": Layer(4096, 3072, 64, 8),
    "Mixtral-8x22B": Layer(6144, 16384, 8, 2),
    "DeepSeek-V2": Layer(5120, 1536, 160, 6),
}
KERNELS = {
    "Triton 16x128": Kernel(16, 128, 4, 3, 256, 555),
    "Triton 32x128": Kernel(32, 128, 8, 2, 256, 343),
    "CUDA, 8 rows": Kernel(8, 64, 8, 1, 1024, 629, fixed=1.7, splits=False, most=8),
    "CUDA, 16 rows": Kernel(16, 64, 8, 1, 1024, 678, fixed=1.7, splits=False, most=16),
}
TOKENS = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Predicted:
    """microseconds of a layer in W4A16, the share of the bandwidth that its weights move at, and how many times as fast it
    is as a fused layer in BF16."""

    microseconds: float
    of_bandwidth: float
    of_bf16: float


def _blocks(layer: Layer, tokens: int, rows: int) -> float:
    """Expected blocks of so many rows, routing being uniform: an expert that overflows one reads its weight again."""
    p = layer.top_k / layer.experts
    chance = [comb(tokens, n) * p**n * (1 - p) ** (tokens - n) for n in range(tokens + 1)]
    return layer.experts * sum(c * ceil(n / rows) for n, c in enumerate(chance))


def _product(gpu: Gpu, kernel: Kernel, blocks: float, rows: int, columns: int, splits: bool) -> float:
    """Microseconds of blocks times a weight [rows, columns] in 4 bits with a bfloat16 scale for each 128."""
    bytes_of_weight = rows * columns * (0.5 + 2 / 128)
    step = max(kernel.instructions * kernel.warps / 4 * kernel.programs / ISSUE / CYCLES, kernel.exposed * LATENCY)
    programs = blocks * ceil(rows / kernel.bn)
    steps = columns / kernel.columns
    if splits:
        parts = max(1, min(int(4 * PROCESSORS // programs), columns // 1024, 16))
        programs, steps = programs * parts, steps / parts
    waves = programs / (PROCESSORS * kernel.programs)
    overlap = 0.6 if kernel.programs > 1 else 1.0
    busy = (steps * step + kernel.fixed * overlap) * max(1.0, waves + 0.35 if waves > 1 else 1.0)
    again = 4 * kernel.bm / kernel.bn  # bytes of x that a program reads for each byte of its weight
    moved = blocks * bytes_of_weight
    return max(busy, moved / (gpu.bandwidth * SHARE), moved * (1 + again) / CACHE)


def predict(gpu: Gpu, layer: Layer, tokens: int, kernel: Kernel) -> Predicted:
    """A layer's experts on one kernel, in a CUDA graph, the sort included."""
    blocks = _blocks(layer, tokens, kernel.bm)
    shapes = ((2 * layer.inner, layer.hidden, False), (layer.hidden, layer.inner, kernel.splits))
    slots = tokens * layer.top_k
    around = (0 if tokens == 1 else 5) + 2.5 + 2 * LAUNCH  # the sort, the sum over a token's experts
    time = around + sum(_product(gpu, kernel, blocks, *shape) for shape in shapes)
    read = layer.experts * (1 - (1 - layer.top_k / layer.experts) ** tokens)  # experts that get a token
    values = read * 3 * layer.hidden * layer.inner
    dense = around + max(2 * values / (gpu.bandwidth * 0.85), 6 * slots * layer.hidden * layer.inner / (gpu.bf16 * 0.75))
    return Predicted(time, values * (0.5 + 2 / 128) / time / gpu.bandwidth, dense / time)


def predictions(gpu: str, layer: str) -> Iterator[tuple[int, dict[str, Predicted]]]:
    """(tokens, kernel -> prediction) for the kernels that so many tokens may use."""
    of = LAYERS[layer]
    for tokens in TOKENS:
        mean = tokens * of.top_k / of.experts
        yield tokens, {name: predict(GPUS[gpu], of, tokens, k) for name, k in KERNELS.items() if mean <= k.most}


if __name__ == "__main__":
    for gpu in GPUS:
        for layer in LAYERS:
            for tokens, row in predictions(gpu, layer):
                cells = (f"{name} {p.microseconds:.0f} us {p.of_bandwidth:.0%} {p.of_bf16:.1f}x" for name, p in row.items())
                print(f"{gpu} {layer:14} {tokens:4}", " | ".join(cells))
