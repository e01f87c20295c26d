"""Text in, text out: a model and its tokenizer together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import torch

from quantkit.calib.tokenizer import TextTokenizer, end_tokens, load_text_tokenizer
from quantkit.errors import ConfigError
from quantkit.model.cache import KVFormat
from quantkit.run.model import Model
from quantkit.run.sampling import GREEDY, Sampling
from quantkit.run.speed import Speed

__all__ = ["complete", "stream_text"]


def stream_text(
    model: Model,
    prompt: str,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    kv_format: KVFormat = KVFormat.BF16,
    add_bos: bool | None = None,
    speed: Speed | None = None,
) -> Iterator[str]:
    """Continue a prompt: pieces of text that are whole characters, until max_tokens or an end token.

    End tokens are the eos_token_id of config.json and of generation_config.json. add_bos: whether the prompt begins with the
    model's beginning-of-text token; None: as it was trained. speed: told of each token. Raises ConfigError for a prompt
    without a token, and where it and max_tokens are more than the model's positions, before the first piece is asked for.
    """
    tokenizer, ends = load_text_tokenizer(model.folder, add_bos), end_tokens(model.folder, model.config)
    ids = torch.tensor([_encode(tokenizer, prompt)])
    model.check_room(ids.shape[1], max_tokens)
    tokens = islice(model.stream(ids, sampling, kv_format, None, max_tokens), max_tokens)
    return _pieces(tokenizer, speed.watch(ids.shape[1], tokens) if speed else tokens, ends)


def _pieces(tokenizer: TextTokenizer, tokens: Iterator[torch.Tensor], ends: frozenset[int]) -> Iterator[str]:
    step = tokenizer.stream()
    for token in tokens:
        if token.item() in ends:
            return
        piece = step(int(token.item()))
        if piece:
            yield piece


def complete(
    model: Model,
    prompts: Sequence[str],
    max_tokens: int,
    sampling: Sampling = GREEDY,
    kv_format: KVFormat = KVFormat.BF16,
    add_bos: bool | None = None,
    speed: Speed | None = None,
) -> list[str]:
    """Continue several prompts at once, as one batch: what follows each, until max_tokens or an end token.

    Raises as `stream_text` does.
    """
    tokenizer, ends = load_text_tokenizer(model.folder, add_bos), end_tokens(model.folder, model.config)
    encoded = [_encode(tokenizer, prompt) for prompt in prompts]
    width = max(map(len, encoded))
    model.check_room(width, max_tokens)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in encoded])
    padding = torch.tensor([width - len(row) for row in encoded])
    done = [False] * len(encoded)
    drawn: list[list[int]] = [[] for _ in encoded]
    steps = islice(model.stream(ids, sampling, kv_format, padding, max_tokens), max_tokens)
    for tokens in speed.watch(sum(map(len, encoded)), steps) if speed else steps:
        for i, token in enumerate(tokens.flatten().tolist()):
            done[i] |= token in ends
            if not done[i]:
                drawn[i].append(token)
        if all(done):
            break
    return [tokenizer.decode(row) for row in drawn]


def _encode(tokenizer: TextTokenizer, prompt: str) -> list[int]:
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ConfigError("the prompt holds no token", "give some text")
    return ids
