"""Times the GPU kernels on the shapes of known models; writes results/<gpu>.json and says which goals are met.

For each model, linear or layer of experts, number of tokens and kernel: median, 20th and 80th percentile in microseconds
(on the GPU, in a CUDA graph), eager_us (as Python calls it), GB/s of the weights of experts that get tokens and of x and
out, TFLOP/s, the share of the measured bandwidth and of the roofline, and the speed-up over BF16 (F.linear, F.grouped_mm).
Weights and routing are random. --tune sweeps the tiles instead and prints the table for quantkit/kernels/triton/tiles.py.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import gpu_report
import gpu_tune
import torch
from gpu_runs import DEVICE, MODELS, layers, linears, measure, peaks
from rich.console import Console
from rich.progress import track
from rich.table import Table

from quantkit.kernels.cuda import build
from quantkit.kernels.triton.backend import lacks
from quantkit.scheme import PRESETS

RESULTS = Path(__file__).parent / "results"
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
COLUMNS = ("model", "layer", "tokens", "kernel", "median_us", "eager_us", "gb_per_s", "tflop_per_s", "of_bandwidth")


def rows_of(
    models: tuple[str, ...], kinds: tuple[str, ...], tokens: tuple[int, ...], schemes: tuple[str, ...], rounds: int
) -> tuple[gpu_report.Peaks, list[dict[str, Any]]]:
    """The peaks of this GPU, and a row for each run."""
    library = build.library()
    found, most = [], peaks(rounds)
    for name in models:
        for kind in kinds:
            make = linears if kind == "linear" else layers
            for run in make(MODELS[name], tokens, schemes, None if isinstance(library, str) else library):
                seconds, eager = measure(run.call, rounds, run.waits)
                place = {"model": name, "layer": kind, "tokens": run.tokens, "kernel": run.kernel}
                figures = gpu_report.row(seconds, run.moved, run.operations, most, run.kind)
                found.append({**place, **figures, "eager_us": round(eager * 1e6, 2)})
    return most, gpu_report.compare(found)


def tune(console: Console, kinds: tuple[str, ...], rounds: int) -> None:
    found = []
    for kind, limit, tile, seconds in track(gpu_tune.sweep(kinds, rounds), "tiles", total=None, console=console):
        found.append((kind, limit, tile, seconds))
        console.print(f"{kind:7} up to {limit:4} rows: {seconds * 1e6:9.1f} us  {tile}")
    console.print(gpu_tune.source_of(found), highlight=False)
    if "int4" in kinds:
        for rows, fused, scratch in gpu_tune.crossover(rounds):
            console.print(
                f"{rows:5} rows a weight: fused {fused * 1e6:.0f} us, scratch {scratch * 1e6:.0f} us (SCRATCH_FROM)"
            )


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=tuple(MODELS))
@click.option("--layer", "kinds", multiple=True, type=click.Choice(["linear", "moe"]), default=("moe", "linear"))
@click.option("--scheme", "schemes", multiple=True, type=click.Choice(list(PRESETS)), default=tuple(PRESETS))
@click.option("--tokens", type=int, multiple=True, default=TOKENS, help="Numbers of tokens; may be given again.")
@click.option("--rounds", default=30, help="Rounds of each measurement.")
@click.option("--quick", is_flag=True, help="Hunyuan-Large's experts in W4A16 and FP8_DYNAMIC only, for the goals.")
@click.option("--tune", "tuning", is_flag=True, help="Sweep tiles; with --quick, of W4A16 and FP8 by rows only.")
@click.option("--out", type=click.Path(path_type=Path), help="Default: results/<gpu>.json beside this file.")
def main(
    models: tuple[str, ...],
    kinds: tuple[str, ...],
    schemes: tuple[str, ...],
    tokens: tuple[int, ...],
    rounds: int,
    quick: bool,
    tuning: bool,
    out: Path | None,
) -> None:
    """Time quantkit's GPU kernels on this machine's GPU."""
    if reason := lacks(PRESETS["W4A16"], DEVICE):
        raise click.ClickException(f"gpu-bench needs an NVIDIA GPU: {reason}")
    console, missing = Console(width=200), build.library()
    if isinstance(missing, str):
        console.print(f"without the CUDA kernel: {missing}")
    if tuning:
        return tune(console, ("int4", "row8") if quick else tuple(gpu_tune.SCHEMES), rounds)
    if quick:
        models, kinds, schemes, rounds = ("hunyuan-large",), ("moe",), ("W4A16", "FP8_DYNAMIC"), min(rounds, 15)
    gpu = torch.cuda.get_device_name()
    most, rows = rows_of(models, kinds, tokens, schemes, rounds)
    verdicts = gpu_report.judge(rows)
    path = out or RESULTS / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda}
    goals = [{"goal": v.goal.text, "met": v.met, "worst": v.worst, "tokens": v.tokens} for v in verdicts]
    path.write_text(json.dumps({**versions, "peaks": asdict(most), "goals": goals, "rows": rows}, indent=1) + "\n")
    table = Table(*COLUMNS, "of_roofline", "of_bf16", title=gpu)
    for row in rows:
        table.add_row(*(str(row[name]) for name in (*COLUMNS, "of_roofline", "of_bf16")))
    console.print(table)
    for verdict in verdicts:
        console.print(str(verdict), highlight=False)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    main()
