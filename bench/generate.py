"""Tokens per second of one prompt, INT4 and FP8 against BF16 in the same runtime; writes results/generate.json.

Goal: INT4 at least 2.5 times BF16, on a Hunyuan-Large-shaped model of at least 1 GB of BF16 weights (random: time does
not depend on them). The models take turns, in rounds of some tokens; medians of the rounds are compared.
"""

from __future__ import annotations

import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from memory import write_model
from rich.console import Console
from rich.table import Table

import quantkit
from quantkit.recipe import Recipe

RESULTS = Path(__file__).parent / "results"
RECIPES = {"INT4": Recipe(scheme="W4A16", method="rtn"), "FP8": Recipe(scheme="FP8_DYNAMIC")}


def seconds_per_token(models: dict[str, Any], rounds: int, tokens: int) -> dict[str, float]:
    """Median over rounds; every round gives each model a fresh prompt of 8 tokens and counts what follows the first."""
    measured: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():  # a long prompt meets every expert, so that all are read and packed
        model.logits(torch.randint(0, model.spec.vocab, (1, 1024), generator=torch.Generator().manual_seed(0)), last=1)
    for i in range(rounds + 1):
        for name, model in models.items():
            stream = model.stream(torch.arange(8 * i, 8 * i + 8)[None])
            next(stream)
            start = time.perf_counter()
            for _ in islice(stream, tokens):
                pass
            if i:  # one round warms up
                measured[name].append((time.perf_counter() - start) / tokens)
    return {name: median(values) for name, values in measured.items()}


@click.command()
@click.option("--width", default=2048, help="Hidden and expert size.")
@click.option("--layers", default=4)
@click.option("--rounds", default=15)
@click.option("--tokens", default=16)
@click.option("--threads", default=0, help="0: torch's default.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "generate.json")
def main(width: int, layers: int, rounds: int, tokens: int, threads: int, out: Path) -> None:
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        weights = write_model(Path(folder) / "BF16", layers, width)
        for name, recipe in RECIPES.items():
            quantkit.quantize(Path(folder) / "BF16", Path(folder) / name, recipe)
        models = {name: quantkit.load(Path(folder) / name) for name in ("BF16", *RECIPES)}
        kernels = {name: sorted({str(row["kernel"]) for row in model.explain()}) for name, model in models.items()}
        seconds = seconds_per_token(models, rounds, tokens)
    speed_up = {name: seconds["BF16"] / value for name, value in seconds.items()}
    table = Table("weights", "kernel", "ms a token", "tokens/s", "of BF16", title=f"{weights / 1e9:.2f} GB, {layers} layers")
    for name, value in seconds.items():
        cells = (f"{value * 1e3:.2f}", f"{1 / value:.1f}", f"{speed_up[name]:.2f}x")
        table.add_row(name, ", ".join(kernels[name]), *cells)
    table.caption = "goal: INT4 at least 2.5x BF16" + ("" if speed_up["INT4"] >= 2.5 else ": missed")
    Console().print(table)
    sizes = {"width": width, "layers": layers, "weights_bytes": weights, "threads": torch.get_num_threads()}
    data = {**sizes, "torch": torch.__version__, "seconds_per_token": seconds, "of_bf16": speed_up, "kernels": kernels}
    out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
