"""Accuracy of every scheme and method on the bundled model, in pairs on the same text; writes results/accuracy.json.

Goals: INT4 g128 with GPTQ has at most 0.7 times the mean KL of RTN; FP8_DYNAMIC at most 0.4 times that of INT4 RTN.
GPTQ runs with several calibration seeds, since a reseed moves KL by some per cent.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

import quantkit
from quantkit.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
RUNS: dict[str, list[Recipe]] = {
    "W4A16 RTN": [Recipe(scheme="W4A16", method="rtn")],
    "W4A16 GPTQ": [Recipe(scheme="W4A16", seed=seed) for seed in range(3)],
    "W4A16_ASYM RTN": [Recipe(scheme="W4A16_ASYM", method="rtn")],
    "W4A16_ASYM GPTQ": [Recipe(scheme="W4A16_ASYM", seed=seed) for seed in range(3)],
    **{
        f"experts W4A16 GPTQ, attention and shared {rest}": [
            Recipe(attention=rest, shared_experts=rest, seed=seed) for seed in range(3)
        ]
        for rest in ("FP8_DYNAMIC", "W8A8", "W8A16")
    },
    "FP8_DYNAMIC": [Recipe(scheme="FP8_DYNAMIC")],
    "FP8_BLOCK": [Recipe(scheme="FP8_BLOCK")],
    "FP8 (static)": [Recipe(scheme="FP8", seed=seed) for seed in range(3)],
    "W8A8": [Recipe(scheme="W8A8")],
    "W8A16": [Recipe(scheme="W8A16")],
}


def measure(model: Path, recipe: Recipe, windows: int, text: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        record = quantkit.quantize(model, Path(folder) / "out", recipe)
        result = quantkit.evaluate(Path(folder) / "out", model, text, windows=windows)
    return {
        "kl_mean": result["kl"]["mean"],
        "kl_mean_ci95": result["ci95"]["kl.mean"],
        "kl_p99": result["kl"]["p99"],
        "perplexity": result["perplexity"],
        "top1_agreement": result["top1_agreement"],
        "router_agreement": result["router_agreement"],
        "output_bytes": record["output_bytes"],
        "fallbacks": len(record["fallbacks"]),
    }


@click.command()
@click.option("--model", type=click.Path(path_type=Path), default=ROOT / "examples" / "tiny-hunyuan")
@click.option("--windows", default=64, help="Windows of 512 held-out tokens.")
@click.option("--text", default="stdlib-held-out")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "accuracy.json")
@click.option("--only", multiple=True, type=click.Choice(list(RUNS)), help="These rows; the others stay as OUT has them.")
def main(model: Path, windows: int, text: str, out: Path, only: tuple[str, ...]) -> None:
    kept = json.loads(out.read_text())["runs"] if only else {}
    wanted = [name for name in RUNS if name not in kept or name in only]
    measured = {name: [measure(model, recipe, windows, text) for recipe in RUNS[name]] for name in wanted}
    rows = {name: measured[name] if name in measured else kept[name] for name in RUNS}
    median = {name: statistics.median(row["kl_mean"] for row in runs) for name, runs in rows.items()}
    goals = {
        "INT4 GPTQ / INT4 RTN <= 0.7": median["W4A16 GPTQ"] / median["W4A16 RTN"],
        "FP8_DYNAMIC / INT4 RTN <= 0.4": median["FP8_DYNAMIC"] / median["W4A16 RTN"],
    }
    table = Table(title=f"{model.name}, {windows} windows of {text}")
    for column in ("run", "mean KL (median of seeds)", "of RTN", "KL p99", "perplexity", "top-1", "router"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for name, runs in rows.items():
        first = runs[0]
        cells = [f"{median[name]:.5f}", f"{median[name] / median['W4A16 RTN']:.3f}", f"{first['kl_p99']:.4f}"]
        cells += [f"{first['perplexity']['quantized']:.3f}", f"{first['top1_agreement']:.2%}"]
        table.add_row(name, *cells, f"{first['router_agreement']:.2%}")
    table.caption = "; ".join(f"{goal}: {value:.3f}" for goal, value in goals.items())
    Console().print(table)
    data = {"torch": torch.__version__, "windows": windows, "text": text, "goals": goals, "runs": rows}
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
