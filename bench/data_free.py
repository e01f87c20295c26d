"""Quantizing without calibration: quantkit beside llm-compressor and beside copying; writes results/data_free.json.

    python bench/data_free.py [--matrices 8] [--threads 1] [--peer PYTHON] [--rounds 3]

The model is random matrices of 14336 x 4096 under an architecture that nobody knows. Each way is a process of its own; told
are its CPU seconds, which a busy machine changes less than the wall, the wall, and its largest resident set. quantkit's
include the checks of what it wrote against its source. peer: a Python with llm-compressor.
`copy, hash, write half`: the source is read, hashed and half of it written: what nobody can do without.
"""

from __future__ import annotations

import json
import os
import shutil
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
from safetensors.torch import save_file

RESULTS = Path(__file__).parent / "results"
SHAPE = (14336, 4096)
QUANTKIT = """
import sys
import torch
torch.set_num_threads(int(sys.argv[4]))
from quantkit.job.pipeline import quantize
from quantkit.recipe import Recipe
quantize(sys.argv[1], sys.argv[2], Recipe(scheme=sys.argv[3], method="rtn", linears=("*_proj",)), device="cpu")
"""
PEER = """
import sys
import torch
torch.set_num_threads(int(sys.argv[4]))
from llmcompressor import model_free_ptq
model_free_ptq(sys.argv[1], sys.argv[2], scheme=sys.argv[3], max_workers=int(sys.argv[4]), device="cpu")
"""
COPY = """
import hashlib, os, sys
from pathlib import Path
Path(sys.argv[2]).mkdir()
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    digest = hashlib.sha256()
    with open(path, "rb") as source, open(Path(sys.argv[2]) / path.name, "wb") as target:
        while data := source.read(1 << 20):
            digest.update(data)
            target.write(data[: len(data) // 2])
        target.flush()
        os.fsync(target.fileno())
"""
MEASURE = """
import json, os, resource, subprocess, sys, time
start = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"status": done.returncode, "said": done.stderr[-2000:], "cpu_seconds": usage.ru_utime + usage.ru_stime,
                  "wall_seconds": time.perf_counter() - start, "peak_mb": usage.ru_maxrss * 1024 / 1e6}))
"""


def write_model(folder: Path, matrices: int) -> int:
    """Random matrices, two to a shard; its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "of_matrices", "torch_dtype": "bfloat16"}))
    generator, places, total = torch.Generator().manual_seed(0), dict[str, str](), 0
    for shard in range(-(-matrices // 2)):
        tensors = {}
        for i in range(2 * shard, min(2 * shard + 2, matrices)):
            tensors[f"layers.{i}.up_proj.weight"] = (torch.randn(SHAPE, generator=generator) * 0.02).bfloat16()
        save_file(tensors, folder / f"part-{shard}.safetensors", metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, f"part-{shard}.safetensors")
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def measured(command: list[str], threads: int) -> dict[str, float]:
    """What a command costs. Raises click.ClickException with its last words when it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], check=True, capture_output=True, text=True, env=env)
    told: dict[str, Any] = json.loads(done.stdout)
    if told.pop("status"):
        raise click.ClickException(f"{command[0]}: {told['said']}")
    del told["said"]
    return told


@click.command()
@click.option("--matrices", default=8, type=click.IntRange(1))
@click.option("--threads", default=1, type=click.IntRange(1))
@click.option("--rounds", default=3, type=click.IntRange(1))
@click.option("--peer", metavar="PYTHON", help="A Python with llm-compressor 0.14.")
@click.option("--out", default=RESULTS / "data_free.json", type=click.Path(path_type=Path))
def main(matrices: int, threads: int, rounds: int, peer: str | None, out: Path) -> None:
    """Ways in turn, `rounds` times; medians, and ratios within a round."""
    with tempfile.TemporaryDirectory() as scratch:
        model, target = Path(scratch) / "model", Path(scratch) / "out"
        size = write_model(model, matrices)
        ways: dict[str, list[str]] = {"copy, hash, write half": [sys.executable, "-c", COPY, str(model), str(target)]}
        for scheme in ("FP8_DYNAMIC", "W4A16"):
            arguments = [str(model), str(target), scheme, str(threads)]
            ways[f"quantkit {scheme}"] = [sys.executable, "-c", QUANTKIT, *arguments]
            if peer:
                ways[f"llm-compressor {scheme}"] = [peer, "-c", PEER, *arguments]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, command in ways.items():
                runs[name].append(measured(command, threads))
                shutil.rmtree(target)
    rows = {name: {key: statistics.median(run[key] for run in each) for key in each[0]} for name, each in runs.items()}
    for name, row in rows.items():
        against = name.replace("quantkit", "llm-compressor")
        if against != name and against in runs:
            pairs = zip(runs[against], runs[name], strict=True)
            row["times_peer"] = statistics.median(theirs["cpu_seconds"] / mine["cpu_seconds"] for theirs, mine in pairs)
    result = {"source_bytes": size, "threads": threads, "rounds": rounds, "ways": rows}
    out.write_text(json.dumps(result, indent=2) + "\n")
    table = Table(title=f"{size / 1e9:.2f} GB, {threads} threads, medians of {rounds}")
    for column in ("way", "CPU s", "wall s", "peak MB", "times llm-compressor"):
        table.add_column(column)
    for name, row in rows.items():
        times = f"{row['times_peer']:.2f}" if "times_peer" in row else ""
        table.add_row(name, *(f"{row[key]:.1f}" for key in ("cpu_seconds", "wall_seconds", "peak_mb")), times)
    Console().print(table)


if __name__ == "__main__":
    main()
