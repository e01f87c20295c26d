"""Measure what examples/quantize.py lost, and judge it: `python examples/evaluate.py OUT`. Exit code 0, 1 or 3.

`quantkit eval OUT --baseline MODEL --gate 'kl.mean<0.05'` does the same from a shell, and writes a page.
"""

from __future__ import annotations

import sys
from pathlib import Path

import quantkit

MODEL = Path(__file__).parent / "tiny-hunyuan"
LIMITS = {"kl.mean": 0.05, "perplexity.ratio": 1.05}


def verdict(interval: list[float] | None, limit: float) -> str:
    """Gates take the bounds of the 95 % interval, never the point."""
    if interval is None or interval[0] < limit <= interval[1]:
        return "undecided"
    return "pass" if interval[1] < limit else "fail"


def main(out: str) -> int:
    result = quantkit.evaluate(out, MODEL, "stdlib-held-out", windows=16, seq_len=256)
    kl, perplexity = result["kl"], result["perplexity"]
    print(f"KL(BF16 || quantized): mean {kl['mean']:.4f} nats, p99 {kl['p99']:.4f}")
    print(f"perplexity: {perplexity['baseline']:.2f} -> {perplexity['quantized']:.2f}")
    said = {name: verdict(result["ci95"].get(name), limit) for name, limit in LIMITS.items()}
    for name, limit in LIMITS.items():
        print(f"{name} < {limit}: {said[name]}")
    return 1 if "fail" in said.values() else 3 if "undecided" in said.values() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) if len(sys.argv) == 2 else f"usage: {sys.argv[0]} OUT")
