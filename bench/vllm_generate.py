"""Tokens per second of one prompt on the same INT4 checkpoint: quantkit beside vLLM on the CPU; writes
results/vllm_generate.json.

Goal: at least as fast as vLLM. The model has Hunyuan-A13B's architecture and random weights (time does not depend on them).
vLLM serves INT4 experts on a CPU only through AMD's zentorch, which rounds activations to INT8: quantkit's `w4a8` does the
same, `auto` keeps them in bfloat16. scripts/vllm_env.sh makes the environment whose python is asked for.

Each engine is a process of its own that waits for its turn; in a round each gives a prompt of 8 tokens one continuation of
`1` and one of `1 + tokens`: the difference is decoding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results"
GOAL = 1.0
SHAPE = {
    "architectures": ["HunYuanMoEV1ForCausalLM"],
    "model_type": "hunyuan_v1_moe",
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "moe_topk": 8,
    "use_cla": False,
    "tie_word_embeddings": True,
}
# Runs under vLLM's python. argv: folder. Reads "<round> <tokens>" lines, answers seconds.
VLLM = """
import sys, time
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=512, max_num_seqs=1, skip_tokenizer_init=True)
    from vllm.platforms import current_platform
    print("ready", type(current_platform).__name__, flush=True)
    for line in sys.stdin:
        i, tokens = map(int, line.split())
        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": list(range(8 * i, 8 * i + 8))}], how, use_tqdm=False)
        print("took", time.perf_counter() - start, flush=True)
"""
QUANTKIT = """
import sys, time
from itertools import islice
import torch, quantkit
model = quantkit.load(sys.argv[1], kernels=sys.argv[2])
print("ready", sorted({str(row["kernel"]) for row in model.explain()}), flush=True)
for line in sys.stdin:
    i, tokens = map(int, line.split())
    start = time.perf_counter()
    for _ in islice(model.stream(torch.arange(8 * i, 8 * i + 8)[None]), tokens):
        pass
    print("took", time.perf_counter() - start, flush=True)
"""


class Engine:
    """A process that generates when told. `ready` is what it says of itself once loaded."""

    def __init__(self, python: str, code: str, arguments: list[str], threads: int, log: Path) -> None:
        settings = {"OMP_NUM_THREADS": str(threads), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
        settings |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        command = [python, "-c", code, *arguments]
        self.log = log.open("w")
        self.process = subprocess.Popen(
            command, env=os.environ | settings, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.ready = self._answer("ready")

    def _answer(self, start: str) -> str:
        """The next line that begins so: vLLM also logs to standard output."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise click.ClickException(f"an engine stopped; the end of its log:\n{Path(self.log.name).read_text()[-2000:]}")

    def decode(self, i: int, tokens: int) -> float:
        """Seconds a token after the first."""
        assert self.process.stdin
        seconds = []
        for count in (1, 1 + tokens):
            print(i, count, file=self.process.stdin, flush=True)
            seconds.append(float(self._answer("took")))
        return (seconds[1] - seconds[0]) / tokens

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def compare(engines: dict[str, Engine], rounds: int, tokens: int) -> dict[str, list[float]]:
    """Milliseconds a token of each engine in each round, one after the other; the first round warms up."""
    measured: dict[str, list[float]] = {name: [] for name in engines}
    for i in range(rounds + 1):
        for name, engine in engines.items():
            value = engine.decode(i, tokens) * 1e3
            if i:
                measured[name].append(value)
    return measured


def make_model(folder: Path, layers: int) -> int:
    from memory import write_model

    import quantkit
    from quantkit.recipe import Recipe

    size = write_model(folder / "BF16", layers, 2048, {**SHAPE, "intermediate_size": 1536, "moe_intermediate_size": 1536})
    quantkit.quantize(folder / "BF16", folder / "INT4", Recipe(scheme="W4A16", method="rtn"))
    return size


@click.command()
@click.option("--vllm-python", required=True, help="The python of an environment made by scripts/vllm_env.sh.")
@click.option("--layers", default=4)
@click.option("--rounds", default=15)
@click.option("--tokens", default=32)
@click.option("--threads", default=len(os.sched_getaffinity(0)))
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "vllm_generate.json")
def main(vllm_python: str, layers: int, rounds: int, tokens: int, threads: int, out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = make_model(folder, layers)
        model, engines = str(folder / "INT4"), {}
        try:
            engines["vLLM"] = Engine(vllm_python, VLLM, [model], threads, folder / "vllm.log")
            for kernels in ("w4a8", "auto"):
                engines[f"quantkit {kernels}"] = Engine(
                    sys.executable, QUANTKIT, [model, kernels], threads, folder / f"{kernels}.log"
                )
            measured = compare(engines, rounds, tokens)
        finally:
            for engine in engines.values():
                engine.stop()
    rows: dict[str, dict[str, Any]] = {}
    for name, values in measured.items():
        ratio = median(theirs / ours for theirs, ours in zip(measured["vLLM"], values, strict=True))
        rows[name] = {"ms_per_token": median(values), "times_vllm": ratio, "kernel": engines[name].ready}
    table = Table(
        "engine", "ms a token", "of vLLM", "kernel", title=f"{weights / 1e9:.2f} GB of BF16, in INT4, {threads} threads"
    )
    for name, row in rows.items():
        table.add_row(name, f"{row['ms_per_token']:.2f}", f"{row['times_vllm']:.2f}x", row["kernel"])
    table.caption = f"goal: w4a8 at least {GOAL}x" + ("" if rows["quantkit w4a8"]["times_vllm"] >= GOAL else ": missed")
    Console().print(table)
    report = {
        "weights_bytes": weights,
        "layers": layers,
        "threads": threads,
        "date": time.strftime("%Y-%m-%d"),
        "engines": rows,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
