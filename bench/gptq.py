"""GPTQ of one linear at true width, one thread: CPU seconds, peak memory and error; writes results/gptq.json.

    python -m bench.gptq --peer PYTHON --before TREE --shape 4096x4096 --shape 14336x4096 --shape 6400x18304

Statistics of the same tokens, then the solve, as each tool calls its own functions. Inputs have a spectrum like hidden
states': noise on a few strong directions. Errors are ||(W - Q) x||^2 / ||W x||^2 on tokens that nobody has seen. Each tool
runs in a process of its own; shapes are [out x in].
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
DIRECTIONS = 64
UNSEEN = 2048  # tokens


def make(out: int, inputs: int, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    """Weight and tokens, bfloat16; and tokens that are kept back."""
    g = torch.Generator().manual_seed(0)
    directions = torch.randn(DIRECTIONS, inputs, generator=g) * 0.3

    def draw(count: int) -> Tensor:
        noise, strength = torch.randn(count, inputs, generator=g), torch.randn(count, DIRECTIONS, generator=g)
        return (noise + strength @ directions).bfloat16()

    weight = (torch.randn(out, inputs, generator=g) * inputs**-0.5).bfloat16()
    return {"weight": weight, "tokens": draw(tokens)}, draw(UNSEEN)


def error(weight: Tensor, made: Tensor, x: Tensor) -> float:
    lost, whole = 0.0, 0.0
    for rows, others in zip(weight.split(1024), made.split(1024), strict=True):
        lost += float((x.float() @ (rows.float() - others.float()).T).square().sum(dtype=torch.float64))
        whole += float((x.float() @ rows.float().T).square().sum(dtype=torch.float64))
    return lost / whole


def run(command: list[str], tree: Path, folder: Path) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    took: dict[str, Any] = json.loads((folder / "took.json").read_text())
    return took


def measure(shape: str, tokens: int, runs: int, tools: dict[str, tuple[list[str], Path]]) -> list[dict[str, Any]]:
    out, inputs = map(int, shape.split("x"))
    given, unseen = make(out, inputs, tokens)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(given, folder / "given.safetensors")
        for tool, (command, tree) in tools.items():
            count = "1" if tree != ROOT else str(runs)
            took = run([*command[:2], name, count, *command[2:]], tree, folder)
            made = load_file(folder / "made.safetensors")["value"]
            medians = {key: statistics.median(one[key] for one in took["runs"]) for key in ("statistics", "solve")}
            lost = error(given["weight"], made, unseen)
            rows.append(
                {"shape": shape, "tokens": tokens, "tool": tool, **medians, "peak_gb": took["peak_gb"], "error": lost}
            )
            print(rows[-1], flush=True)
    return rows


@click.command()
@click.option("--shape", "shapes", multiple=True, default=("4096x4096", "14336x4096"), show_default=True)
@click.option("--tokens", default=4096, show_default=True)
@click.option("--runs", default=3, show_default=True, help="Medians of so many; the first starts libraries.")
@click.option("--peer", default=None, help="An interpreter that has llm-compressor 0.14.")
@click.option(
    "--before", type=click.Path(path_type=Path, exists=True), default=None, help="Another tree of quantkit, run once."
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "gptq.json", show_default=True)
def main(shapes: tuple[str, ...], tokens: int, runs: int, peer: str | None, before: Path | None, out: Path) -> None:
    ours = [sys.executable, str(HERE / "peers" / "linear_quantkit.py")]
    tools: dict[str, tuple[list[str], Path]] = {"quantkit": (ours, ROOT)}
    if before:
        tools["quantkit before"] = (ours, before.resolve())
    if peer:
        theirs = [peer, str(HERE / "peers" / "linear_llm_compressor.py")]
        tools["llm-compressor"] = ([*theirs, "memoryless_minmax"], ROOT)
        tools["llm-compressor, mse"] = ([*theirs, "memoryless_mse"], ROOT)
    kept = json.loads(out.read_text())["runs"] if out.exists() else []
    rows = [row for row in kept if row["shape"] not in shapes]
    for shape in shapes:
        rows += measure(shape, tokens, runs, tools)
    table = Table("shape", "tool", "statistics s", "solve s", "peak GB", "error")
    for row in rows:
        seconds = (f"{row[key]:.2f}" for key in ("statistics", "solve"))
        table.add_row(row["shape"], row["tool"], *seconds, f"{row['peak_gb']:.2f}", f"{row['error']:.3e}")
    Console().print(table)
    machine = {"torch": torch.__version__, "processor": platform.processor() or platform.machine()}
    out.write_text(json.dumps({**machine, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
