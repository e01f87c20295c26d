"""`make demo`: quantize the bundled model with the command line, by the recommended recipe and to FP8, measure both, print
one table.

Calibration text is the standard library; the text measured on is modules of it that neither the model's training nor the
calibration has seen. Results stay in .demo/.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from quantkit.commands.tables import console, print_tables

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-hunyuan"
OUT = ROOT / ".demo"
RUNS = {
    "INT4 experts, INT8 rest": ["--experts", "W4A16", "--attention", "W8A16", "--shared-experts", "W8A16"],
    "FP8 (FP8_DYNAMIC)": ["--scheme", "FP8_DYNAMIC"],
}
FIGURES = (
    *(
        "size",
        "bits per weight",
        "bits per expert weight",
        "perplexity",
        "KL(BF16 || model), mean",
        "KL(BF16 || model), p99",
    ),
    *("top-1 agreement", "router agreement", "seconds to quantize", "peak memory"),
)


def quantkit(*arguments: object) -> dict[str, Any]:
    """Run the command line, let its progress through, return the JSON it prints."""
    command = [sys.executable, "-m", "quantkit.cli", *map(str, arguments), "--json"]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    if result.returncode:
        sys.exit(result.returncode)
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def column(record: dict[str, Any], found: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """One column of the table: what was saved, what was lost, what it cost."""
    ppl, kl = result["perplexity"], result["kl"]
    return [
        f"{found['total']['bytes'] / 1e6:.1f} MB",
        f"{found['total']['bits_per_weight']:.2f}",
        f"{found['roles']['experts']['bits_per_weight']:.2f}",
        f"{ppl['baseline']:.3f} -> {ppl['quantized']:.3f}",
        f"{kl['mean']:.4f} nats",
        f"{kl['p99']:.4f} nats",
        f"{result['top1_agreement']:.1%}",
        f"{result['router_agreement']:.1%}",
        f"{record['wall_seconds_of_last_run']:.0f} s",
        f"{record['peak_memory_bytes'] / 1e6:.0f} MB",
    ]


def main() -> None:
    screen = console()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    base = quantkit("inspect", MODEL)["total"]
    columns = {"BF16": [f"{base['bytes'] / 1e6:.1f} MB", f"{base['bits_per_weight']:.2f}", "16.00", *[""] * 7]}
    tokens = 0
    for name, options in RUNS.items():
        out = OUT / name.split(" ")[0]
        screen.print(f"{name}: quantkit quantize examples/tiny-hunyuan {' '.join(options)}", soft_wrap=True)
        record = quantkit("quantize", MODEL, "-o", out, *options)
        result = quantkit("eval", out, "--baseline", MODEL)
        columns[name] = column(record, quantkit("inspect", out), result)
        tokens = result["tokens"]
    table = Table("", title="tiny-hunyuan: cross-layer attention, 16 experts top-1 and a shared one")
    for name in columns:
        table.add_column(name, no_wrap=True)
    for cells in zip(FIGURES, *columns.values(), strict=True):
        table.add_row(*cells)
    table.caption = f"{tokens:,} tokens of Python modules that neither training nor calibration has seen"
    print_tables(table, screen)


if __name__ == "__main__":
    main()
