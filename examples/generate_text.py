"""Text from a quantized checkpoint, packed for this machine's kernels: `python examples/generate_text.py OUT [PROMPT]`."""

from __future__ import annotations

import sys

import torch
from tokenizers import Tokenizer

import quantkit


def main(out: str, prompt: str = "def main(") -> None:
    model = quantkit.load(out)  # kernels="reference": float32, right on any machine, and slow
    for row in model.explain():
        print(f"{row['role']}, {row['scheme']}: {row['kernel']} ({row['why']})", file=sys.stderr)
    tokenizer = Tokenizer.from_file(f"{out}/tokenizer.json")
    prompt_ids = torch.tensor([tokenizer.encode(prompt).ids])  # int64 [1, time]
    ids = model.generate(prompt_ids, new_tokens=32)  # greedy
    print(tokenizer.decode(ids[0].tolist()))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(f"usage: {sys.argv[0]} OUT [PROMPT]")
    main(*sys.argv[1:])
