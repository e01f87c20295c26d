"""Planning models of true size from their headers: seconds, peak memory, parameters; writes results/plan_scale.json.

Goal: under 10 s and 500 MB for each. The checkpoints are sparse files with honest headers (tests/helpers/sparse.py), and
each run of `quantkit quantize --dry-run` is a process of its own. Run it from the root: python -m bench.plan_scale
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from tests.helpers.architectures import RELEASED
from tests.helpers.sparse import write_sparse

RESULTS = Path(__file__).parent / "results"
TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "tiny-hunyuan" / "tokenizer.json"
RUN = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
RUN += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)"


def plan(name: str) -> dict[str, Any]:
    """One dry run: INT4 with GPTQ, groups of 32, which every one of these models takes."""
    with tempfile.TemporaryDirectory() as folder:
        source = write_sparse(Path(folder) / "model", RELEASED[name])
        (Path(folder) / "model" / "tokenizer.json").write_bytes(TOKENIZER.read_bytes())
        command = [sys.executable, "-m", "quantkit.cli", "quantize", f"{folder}/model", "-o", f"{folder}/out"]
        command = [sys.executable, "-c", RUN, *command, "--dry-run", "--json", "--scheme", "W4A16", "--group-size", "32"]
        begun = time.perf_counter()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - begun
    found = json.loads(done.stdout)
    return {
        "model": name,
        "parameters": found["parameters"],
        "source_gb": source / 1e9,
        "output_gb": found["output_bytes"] / 1e9,
        "scratch_gb": found["tape_bytes"] / 1e9,
        "seconds": seconds,
        "peak_mb": int(done.stderr.split()[-1]) * 1024 / 1e6,
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "plan_scale.json")
def main(out: Path) -> None:
    rows = [plan(name) for name in RELEASED]
    table = Table(title="quantkit quantize --dry-run, INT4 with groups of 32")
    table.add_column("model")
    for column in ("parameters", "BF16", "INT4", "scratch", "seconds", "memory"):
        table.add_column(column, justify="right")
    for row in rows:
        sizes = [f"{row[key]:.1f} GB" for key in ("source_gb", "output_gb", "scratch_gb")]
        spent = f"{row['seconds']:.1f}", f"{row['peak_mb']:.0f} MB"
        table.add_row(row["model"], f"{row['parameters'] / 1e9:.2f} B", *sizes, *spent)
    Console().print(table)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"torch": torch.__version__, "models": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
