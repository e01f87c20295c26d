"""Bytes of weights that `quantkit.evaluate` reads: `python bench/eval_reads.py [--against OTHER_CHECKOUT]`.

The bundled model in INT4 beside its source, for more and more windows; each run is a process of its own, and counts the
tensors that it takes out of shards while it evaluates. Both folders are hashed once besides, to say what was evaluated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

import quantkit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "eval_reads.json"
MODEL = ROOT / "examples" / "tiny-hunyuan"
# Runs with any checkout: the reader has had two homes.
RUN = """
import importlib, sys
import quantkit
out, model, windows = sys.argv[1:]
try:
    reader = importlib.import_module("quantkit.checkpoint.reader").CheckpointReader
except ImportError:
    reader = importlib.import_module("quantkit.formats.reader").CheckpointReader
taken, real = [], reader.tensor

def tensor(self, key):
    taken.append(self.entries[key].nbytes)
    return real(self, key)

reader.tensor = tensor
quantkit.evaluate(out, model, seq_len=512, windows=int(windows))
print(sum(taken))
"""


def reads(checkout: Path, out: Path, windows: int) -> int:
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", RUN, str(out), str(MODEL), str(windows)]
    done = subprocess.run(command, env=environment, cwd=out.parent, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout)


@click.command()
@click.option("--windows", default="8,64,256", show_default=True)
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="Another checkout of quantkit.")
def main(windows: str, against: Path | None) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        quantkit.quantize(MODEL, out, quantkit.Recipe(scheme="W4A16", method="rtn"), device="cpu")
        size = sum(path.stat().st_size for place in (MODEL, out) for path in place.glob("*.safetensors"))
        for count in map(int, windows.split(",")):
            row = {"windows": count, "bytes": reads(ROOT, out, count)}
            if against:
                row["before"] = reads(against.resolve(), out, count)
            rows.append(row)
            print(row, f"{row['bytes'] / size:.2f} of both models' {size:,} bytes")
    RESULTS.write_text(json.dumps({"model": MODEL.name, "shard_bytes": size, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
