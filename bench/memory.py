"""Peak memory of `quantkit quantize` with 4 and with 16 layers of one width; writes results/memory.json.

Goal: under 1.5 GB, and no growth with the number of layers. Each run is a process of its own; its peak resident set is
what the operating system reports for it. The weights are random: only sizes matter here.
"""

from __future__ import annotations

import json
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

from quantkit.model.registry import build_spec

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"


def write_model(folder: Path, layers: int, width: int, changes: dict[str, Any] | None = None) -> int:
    """A random checkpoint with the bundled model's tokenizer, one shard a layer; returns its bytes of weights.

    Hidden and expert size are `width`; `changes` are further fields of its config.json.
    """
    config = json.loads((ROOT / "examples" / "tiny-hunyuan" / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": width}
    config |= {"num_attention_heads": width // 64, "num_key_value_heads": width // 128, **(changes or {})}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((ROOT / "examples" / "tiny-hunyuan" / "tokenizer.json").read_bytes())
    generator, weight_map, total = torch.Generator().manual_seed(0), {}, 0
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for key, shape in build_spec(config, "bench").tensors().items():
        name = f"part-{key.split('.')[2] if 'layers' in key else 'outer'}.safetensors"
        value = torch.randn(shape, generator=generator) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)
        shards.setdefault(name, {})[key] = value.bfloat16()
        weight_map[key] = name
        total += value.numel() * 2
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def peak_of(command: list[str]) -> float:
    """Peak resident memory in MB of a command, which must succeed."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    result = subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.PIPE, text=True)
    return int(result.stdout) * 1024 / 1e6


@click.command()
@click.option("--width", default=256, help="Hidden and expert size.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "memory.json")
def main(width: int, out: Path) -> None:
    rows: list[dict[str, Any]] = []
    for layers in (4, 16):
        with tempfile.TemporaryDirectory() as folder:
            weights = write_model(Path(folder) / "model", layers, width)
            command = [sys.executable, "-m", "quantkit.cli", "quantize", f"{folder}/model", "-o", f"{folder}/out"]
            command += ["--scheme", "W4A16"]
            peak = peak_of([*command, "--quiet"])
        rows.append({"layers": layers, "checkpoint_mb": weights / 1e6, "peak_mb": peak})
    table = Table(title=f"peak memory of quantkit quantize (INT4, GPTQ, 128 x 512 tokens), width {width}")
    for column in ("layers", "checkpoint", "peak resident memory"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(str(row["layers"]), f"{row['checkpoint_mb']:.0f} MB", f"{row['peak_mb']:.0f} MB")
    table.caption = f"16 layers / 4 layers: {rows[1]['peak_mb'] / rows[0]['peak_mb']:.3f}"
    Console().print(table)
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps({"width": width, "torch": torch.__version__, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
