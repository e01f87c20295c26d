"""From logits to the next token."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sample"]


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """int64 [batch, 1] drawn from float32 logits [batch, vocab].

    temperature 0 takes the most likely token. top_p keeps the smallest set of tokens whose probabilities, after the
    temperature, reach it (nucleus sampling, arXiv 1904.09751); the most likely token is always kept.
    """
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    ordered, tokens = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    ordered[:, 0] = ordered[:, 0].clamp(min=torch.finfo(ordered.dtype).tiny)
    drawn = torch.multinomial(ordered.cpu(), 1, generator=generator).to(logits.device)
    chosen: Tensor = tokens.gather(-1, drawn)
    return chosen
