"""Text in, text out: a model and its tokenizer together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from tokenizers.decoders import DecodeStream

from quantkit.calib.tokens import load_tokenizer
from quantkit.errors import ConfigError
from quantkit.model.cache import KVFormat
from quantkit.runtime import Model
from quantkit.sampling import GREEDY, Sampling

__all__ = ["stream_text"]


def stream_text(
    model: Model,
    prompt: str,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    kv_format: KVFormat = KVFormat.BF16,
) -> Iterator[str]:
    """Continue a prompt, yielding pieces of text that are whole characters, until max_tokens or an end token.

    End tokens are config.json's eos_token_id. Raises ConfigError for a prompt without a token.
    """
    tokenizer = load_tokenizer(model.folder)
    ids = tokenizer.encode(prompt).ids
    if not ids:
        raise ConfigError("the prompt holds no token", "give some text")
    end = model.config.get("eos_token_id")
    ends = set(end) if isinstance(end, list) else {end}
    decoder = DecodeStream(ids=[], skip_special_tokens=True)
    stream = model.stream(torch.tensor([ids]), sampling, kv_format)
    for token in islice(stream, max_tokens):
        if token.item() in ends:
            return
        piece = decoder.step(tokenizer, int(token.item()))
        if piece:
            yield piece
