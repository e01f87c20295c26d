"""Tokens per second of a prompt and of what follows it, counted where they are made."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor

from quantkit.run.model import Model

__all__ = ["Speed", "generation"]


class Speed:
    """Of one run of `Model.stream`: what the caller does between tokens does not count. prompt: ids of all rows."""

    def __init__(self) -> None:
        self.prompt = self.rows = 0
        self.seconds: list[float] = []  # of the prompt, then of each token of all rows

    def watch(self, prompt: int, tokens: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same tokens [rows, 1], each timed. A device has finished them when they are read."""
        self.prompt = prompt
        while True:
            begun = time.perf_counter()
            if (token := next(tokens, None)) is None:
                return
            self.rows = len(token.cpu())
            self.seconds.append(time.perf_counter() - begun)
            yield token

    @property
    def prefill(self) -> float | None:
        """Tokens per second of the prompt; None before it has run."""
        return self.prompt / self.seconds[0] if self.seconds else None

    @property
    def decode(self) -> float | None:
        """Tokens per second after the first, of all rows together; None before a second one."""
        return self.rows * (len(self.seconds) - 1) / sum(self.seconds[1:]) if len(self.seconds) > 1 else None

    def __str__(self) -> str:
        new = self.rows * len(self.seconds)
        parts = [f"prompt: {self.prompt} tokens" + (f", {self.prefill:.1f} a second" if self.prefill else "")]
        return "; ".join([*parts, f"new: {new} tokens" + (f", {self.decode:.1f} a second" if self.decode else "")])


def generation(model: Model, positions: Sequence[int], tokens: int = 16) -> list[dict[str, Any]]:
    """Tokens per second of prompts of so many random ids, and of the median token of those that follow each.

    A length that the model's positions do not allow has a row that says so, without figures.
    """
    rows: list[dict[str, Any]] = []
    generator = torch.Generator().manual_seed(0)
    for length in positions:
        limit = model.spec.positions
        if limit and length + tokens > limit:
            rows.append({"positions": length, "skipped": f"the model reads {limit} positions"})
            continue
        ids, speed = torch.randint(model.spec.vocab, (1, length), generator=generator), Speed()
        for warm in (1, tokens):  # kernels are built and threads awake
            speed = Speed()
            for _ in speed.watch(length, islice(model.stream(ids, new_tokens=tokens), warm + 1)):
                pass
        rows.append(
            {
                "positions": length,
                "prefill_tokens_per_s": speed.prefill,
                "decode_tokens_per_s": 1 / median(speed.seconds[1:]),
            }
        )
    return rows
