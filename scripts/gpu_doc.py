"""The figures of docs/gpu.md, from bench/gpu_roofline.py and bench/results/gpu_*.json: python scripts/gpu_doc.py writes
them, --check only compares."""

from __future__ import annotations

import json
import sys
from typing import Any

from measured import ROOT, write

sys.path.insert(0, str(ROOT / "bench"))
import gpu_roofline

MEASURED = ("bf16", "bf16 torch", "W4A16", "W4A16 triton", "W4A16 cuda", "FP8_DYNAMIC")


def predicted() -> list[str]:
    """Two layers on two GPUs, by the best kernel of each kind."""
    lines = [
        "Predicted by `bench/gpu_roofline.py`, to some 20 %: a layer of experts in W4A16, the share of a copy's bandwidth,",
        "and how many times as fast as a fused BF16 layer.",
        "",
        "| layer, GPU | tokens | Triton | CUDA |",
        "|---|---|---|---|",
    ]
    for layer in ("Hunyuan-Large", "Hunyuan-A13B"):
        for gpu in gpu_roofline.GPUS:
            for tokens, row in gpu_roofline.predictions(gpu, layer):
                cells = []
                for kind in ("Triton", "CUDA"):
                    mine = [p for name, p in row.items() if name.startswith(kind)]
                    best = min(mine, key=lambda p: p.microseconds, default=None)
                    cells.append(f"{best.microseconds:.0f} us, {best.of_bandwidth:.0%}, {best.of_bf16:.1f}x" if best else "")
                lines.append(f"| {layer}, {gpu} | {tokens} | {' | '.join(cells)} |")
    return lines


def measured(found: dict[str, Any]) -> list[str]:
    """Hunyuan-Large's experts on one GPU, and the goals."""
    title = f"Measured on {found['gpu']} (torch {found['torch']}, Triton {found['triton']})"
    tiles = "tuned tiles" if found["tuned"] else "the tiles that were there"
    bandwidth = f"{found['peaks']['bandwidth'] / 1e12:.2f} TB/s"
    lines = [
        f"{title}, with {tiles}: a layer of Hunyuan-Large's experts in microseconds, the share of the",
        f"{bandwidth} of a copy, and how many times as fast as the faster layer in BF16.",
        "",
        f"| tokens | {' | '.join(MEASURED)} |",
        f"|---{'|---' * len(MEASURED)}|",
    ]
    rows = {(row["tokens"], row["kernel"]): row for row in found["rows"] if row["layer"] == "moe"}
    for tokens in sorted({tokens for tokens, _ in rows}):
        cells = []
        for name in MEASURED:
            row = rows.get((tokens, name))
            cells.append(f"{row['median_us']:.0f}, {row['of_bandwidth']:.0%}, {row['of_bf16']:.1f}x" if row else "")
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    words = {True: "met", False: "missed", None: "not measured"}
    lines += ["", *(f"* {words[goal['met']]}: {goal['goal']} (worst {goal['worst']})" for goal in found["goals"])]
    return lines


if __name__ == "__main__":
    results = sorted((ROOT / "bench" / "results").glob("gpu_*.json"))
    each = [["", *measured(json.loads(path.read_text("utf-8")))] for path in results]
    seen = [line for lines in each for line in lines] or ["", "Measured: nothing yet. No figure here was seen on a GPU."]
    write("gpu", [*predicted(), *seen])
