"""From logits to the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import ConfigError

__all__ = ["GREEDY", "Sampling", "sample"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; greedy unless told. Raises ConfigError for a temperature that is not a number >= 0, or top_p
    outside (0, 1]."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            problem = f"temperature {self.temperature}, top_p {self.top_p}"
            raise ConfigError(problem, "give a temperature >= 0 and 0 < top_p <= 1")


GREEDY = Sampling()


def sample(logits: Tensor, how: Sampling, generator: torch.Generator) -> Tensor:
    """int64 [batch, 1] drawn from float32 logits [batch, vocab].

    temperature 0 takes the most likely token. top_p keeps the smallest set of tokens whose probabilities, after the
    temperature, reach it (nucleus sampling, arXiv 1904.09751); the most likely token is always kept.
    """
    if how.temperature == 0:
        return logits.argmax(-1, keepdim=True)
    above = logits - logits.amax(-1, keepdim=True)  # at most 0: no temperature is too small
    ordered, tokens = (above / how.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if how.top_p < 1:  # a sum in float32 reaches 1 before the last token
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= how.top_p, 0.0)
    ordered[:, 0] = ordered[:, 0].clamp(min=torch.finfo(ordered.dtype).tiny)
    drawn = torch.multinomial(ordered.cpu(), 1, generator=generator).to(logits.device)
    chosen: Tensor = tokens.gather(-1, drawn)
    return chosen
