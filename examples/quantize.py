"""Quantize the bundled model by the recommended recipe: `python examples/quantize.py OUT`.

With 64 windows of 512 tokens, so that it takes seconds; a real run has 512 windows of 2048 of your own text. With too few
tokens for each expert GPTQ loses more than rounding does.
"""

from __future__ import annotations

import sys
from pathlib import Path

import quantkit

MODEL = Path(__file__).parent / "tiny-hunyuan"


def main(out: str) -> None:
    recipe = quantkit.Recipe(
        experts="W4A16",
        attention="W8A16",
        shared_experts="W8A16",
        calibration="stdlib",  # or a file: text, messages, ShareGPT, Alpaca
        samples=64,
        seq_len=512,
    )
    record = quantkit.quantize(MODEL, out, recipe)
    print(f"{out}: {record['source_bytes'] / 1e6:.1f} MB -> {record['output_bytes'] / 1e6:.1f} MB")
    print(f"linears that fell back to rounding: {len(record['fallbacks'])}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} OUT")
    main(sys.argv[1])
