"""Speed of the CPU kernels on one matrix against torch's and onnxruntime's; writes results/cpu_kernels.json.

Goals for W4A16 g128: one token at 80 % of the machine's read bandwidth and 1.5x torch's int4 kernel; 4, 16, 64 and 256
tokens 1.3x, 1.8x, 1.9x and 2.0x of it. For W4A16 and FP8: never more than 15 % slower than bf16 F.linear. For W4A8: at
least as fast as onnxruntime's MatMulNBits at accuracy level 4 (INT8 inputs), where onnxruntime is installed (the `bench`
extra).

All contenders take turns within one round, and ratios are the medians of the rounds' ratios, so that load from elsewhere
meets all of them alike. Each holds several copies of its weight, more than the last-level cache, so that weights come from
memory.
With one thread the clock is the processor's time, which other processes do not stretch; with more it is the wall's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from quantkit.kernels.cpu.backend import rounding_of_w4a8
from quantkit.kernels.cpu.build import load
from quantkit.kernels.cpu.linear import PackedLinear, gather, matmul, pack
from quantkit.run.bench import random_weight, timed
from quantkit.scheme import PRESETS

RESULTS = Path(__file__).parent / "results"
OURS = ("W4A16", "W4A16_ASYM", "FP8_DYNAMIC", "W4A8")
INT4_GOALS = {1: 1.5, 4: 1.3, 16: 1.8, 64: 1.9, 256: 2.0}
BANDWIDTH_GOAL, BF16_GOAL = 0.80, 1 / 1.15
COLUMNS = (
    *("milliseconds", "weight_gb_per_s", "share_of_read_bandwidth", "times_torch_int4", "times_bf16", "times_onnxruntime"),
)
Contender = Callable[[Any, int], object]  # activations, number of the round


def contenders(rows: int, inputs: int, cache_bytes: int) -> tuple[dict[str, Contender], dict[str, int]]:
    """What is timed, by name, and the bytes of weight, scales and zero points that each reads."""
    run: dict[str, Contender] = {}
    read: dict[str, int] = {}

    def copies(size: int) -> int:
        return max(2, -(-3 * cache_bytes // size))

    def packed_weight(name: str) -> PackedLinear:
        scheme = PRESETS["W4A16" if name == "W4A8" else name]
        activation = rounding_of_w4a8(scheme) if name == "W4A8" else scheme.activation
        return pack(random_weight(scheme, rows, inputs), activation)

    for name in OURS:
        first = packed_weight(name)
        read[name] = first.nbytes
        rest = [packed_weight(name) for _ in range(copies(read[name]) - 1)]
        packed = [gather([part]) for part in (first, *rest)]
        run[name] = lambda x, i, packed=packed: matmul(x, packed[i % len(packed)])  # type: ignore[misc]
    codes = torch.randint(0, 16, (rows, inputs), dtype=torch.int32)
    int4 = [torch._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(copies(rows * inputs // 2))]
    scales = torch.rand(inputs // 128, rows, 2).bfloat16()
    run["torch int4"] = lambda x, i: torch._weight_int4pack_mm_for_cpu(x, int4[i % len(int4)], 128, scales)
    read["torch int4"] = rows * inputs // 2 + scales.numel() * 2
    plain = [torch.randn(rows, inputs).bfloat16() for _ in range(copies(rows * inputs * 2))]
    run["bf16"] = lambda x, i: F.linear(x, plain[i % len(plain)])
    read["bf16"] = rows * inputs * 2
    buffer = torch.randint(0, 2**40, (max(cache_bytes * 4, 2**27) // 8,))
    run["read"] = lambda x, i: buffer.sum()  # the fastest plain reader in torch
    read["read"] = buffer.numel() * 8
    return run, read


def onnxruntime_contender(rows: int, inputs: int, count: int, threads: int) -> Contender | None:
    """MatMulNBits at accuracy level 4 in `count` sessions of random weights; None where onnxruntime is not installed."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    sizes = {"K": inputs, "N": rows, "bits": 4, "block_size": 128, "accuracy_level": 4}
    node = onnx.helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", **sizes)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    sessions = []
    for _ in range(count):
        codes = torch.randint(0, 256, (rows, inputs // 128, 64), dtype=torch.uint8).numpy()
        scales = torch.rand(rows * inputs // 128).numpy()
        held = [onnx.numpy_helper.from_array(codes, "w"), onnx.numpy_helper.from_array(scales, "s")]
        ends = [onnx.helper.make_tensor_value_info(n, 1, ["m", size]) for n, size in (("x", inputs), ("y", rows))]
        graph = onnx.helper.make_graph([node], "one", ends[:1], ends[1:], held)
        sets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
        model = onnx.helper.make_model(graph, opset_imports=sets, ir_version=9)
        sessions.append(onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]))
    return lambda x, i: sessions[i % count].run(None, {"x": x})


def judge(
    tokens: int, found: dict[str, np.ndarray[Any, Any]], read: dict[str, int]
) -> dict[str, dict[str, float | list[str]]]:
    """Ratios of one token count, and the goals that were missed. found: seconds of each contender in each round."""

    def ratio(other: str, name: str) -> float:
        """Round by round, so that a machine whose speed drifts does not decide."""
        return float(np.median(found[other] / found[name]))

    seconds = {name: float(np.median(values)) for name, values in found.items()}
    rows: dict[str, dict[str, float | list[str]]] = {}
    for name in OURS:
        to_int4, to_bf16 = ratio("torch int4", name), ratio("bf16", name)
        share = read[name] / read["read"] * ratio("read", name)
        missed = [f"{to_bf16:.2f} < {BF16_GOAL:.2f}x bf16"] if to_bf16 < BF16_GOAL else []
        if name == "W4A16" and to_int4 < INT4_GOALS.get(tokens, 0):
            missed.append(f"{to_int4:.2f} < {INT4_GOALS[tokens]}x int4")
        row: dict[str, float | list[str]] = {}
        if name == "W4A8" and "onnxruntime" in seconds:
            row["times_onnxruntime"] = to_ort = ratio("onnxruntime", name)
            if to_ort < 1:
                missed.append(f"{to_ort:.2f} < 1x onnxruntime")
        if name == "W4A16" and tokens == 1 and share < BANDWIDTH_GOAL:
            missed.append(f"{share:.0%} < {BANDWIDTH_GOAL:.0%} of bandwidth")
        rows[name] = row | {
            "milliseconds": seconds[name] * 1e3,
            "weight_gb_per_s": read[name] / seconds[name] / 1e9,
            "share_of_read_bandwidth": share,
            "times_torch_int4": to_int4,
            "times_bf16": to_bf16,
            "missed": missed,
        }
    for name in seconds.keys() - set(OURS):
        rows[name] = {"milliseconds": seconds[name] * 1e3, "weight_gb_per_s": read[name] / seconds[name] / 1e9}
    return rows


def show(results: dict[int, dict[str, dict[str, float | list[str]]]], title: str) -> None:
    table = Table(
        *("tokens", "kernel", "ms", "GB/s", "of read bandwidth", "x torch int4", "x bf16", "x onnxruntime", "goals missed"),
        title=title,
    )
    for tokens, rows in results.items():
        for name, row in rows.items():
            cells = [f"{row[key]:.2f}" if key in row else "" for key in COLUMNS]
            missed = row.get("missed", [])
            assert isinstance(missed, list)
            table.add_row(str(tokens), name, *cells, "; ".join(missed))
        table.add_section()
    Console(width=150).print(table)


@click.command()
@click.option("--rows", default=14336)
@click.option("--inputs", default=4096, help="A multiple of 128.")
@click.option("--tokens", default="1,4,16,64,256", help="Comma-separated.")
@click.option("--rounds", default=45, help="Timed rounds; a third of it for 16 tokens, a ninth from 64 on.")
@click.option("--threads", default=0, help="0: torch's default.")
@click.option("--cache-mb", default=32, help="Last-level cache, in MB.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "cpu_kernels.json")
def main(rows: int, inputs: int, tokens: str, rounds: int, threads: int, cache_mb: int, out: Path) -> None:
    """Time the CPU kernels against torch's int4 kernel, bf16 F.linear and the read bandwidth."""
    if isinstance(reason := load(), str):
        raise click.ClickException(f"no CPU kernels: {reason}")
    torch.manual_seed(0)
    if threads:
        torch.set_num_threads(threads)
    threads = torch.get_num_threads()
    clock = time.process_time if threads == 1 else time.perf_counter
    run, read = contenders(rows, inputs, cache_mb * 2**20)
    if theirs := onnxruntime_contender(rows, inputs, -(-3 * cache_mb * 2**20 // (rows * inputs // 2)), threads):
        run["onnxruntime"], read["onnxruntime"] = theirs, rows * inputs // 2 + rows * inputs // 128 * 4
    results = {}
    for count in map(int, tokens.split(",")):
        x = torch.randn(count, inputs)
        given = {name: x.numpy() if name == "onnxruntime" else x.bfloat16() for name in run}
        turns = {name: partial(call, given[name]) for name, call in run.items()}
        found = timed(turns, max(3, rounds // (1 if count < 16 else 3 if count < 64 else 9)), clock)
        results[count] = judge(count, found, read)
    show(results, f"{rows} x {inputs}, {threads} thread(s), medians")
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"rows": rows, "inputs": inputs, "threads": threads, "torch": torch.__version__, "tokens": results}
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
