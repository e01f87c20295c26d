"""What learned rounding gives beside GPTQ at the same bits and on the same tokens; writes results/learned_<model>.json.

    python -m bench.learned --samples 256 --text stdlib-held-out --text wikitext.txt --only gptq --only learned

Each row is quantized once, timed in seconds of the processor, and judged on every text; `of GPTQ` is the geometric mean over
texts of the ratio of mean KL.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
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
MIX = {"attention": "W8A16", "shared_experts": "W8A16"}
ROWS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "learned, plain squared error": {"method": "learned", "fisher_tokens": 0},
    "learned": {"method": "learned"},
    "learned, then tuned": {"method": "learned", "tune": True},
    "attention and shared experts learned": {"effort": "default"},
    "experts gptq, the rest W8A16": {**MIX, "effort": "fast"},
    "experts learned, the rest W8A16": {**MIX, "method": "learned"},
}
BASE = {name: "experts gptq, the rest W8A16" if "W8A16" in name else "gptq" for name in ROWS}


def measure(model: Path, recipe: Recipe, texts: tuple[str, ...], windows: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        begun, out = time.process_time(), Path(folder) / "out"
        record = quantkit.quantize(model, out, recipe)
        row: dict[str, Any] = {
            "cpu_seconds": round(time.process_time() - begun, 1),
            "peak_mb": record["peak_memory_bytes"] // 10**6,
        }
        row |= {"learning": record["learning"]} if "learning" in record else {}
        found = {Path(text).stem: quantkit.evaluate(out, model, text, windows=windows, seq_len=512) for text in texts}
    row["texts"] = {
        name: {"kl_mean": one["kl"]["mean"], "kl_mean_ci95": one["ci95"].get("kl.mean"), "kl_p99": one["kl"]["p99"]}
        for name, one in found.items()
    }
    return row


def ratio(row: dict[str, Any], base: dict[str, Any]) -> float:
    logs = [math.log(row["texts"][text]["kl_mean"] / base["texts"][text]["kl_mean"]) for text in row["texts"]]
    return math.exp(sum(logs) / len(logs))


@click.command()
@click.option("--model", type=click.Path(path_type=Path), default=ROOT / "examples" / "tiny-hunyuan")
@click.option("--calibration", default="stdlib", show_default=True)
@click.option("--text", "texts", multiple=True, default=("stdlib-held-out",), show_default=True)
@click.option("--samples", default=256, show_default=True, help="Windows of 512 tokens.")
@click.option("--windows", default=32, show_default=True, help="Held-out windows of a text.")
@click.option("--seed", default=0, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(ROWS)))
def main(
    model: Path, calibration: str, texts: tuple[str, ...], samples: int, windows: int, seed: int, only: tuple[str, ...]
) -> None:
    same = {"calibration": calibration, "samples": samples, "seed": seed}
    asked = {**same, "calibration": Path(calibration).name, "windows": windows, "torch": torch.__version__}
    rows: dict[str, dict[str, Any]] = {}
    for name in only or ROWS:
        rows[name] = measure(model, Recipe.of({**ROWS[name], **same}), texts, windows)
        if BASE[name] in rows:
            rows[name]["of_gptq"] = ratio(rows[name], rows[BASE[name]])
        RESULTS.joinpath(f"learned_{model.name}.json").write_text(json.dumps({**asked, "rows": rows}, indent=1) + "\n")
    table = Table("method", *(f"KL {Path(text).stem}" for text in texts), "of GPTQ", "CPU s", "peak MB", title=model.name)
    for name, row in rows.items():
        cells = [f"{one['kl_mean']:.5f}" for one in row["texts"].values()]
        share = f"{row['of_gptq']:.3f}" if "of_gptq" in row else ""
        table.add_row(name, *cells, share, f"{row['cpu_seconds']:.0f}", f"{row['peak_mb']}")
    Console().print(table)


if __name__ == "__main__":
    main()
