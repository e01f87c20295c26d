"""Times the GPU kernels on the shapes of known models; writes results/gpu_<gpu>.json and says which goals are met.

For each model, linear or layer of experts, number of tokens and kernel: median, 20th and 80th percentile in microseconds
(on the GPU, in a CUDA graph), eager_us (as Python calls it), GB/s of the weights of experts that get tokens and of x and
out, TFLOP/s, the share of the measured bandwidth and of the roofline, and the speed-up over BF16 (the faster of a fused
kernel and of F.linear or F.grouped_mm). Weights and routing are random. Each line is on the screen and in the file as soon
as it is measured. --tune sweeps the tiles instead and prints the table for quantkit/kernels/triton/tiles.py; --apply writes
it there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import gpu_report
import gpu_tune
import torch
import triton
from gpu_keep import TILES, apply, slug
from gpu_runs import DEVICE, MODELS, layers, linears, measure, peaks
from rich.console import Console
from rich.table import Table
from triton.errors import TritonError

from quantkit.kernels.cuda import build
from quantkit.kernels.cuda.build import Library
from quantkit.kernels.triton.backend import lacks
from quantkit.scheme import PRESETS

FAILURES = RuntimeError, TritonError  # out of memory, of shared memory, an illegal access, a launch that is refused
RESULTS = Path(__file__).parent / "results"
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
COLUMNS = ("model", "layer", "tokens", "kernel", "median_us", "eager_us", "gb_per_s", "tflop_per_s", "of_bandwidth")


def rows_of(
    models: tuple[str, ...],
    kinds: tuple[str, ...],
    tokens: tuple[int, ...],
    schemes: tuple[str, ...],
    rounds: int,
    most: gpu_report.Peaks,
) -> Iterator[dict[str, Any]]:
    """A row for each run; one that fails has `error` in place of figures."""
    library = build.library()
    for name in models:
        for kind in kinds:
            make = linears if kind == "linear" else layers
            for run in make(MODELS[name], tokens, schemes, None if isinstance(library, str) else library):
                place = {"model": name, "layer": kind, "tokens": run.tokens, "kernel": run.kernel}
                try:
                    seconds, eager = measure(run.call, rounds, run.waits)
                except FAILURES as error:
                    yield {**place, "error": f"{type(error).__name__}: {error}"}
                    continue
                figures = gpu_report.row(seconds, run.moved, run.operations, most, run.kind)
                yield {**place, **figures, "eager_us": round(eager * 1e6, 2)}


@dataclass
class Results:
    """What has been measured so far, in a file at every moment: a run that is stopped keeps what it has."""

    path: Path
    gpu: str
    peaks: gpu_report.Peaks
    measured: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, row: dict[str, Any]) -> None:
        (self.failed if "error" in row else self.measured).append(row)
        self.write(complete=False)

    def write(self, complete: bool) -> None:
        rows = gpu_report.compare(self.measured)
        goals = [
            {"goal": v.goal.text, "met": v.met, "worst": v.worst, "tokens": v.tokens}
            for v in gpu_report.judge(rows, self.gpu)
        ]
        found = {"gpu": self.gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "triton": triton.__version__}
        found |= {"complete": complete, "peaks": asdict(self.peaks), "goals": goals, "rows": rows, "failed": self.failed}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(found, indent=1) + "\n")

    def show(self, console: Console) -> None:
        rows = gpu_report.compare(self.measured)
        table = Table(*COLUMNS, "of_roofline", "of_bf16", title=self.gpu)
        for row in rows:
            table.add_row(*(str(row[name]) for name in (*COLUMNS, "of_roofline", "of_bf16")))
        console.print(table)
        for verdict in gpu_report.judge(rows, self.gpu):
            console.print(str(verdict), highlight=False)
        console.print(f"wrote {self.path}")


@dataclass
class Sweep:
    """Tiles tried so far, the table they make, and the crossover, in a file at every moment (if `path` names one)."""

    path: Path | None
    gpu: str
    found: list[gpu_tune.Found] = field(default_factory=list)
    crossing: list[tuple[int, float, float]] = field(default_factory=list)
    cuda: list[tuple[float, float, float]] = field(default_factory=list)

    @property
    def source(self) -> str:
        return gpu_tune.source_of(self.found)

    @property
    def sizes(self) -> dict[str, float]:
        """The names of tiles.py that were measured beside the table, and what they should be."""
        least = gpu_tune.scratch_from(self.crossing)
        sizes: dict[str, float] = {} if least is None else {"SCRATCH_FROM": least}
        return {**sizes, "CUDA_UP_TO": gpu_tune.cuda_up_to(self.cuda)} if self.cuda else sizes

    def write(self) -> None:
        if self.path is None:
            return
        tried = [{**asdict(one), "limit": str(one.limit), "seconds": str(one.seconds)} for one in self.found]
        made: dict[str, Any] = {"gpu": self.gpu, "tried": tried, "crossover": self.crossing}
        made |= {"cuda": self.cuda, "table": self.source, "sizes": self.sizes}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(made, indent=1) + "\n")


def tune(console: Console, kinds: tuple[str, ...], rounds: int, sweep: Sweep, library: Library | None) -> None:
    for kind in kinds:
        for one in gpu_tune.sweep(kind, rounds):
            sweep.found.append(one)
            sweep.write()
            time = f"{one.seconds * 1e6:9.1f} us" if one.problem is None else "   failed"
            console.print(f"{kind:7} up to {one.limit:4} rows: {time}  {one.tile}  {one.problem or ''}")
        console.print(sweep.source, highlight=False)  # after each kind: a sweep that is stopped has its table
        if kind == "int4" and library:
            for rows, fused, cuda in gpu_tune.beside_cuda(rounds, gpu_tune.best(sweep.found, kind), library):
                sweep.cuda.append((rows, fused, cuda))
                sweep.write()
                console.print(f"{rows:5} rows a weight: Triton {fused * 1e6:.0f} us, CUDA {cuda * 1e6:.0f} us (CUDA_UP_TO)")
        if kind == "int4":
            for rows, fused, scratch in gpu_tune.crossover(rounds, gpu_tune.best(sweep.found, kind)):
                sweep.crossing.append((rows, fused, scratch))
                sweep.write()
                times = f"fused {fused * 1e6:.0f} us, scratch {scratch * 1e6:.0f} us"
                console.print(f"{rows:5} rows a weight: {times} (SCRATCH_FROM)")


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=tuple(MODELS))
@click.option("--layer", "kinds", multiple=True, type=click.Choice(["linear", "moe"]), default=("moe", "linear"))
@click.option("--scheme", "schemes", multiple=True, type=click.Choice(list(PRESETS)), default=tuple(PRESETS))
@click.option("--tokens", type=int, multiple=True, default=TOKENS, help="Numbers of tokens; may be given again.")
@click.option("--rounds", default=30, help="Rounds of each measurement.")
@click.option("--quick", is_flag=True, help="Hunyuan-Large's experts in W4A16 and FP8_DYNAMIC only, for the goals.")
@click.option("--tune", "tuning", is_flag=True, help="Sweep tiles; with --quick, of W4A16 and FP8 by rows only.")
@click.option(
    "--apply", "applying", is_flag=True, help="With --tune: write the table into quantkit/kernels/triton/tiles.py."
)
@click.option("--kind", "swept", multiple=True, type=click.Choice(list(gpu_tune.SCHEMES)), help="Kinds of weight to tune.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Default: results/gpu_<gpu>.json beside this file; none with --tune."
)
def main(
    models: tuple[str, ...],
    kinds: tuple[str, ...],
    schemes: tuple[str, ...],
    tokens: tuple[int, ...],
    rounds: int,
    quick: bool,
    tuning: bool,
    applying: bool,
    swept: tuple[str, ...],
    out: Path | None,
) -> None:
    """Time quantkit's GPU kernels on this machine's GPU."""
    if reason := lacks(PRESETS["W4A16"], DEVICE):
        raise click.ClickException(f"gpu-bench needs an NVIDIA GPU: {reason}")
    console, found = Console(width=200), build.library()
    if isinstance(found, str):
        console.print(f"without the CUDA kernel: {found}")
    gpu = torch.cuda.get_device_name()
    if tuning:
        sweep = Sweep(out, gpu)
        tune(
            console,
            swept or (("int4", "row8") if quick else tuple(gpu_tune.SCHEMES)),
            rounds,
            sweep,
            None if isinstance(found, str) else found,
        )
        if applying:
            apply(sweep.source, sweep.sizes, TILES)
        return
    if quick:
        models, kinds, schemes, rounds = ("hunyuan-large",), ("moe",), ("W4A16", "FP8_DYNAMIC"), min(rounds, 15)
    path = out or RESULTS / f"gpu_{slug(gpu)}.json"
    results = Results(path, gpu, peaks(rounds))
    for row in rows_of(models, kinds, tokens, schemes, rounds, results.peaks):
        results.add(row)
        seen = row.get("error") or f"{row['median_us']} us"
        console.print(f"{row['model']} {row['layer']} {row['tokens']:5} tokens {row['kernel']}: {seen}", highlight=False)
    results.write(complete=True)
    results.show(console)
    if results.failed:
        raise click.ClickException(f"{len(results.failed)} runs failed: `failed` of {path} says how")


if __name__ == "__main__":
    main()
