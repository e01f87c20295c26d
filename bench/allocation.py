"""Bits where they count: what an allocation is predicted to lose, what it loses, and what the same method loses without it.

    python -m bench.allocation [--model MODEL]

Sensitivities are measured on every other document of a held-out text, the results on the rest. Goals: 4.5 bits by
allocation lose at most half of INT4 everywhere, and each prediction is within 20 % of what is measured. Writes
results/allocation_NAME.json.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

import quantkit
from quantkit.allocate.choose import Target, allocate
from quantkit.allocate.groups import named
from quantkit.allocate.measuring import SCHEMES, Extent, measure, measuring_of
from quantkit.allocate.sensitivity import Sensitivity, combined
from quantkit.calib.documents import read_documents
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.commands.tables import console, print_tables
from quantkit.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"


def halves(text: str, folder: Path) -> tuple[str, str]:
    """Every other document of a text, as two files."""
    documents = [document for document in read_documents(text) if isinstance(document, str)]
    names = []
    for number in range(2):
        rows = (json.dumps({"text": document}) for document in documents[number::2])
        (folder / f"half-{number}.jsonl").write_text("\n".join(rows) + "\n")
        names.append(str(folder / f"half-{number}.jsonl"))
    return names[0], names[1]


def judge(model: Path, recipe: Recipe, text: str, windows: int, folder: Path) -> dict[str, Any]:
    out = folder / "out"
    record = quantkit.quantize(model, out, recipe)
    found = quantkit.evaluate(out, model, text, windows=windows)
    for path in sorted(out.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    out.rmdir()
    return {"kl_mean": found["kl"]["mean"], "kl_mean_ci95": found["ci95"].get("kl.mean"), "bytes": record["output_bytes"]}


def rows_of(
    model: Path, measured: Sensitivity, bits: list[float], held: str, windows: int, folder: Path
) -> list[dict[str, Any]]:
    uniform = {**judge(model, Recipe(scheme="W4A16"), held, windows, folder), "run": "W4A16 everywhere"}
    mixed = {**judge(model, Recipe(), held, windows, folder), "run": "W4A16 experts, W8A16 rest"}
    found = [uniform, mixed]
    for row, anchor in zip(found, measured.anchors, strict=True):
        losses = [measured.kl(group, scheme) for group, scheme in anchor.schemes.items()]
        row |= {"predicted_kl": combined(losses, measured.exponent)}
    reader = CheckpointReader(model)
    for target in bits:
        allocation = allocate(reader, Recipe(), measured, Target(bits=target))
        row = judge(model, allocation.recipe, held, windows, folder)
        counts = {scheme: list(allocation.chosen.values()).count(scheme) for scheme in measured.schemes}
        found.append(
            {
                **row,
                "run": f"{target:g} bits by allocation",
                "bits": allocation.point.bits,
                "predicted_kl": allocation.point.kl,
                "groups": counts,
            }
        )
    return found


@click.command()
@click.option("--model", type=click.Path(path_type=Path, exists=True), default=ROOT / "examples" / "tiny-hunyuan")
@click.option("--text", default="stdlib-held-out", show_default=True)
@click.option("--bits", default="4.3,4.5,5", show_default=True)
@click.option("--sample", default=24, show_default=True, help="Windows on which sensitivities are measured.")
@click.option("--windows", default=32, show_default=True, help="Windows on which the results are.")
@click.option("--sensitivity", type=click.Path(path_type=Path), help="A file of sensitivities: measured there if it is not.")
def main(model: Path, text: str, bits: str, sample: int, windows: int, sensitivity: Path | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sensed, held = halves(text, folder)
        file, reader = sensitivity or folder / "sensitivity.json", CheckpointReader(model)
        begun = time.process_time()
        if not file.exists():
            extent = Extent(tuple(named(name) for name in SCHEMES), sensed, sample)
            measure(reader, measuring_of(reader, Recipe(), extent), file, "cpu")
        cpu, measured = time.process_time() - begun, Sensitivity.read(file)
        rows = rows_of(model, measured, [float(part) for part in bits.split(",")], held, windows, folder)
    half = next(row for row in rows if row["run"].startswith("4.5 "))["kl_mean"] / rows[0]["kl_mean"]
    predictions = [row["predicted_kl"] / row["kl_mean"] for row in rows]
    goals = {
        "4.5 bits / W4A16 everywhere <= 0.5": half,
        "predicted / measured, farthest from 1, within 0.2": max(predictions, key=lambda ratio: abs(ratio - 1)),
    }
    table = Table("run", "MB", "bits", "predicted KL", "measured KL", "predicted / measured", title=model.name)
    for row in rows:
        cells = [f"{row['bytes'] / 1e6:.2f}", f"{row['bits']:.3f}" if "bits" in row else ""]
        cells += [f"{row['predicted_kl']:.5f}", f"{row['kl_mean']:.5f}", f"{row['predicted_kl'] / row['kl_mean']:.2f}"]
        table.add_row(row["run"], *cells)
    table.caption = "; ".join(f"{goal}: {value:.3f}" for goal, value in goals.items())
    print_tables(table, console())
    result = {
        "model": model.name,
        "text": text,
        "torch": torch.__version__,
        "sample_tokens": measured.tokens,
        "windows": windows,
        "exponent": measured.exponent,
        "cpu_seconds": cpu or None,
        "goals": goals,
        "runs": rows,
        "sensitivity": [{"name": row.name, "kl": row.kl} for row in measured.groups],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"allocation_{model.name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
