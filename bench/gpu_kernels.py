"""Times the GPU kernels on the shapes of Hunyuan-Large and Hunyuan-A13B; writes results/<gpu>.json.

Per kernel, shape and number of tokens: median, 20th and 80th percentile in microseconds, GB/s (weights of the experts that
get tokens, x and out), TFLOP/s, and the speed-up over bfloat16. Weights and routing are random. The second-level cache is
flushed before each launch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quantkit.kernels.cuda import build, decode
from quantkit.kernels.triton import lang, moe_w4a16, moe_w8a8, w4a16, w8a8
from quantkit.kernels.triton.layout import Packed4, Packed8
from quantkit.scheme import PRESETS

RESULTS = Path(__file__).parent / "results"
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
W8 = ("FP8_DYNAMIC", "FP8_BLOCK", "W8A8")


@dataclass(frozen=True)
class Model:
    hidden: int
    inner: int
    experts: int
    top_k: int


MODELS = {"Hunyuan-Large": Model(6400, 18304, 16, 1), "Hunyuan-A13B": Model(4096, 3072, 64, 8)}


@dataclass(frozen=True)
class Run:
    """One thing to time. bytes: of weights and activations that it must move; flops: multiplications and additions."""

    kernel: str
    call: Callable[[], Tensor]
    bytes: int
    flops: int


def four_bit(experts: int, rows: int, columns: int, device: str) -> Packed4:
    words = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=device)
    scale = torch.full((experts, columns // 128, rows), 0.01, dtype=torch.bfloat16, device=device)
    return Packed4(words, scale, None, columns, 128, 64)


def eight_bit(experts: int, rows: int, columns: int, scheme: str, device: str) -> Packed8:
    codes = torch.randint(-100, 100, (experts, rows, columns), dtype=torch.int8, device=device)
    if scheme != "W8A8":
        codes = torch.stack([part.to(torch.float8_e4m3fn) for part in codes])
    blocked = scheme == "FP8_BLOCK"
    shape = (experts, -(-rows // 128), columns // 128) if blocked else (experts, rows)
    return Packed8(codes, torch.full(shape, 1e-3, device=device), blocked)


def linears(model: Model, tokens: int, device: str, library: build.Library | None) -> Iterator[Run]:
    """A linear [inner, hidden], the bfloat16 one first."""
    rows, columns = model.inner, model.hidden
    x = torch.randn(tokens, columns, device=device).bfloat16()
    moved, flops = 2 * tokens * (rows + columns), 2 * tokens * rows * columns
    dense = torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
    yield Run("bf16", lambda: F.linear(x, dense), moved + dense.nbytes, flops)
    packed = four_bit(1, rows, columns, device)
    yield Run("W4A16 triton", lambda: w4a16.linear(x, packed), moved + packed.nbytes, flops)
    if library is not None and tokens <= 16:
        yield Run("W4A16 cuda", lambda: decode.linear(x, packed, library), moved + packed.nbytes, flops)
    for name in W8:
        activation = PRESETS[name].activation
        assert activation
        eight = eight_bit(1, rows, columns, name, device)

        def call(eight: Packed8 = eight, activation: Any = activation) -> Tensor:
            return w8a8.linear(x, eight, activation)

        yield Run(f"{name} triton", call, moved + eight.nbytes, flops)


def dense_moe(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, router: Tensor) -> Tensor:
    """The bfloat16 layer on torch's grouped product: what the kernels are compared with."""
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=gate_up.shape[0]).cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=ends).chunk(2, 1)
    rows = F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends) * router.flatten()[order, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add_(0, order // ids.shape[1], rows.float()).to(x.dtype)


def layers(model: Model, tokens: int, device: str, library: build.Library | None) -> Iterator[Run]:
    """The routed experts of a layer, the bfloat16 one first."""
    hidden, inner, experts = model.hidden, model.inner, model.experts
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    ids = torch.rand(tokens, experts, device=device).topk(model.top_k).indices
    router = torch.rand(tokens, model.top_k, device=device)
    busy, moved = ids.unique().numel() / experts, 4 * tokens * hidden
    flops = 6 * ids.numel() * hidden * inner
    if hasattr(F, "grouped_mm"):
        wide = torch.randn(experts, 2 * inner, hidden, device=device, dtype=torch.bfloat16)
        back = torch.randn(experts, hidden, inner, device=device, dtype=torch.bfloat16)
        size = int(busy * (wide.nbytes + back.nbytes)) + moved
        yield Run("bf16", lambda: dense_moe(x, wide, back, ids, router), size, flops)
        del wide, back  # timed by now: room for the others
    four = four_bit(experts, 2 * inner, hidden, device), four_bit(experts, hidden, inner, device)
    size = int(busy * (four[0].nbytes + four[1].nbytes)) + moved
    yield Run("W4A16 triton", lambda: moe_w4a16.moe(x, *four, ids, router), size, flops)
    if library is not None and tokens <= 16:
        yield Run("W4A16 cuda", lambda: decode.moe(x, *four, ids, router, library), size, flops)
    for name in W8:
        activation = PRESETS[name].activation
        assert activation
        pair = eight_bit(experts, 2 * inner, hidden, name, device), eight_bit(experts, hidden, inner, name, device)

        def call(pair: tuple[Packed8, Packed8] = pair, activation: Any = activation) -> Tensor:
            return moe_w8a8.moe(x, *pair, ids, router, activation)

        yield Run(f"{name} triton", call, int(busy * (pair[0].nbytes + pair[1].nbytes)) + moved, flops)


def measure(run: Run) -> dict[str, float]:
    """Microseconds and the rates they mean."""
    from triton.testing import do_bench

    median, low, high = (1000 * ms for ms in do_bench(run.call, quantiles=[0.5, 0.2, 0.8]))
    return {
        "median_us": round(median, 2),
        "p20_us": round(low, 2),
        "p80_us": round(high, 2),
        "gb_per_s": round(run.bytes / median / 1e3, 1),
        "tflop_per_s": round(run.flops / median / 1e6, 2),
    }


def sweep(library: build.Library | None, tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """All runs, each compared with the bfloat16 run of its shape."""
    found: list[dict[str, Any]] = []
    for name, model in MODELS.items():
        for kind, runs in (("linear", linears), ("moe", layers)):
            for count in tokens:
                dense = None
                for run in runs(model, count, "cuda", library):
                    figures = measure(run)
                    dense = figures["median_us"] if run.kernel == "bf16" else dense
                    speedup = round(dense / figures["median_us"], 3) if dense else None
                    row = {"model": name, "layer": kind, "tokens": count, "kernel": run.kernel}
                    found.append({**row, **figures, "speedup": speedup})
    return found


@click.command()
@click.option("--tokens", type=int, multiple=True, default=TOKENS, help="Numbers of tokens; may be given again.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: results/<gpu>.json beside this file.")
def main(tokens: tuple[int, ...], out: Path | None) -> None:
    """Time quantkit's GPU kernels on this machine's GPU."""
    if not torch.cuda.is_available() or not lang.available():
        raise click.ClickException("there is nothing to time: this needs an NVIDIA GPU, a torch that sees it, and Triton")
    console, reason = Console(), build.missing()
    if reason:
        console.print(f"without the CUDA kernel: {reason}")
    gpu = torch.cuda.get_device_name()
    rows = sweep(None if reason else build.load(), tokens)
    path = out or RESULTS / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    table = Table(*rows[0], title=gpu)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
