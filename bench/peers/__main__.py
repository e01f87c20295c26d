"""quantkit beside other tools: the same model, calibration windows, bits and groups; writes results/peers_<name>.json.

    python -m bench.peers --model MODEL --peer llm-compressor=PYTHON --peer gptqmodel=PYTHON --peer auto-round=PYTHON \\
        --group-size 64 --text held_out.txt

Each tool runs in a process of its own, with the interpreter that has it (their pins differ), on the same windows of
calibration tokens. What it writes is read by quantkit and judged on the same held-out tokens by one reference model:
KL(BF16 || INT4) in nats. A tool that fails is a row that says how.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from rich.table import Table

import quantkit
from quantkit.calib.documents import read_documents
from quantkit.calib.tokenizer import load_text_tokenizer
from quantkit.calib.tokens import calibration_windows
from quantkit.commands.tables import console, print_tables
from quantkit.errors import QuantkitError

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"
METHODS = {
    "quantkit": ("rtn", "gptq", "gptq, attention FP8"),
    "llm-compressor": ("gptq", "gptq+imatrix"),
    "gptqmodel": ("gptq",),
    "auto-round": ("50", "200"),
}
SEED = 0


@dataclass(frozen=True)
class Job:
    """What every tool is given."""

    model: Path
    calibration: str
    samples: int
    seq_len: int
    group_size: int
    threads: int


def command(job: Job, tool: str, method: str, python: str, windows: Path, out: Path) -> list[str]:
    if tool != "quantkit":
        given = (job.model, windows, out, job.group_size, method, job.threads)
        return [python, str(HERE / f"run_{tool.replace('-', '_')}.py"), *map(str, given)]
    options = {
        "--scheme": "W4A16",
        "--calibration": job.calibration,
        "--samples": job.samples,
        "--seq-len": job.seq_len,
        "--group-size": job.group_size,
        "--seed": SEED,
        **({"--attention": "FP8_DYNAMIC"} if method.endswith("FP8") else {"--method": method}),
    }
    flat = [str(part) for pair in options.items() for part in pair]
    return [python, "-m", "quantkit.cli", "quantize", str(job.model), "-o", str(out), *flat]


def run(what: list[str], threads: int, log: Path, limit: float) -> dict[str, Any]:
    """Seconds by the wall and of the processor, peak memory in MB and exit status of one process."""
    tool = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads), "GPTQMODEL_CPU_WORKERS": str(max(2, threads))}
    begun, peak = time.monotonic(), 0
    with log.open("w") as to:
        process = subprocess.Popen(what, stdout=to, stderr=subprocess.STDOUT, env={**os.environ, **tool}, cwd=log.parent)
        pid, status, usage = 0, 0, None
        while not pid or usage is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.1)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if not pid and time.monotonic() - begun > limit:
                process.kill()
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "seconds": time.monotonic() - begun,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mb": peak / 1000,
        "exit_status": process.returncode,
    }


def resident(pid: int) -> int:
    """Peak memory of a process so far, in KB; 0 when it has ended. Its ru_maxrss begins with that of whoever started it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def version(tool: str, python: str) -> str:
    package = {"llm-compressor": "llmcompressor"}.get(tool, tool)
    ask = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()


def checkpoint(folder: Path) -> Path:
    """The folder with the config: some tools write one folder deeper."""
    found = sorted(folder.rglob("config.json"), key=lambda path: len(path.parts))
    return found[0].parent if found else folder


def judge(out: Path, job: Job, texts: tuple[str, ...], seq_len: int, windows: int) -> dict[str, Any]:
    rows = {}
    for text in texts:
        found = quantkit.evaluate(out, job.model, text, seq_len=seq_len, windows=windows)
        rows[Path(text).stem] = {
            "kl_mean": found["kl"]["mean"],
            "kl_mean_ci95": found["ci95"].get("kl.mean"),  # a few documents give none
            "kl_p99": found["kl"]["p99"],
            "perplexity": found["perplexity"],
            "top1_agreement": found["top1_agreement"],
            "router_agreement": found.get("router_agreement"),
        }
    return rows


def complaint(log: Path) -> str:
    """The error that ended a run, or its last line; without the advice that follows."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*Error: ", line)]
    return (errors or lines or [""])[-1].split(". ")[0][:200]


def show(rows: list[dict[str, Any]], texts: list[str], title: str) -> Table:
    names = ("tool", "method", *(f"KL {text}" for text in texts), "CPU s", "peak MB", "MB", "error")
    table = Table(*names, title=title)
    for row in rows:
        cells = [f"{row['texts'][text]['kl_mean']:.4f}" if "texts" in row else "" for text in texts]
        size = f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else ""
        cells += [f"{row['cpu_seconds']:.0f}", f"{row['peak_mb']:.0f}", size, row.get("error", "")]
        table.add_row(row["tool"], row["method"], *cells)
    return table


@click.command()
@click.option("--model", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--peer", "peers", multiple=True, help="NAME=PYTHON, an interpreter that has it; quantkit always runs.")
@click.option("--only", multiple=True, help="TOOL/METHOD: these only. [default: all]")
@click.option("--calibration", default="stdlib", show_default=True)
@click.option("--text", "texts", multiple=True, default=("stdlib-held-out",), show_default=True)
@click.option("--samples", default=64, show_default=True)
@click.option("--seq-len", default=512, show_default=True)
@click.option("--windows", default=64, show_default=True, help="Held-out windows of a text.")
@click.option("--group-size", default=128, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--limit", default=3600.0, show_default=True, help="Seconds that a tool may take.")
@click.option("--name", default=None, help="[default: the model's folder]")
def main(
    model: Path,
    peers: tuple[str, ...],
    only: tuple[str, ...],
    calibration: str,
    texts: tuple[str, ...],
    samples: int,
    seq_len: int,
    windows: int,
    group_size: int,
    threads: int,
    limit: float,
    name: str | None,
) -> None:
    if Path(calibration).is_file():  # the tools run elsewhere: some write logs where they stand
        calibration = str(Path(calibration).resolve())
    pythons = {"quantkit": sys.executable, **dict(peer.partition("=")[::2] for peer in peers)}
    if unknown := pythons.keys() - METHODS.keys():
        raise click.UsageError(
            f"no script for {', '.join(sorted(unknown))}: --peer takes {', '.join(METHODS)}, as NAME=PYTHON"
        )
    names = [Path(text).stem for text in texts]
    job = Job(model.resolve(), calibration, samples, seq_len, group_size, threads)
    versions = {tool: version(tool, python) for tool, python in pythons.items()}
    ids = calibration_windows(load_text_tokenizer(model), read_documents(calibration), samples, seq_len, SEED)
    wanted = [(tool, method) for tool in pythons for method in METHODS[tool] if not only or f"{tool}/{method}" in only]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder) / "windows.json"
        given.write_text(json.dumps(ids.tolist()))
        for tool, method in wanted:
            out, log = Path(folder) / f"{tool}-{method}", Path(folder) / "log"
            took = run(command(job, tool, method, pythons[tool], given, out), threads, log, limit)
            row: dict[str, Any] = {"tool": tool, "method": method, **took}
            try:
                made = checkpoint(out)
                row["texts"] = judge(made, job, texts, seq_len, windows)
                row["bytes"] = sum(file.stat().st_size for file in made.glob("*.safetensors"))
            except QuantkitError as error:
                row["error"] = complaint(log) if took["exit_status"] else str(error)
            rows.append(row)
            print_tables(show(rows, names, f"{model.name}, W4A16 g{group_size}, {samples} x {seq_len} tokens"), console())
    asked = {**asdict(job), "model": model.name, "texts": names, "windows": windows}
    asked["calibration"], asked["versions"] = Path(calibration).name, versions
    (RESULTS / f"peers_{name or model.name}.json").write_text(json.dumps({**asked, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
