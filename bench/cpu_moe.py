"""A whole layer of experts on the CPU, beside BF16 in the same runtime; writes results/cpu_moe.json.

Goal: decoding one token with 16 experts top-1 moves at least 75 % of the machine's read bandwidth. Every round routes to
other experts, so that weights come from memory. All contenders take turns within one round; ratios are the medians of the
rounds' ratios.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from quantkit.kernels.cpu.backend import rounding_of_w4a8
from quantkit.kernels.cpu.linear import PackedLinear, experts, gather, on_huge_pages, pack, stack
from quantkit.model.blocks import Routing
from quantkit.model.decoder import mlp
from quantkit.model.spec import Linear, MoE, Role, Router
from quantkit.model.weights import Weights
from quantkit.run.bench import random_weight, timed
from quantkit.scheme import PRESETS

RESULTS = Path(__file__).parent / "results"
GOAL = 0.75
W4A16 = PRESETS["W4A16"]
FP8 = PRESETS["FP8_DYNAMIC"]
OURS = {"W4A16": (W4A16, None), "w4a8": (W4A16, rounding_of_w4a8(W4A16)), "FP8_DYNAMIC": (FP8, FP8.activation)}
Contender = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, ids, router weights


class Plain(Weights):
    """BF16 weights by name, as the runtime multiplies what is not quantized."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.tensors[ref.key]).to(x.dtype)


def copy_of(part: PackedLinear) -> PackedLinear:
    """The same weight elsewhere in memory: what a token reads must not lie in a cache."""
    return replace(part, weight=on_huge_pages(part.weight), scale=part.scale.clone())


def quantized(name: str, hidden: int, inner: int, count: int) -> tuple[Contender, float]:
    """The kernel's layer, and the bytes of one expert."""
    scheme, activation = OURS[name]
    wide = pack(random_weight(scheme, inner, hidden), activation)
    first, last = stack(wide, wide), pack(random_weight(scheme, hidden, inner), activation)
    gate_up, down = gather([copy_of(first) for _ in range(count)]), gather([copy_of(last) for _ in range(count)])
    return lambda x, ids, router: experts(x, ids, router, gate_up, down), first.nbytes + last.nbytes


def plain(hidden: int, inner: int, count: int, top_k: int) -> tuple[Contender, float]:
    parts = tuple(mlp(str(e), hidden, inner, Role.EXPERTS) for e in range(count))
    tensors = {ref.key: torch.ones(ref.out_features, ref.in_features).bfloat16() for p in parts for ref in p.linears()}
    spec = MoE(Router("router", count, hidden, Role.ROUTER, top_k, renormalise=False), parts, None)
    weights = Plain(tensors)
    return lambda x, ids, router: weights.experts(spec, x, Routing(ids, router, router)), 6.0 * hidden * inner


def routes(tokens: int, top_k: int, count: int, i: int) -> Tensor:
    """Spread evenly, and differently in every round."""
    first = torch.arange(tokens)[:, None] * top_k + i * 7
    return (first + torch.arange(top_k)) % count


def measure(
    run: dict[str, tuple[Contender, float]], hidden: int, tokens: int, top_k: int, count: int, rounds: int
) -> dict[str, Any]:
    x, router = torch.randn(tokens, hidden), torch.rand(tokens, top_k)
    buffer = torch.ones(2**26, dtype=torch.int64)

    ids = [routes(tokens, top_k, count, i) for i in range(2 * rounds)]

    def turn(call: Contender) -> Callable[[int], object]:
        return lambda i: call(x, ids[i], router)

    calls: dict[str, Callable[[int], object]] = {name: turn(call) for name, (call, _) in run.items()}
    seconds = timed({**calls, "read": lambda _: buffer.sum()}, rounds)
    busy = routes(tokens, top_k, count, 0).unique().numel()
    found: dict[str, dict[str, Any]] = {}
    for name, (_, size) in run.items():
        low, median, high = np.quantile(seconds[name], (0.2, 0.5, 0.8))
        found[name] = {"ms": {"median": median * 1e3, "p20": low * 1e3, "p80": high * 1e3}}
        found[name]["gb_per_s"] = busy * size / median / 1e9
        found[name]["of_read_bandwidth"] = busy * size / buffer.nbytes * float(np.median(seconds["read"] / seconds[name]))
        found[name]["times_bf16"] = float(np.median(seconds["BF16"] / seconds[name]))
    return found


@click.command()
@click.option("--hidden", default=4096)
@click.option("--inner", default=14336)
@click.option("--experts", "count", default=16)
@click.option("--top-k", default=1)
@click.option("--tokens", default="1,4,16,64,256", help="Comma-separated.")
@click.option("--rounds", default=100, help="Timed rounds; a tenth of it from 16 tokens on.")
@click.option("--threads", default=0, help="0: torch's default.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "cpu_moe.json")
def main(hidden: int, inner: int, count: int, top_k: int, tokens: str, rounds: int, threads: int, out: Path) -> None:
    if threads:
        torch.set_num_threads(threads)
    run = {name: quantized(name, hidden, inner, count) for name in OURS} | {"BF16": plain(hidden, inner, count, top_k)}
    results = {
        n: measure(run, hidden, n, top_k, count, -(-rounds // (1 if n < 16 else 10))) for n in map(int, tokens.split(","))
    }
    title = f"{count} experts of {inner} x {hidden}, top-{top_k}, {torch.get_num_threads()} threads"
    table = Table("tokens", "weights", "ms (p20..p80)", "GB/s", "of read bandwidth", "of BF16", title=title)
    for n, rows in results.items():
        for name, row in rows.items():
            time = row["ms"]
            cells = f"{time['median']:.2f} ({time['p20']:.2f}..{time['p80']:.2f})", f"{row['gb_per_s']:.1f}"
            table.add_row(str(n), name, *cells, f"{row['of_read_bandwidth']:.0%}", f"{row['times_bf16']:.2f}x")
        table.add_section()
    share = results[1]["W4A16"]["of_read_bandwidth"] if 1 in results else None
    if share is not None:
        table.caption = f"goal: one token at {GOAL:.0%} of read bandwidth" + ("" if share >= GOAL else ": missed")
    Console().print(table)
    sizes = {"hidden": hidden, "inner": inner, "experts": count, "top_k": top_k, "threads": torch.get_num_threads()}
    out.write_text(json.dumps({**sizes, "torch": torch.__version__, "tokens": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
