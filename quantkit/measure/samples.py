"""What a reader can look at: the tokens where the models differ most, and what both write after the same prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from quantkit.calib.tokenizer import TextTokenizer
from quantkit.calib.tokens import EvalSet
from quantkit.model.cache import KVFormat
from quantkit.report.schema import Sample, WorstToken
from quantkit.run.model import Model

__all__ = ["Worst", "generations", "worst_tokens"]

_PROMPT, _SKIP, _NEW, _AFTER, _BEFORE, _TOP = 32, 64, 48, 12, 24, 5


@dataclass
class _Seen:
    kl: float
    window: int
    position: int
    top: list[list[tuple[int, float]]]  # of the baseline, of the quantized model: (id, probability)


@dataclass
class Worst:
    """The `keep` tokens with the largest KL so far, and the likeliest tokens of both models there."""

    keep: int = 20
    tokens: list[_Seen] = field(default_factory=list)

    def see(self, baseline: Tensor, quantized: Tensor, kl: Tensor, at: Tensor) -> None:
        """Logits [n, vocab], KL [n] and (window, position) [n, 2] of some tokens. One that is not finite is left out."""
        least = self.tokens[-1].kl if len(self.tokens) == self.keep else 0.0
        finite = kl.nan_to_num(nan=0.0, posinf=0.0)
        values, rows = finite.topk(min(self.keep, len(kl)))
        rows = rows[values > least]
        top = [x[rows].softmax(-1).topk(min(_TOP, x.shape[-1])) for x in (baseline, quantized)]
        for i, row in enumerate(rows.tolist()):
            pairs = [list(zip(t.indices[i].tolist(), t.values[i].tolist(), strict=True)) for t in top]
            window, position = at[row].tolist()
            self.tokens.append(_Seen(float(finite[row]), window, position, pairs))
        self.tokens = sorted(self.tokens, key=lambda s: (-s.kl, s.window, s.position))[: self.keep]


def _text(tokenizer: TextTokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special=False)


def worst_tokens(worst: Worst, data: EvalSet, tokenizer: TextTokenizer) -> list[WorstToken]:
    """In context, as text. A token that is part of a character shows as the replacement character."""
    rows = []
    for s in worst.tokens:
        row = data.ids[s.window].tolist()
        base, quant = ([(_text(tokenizer, [token]), p) for token, p in side] for side in s.top)
        rows.append(
            WorstToken(
                window=s.window,
                position=s.position + 1,
                kl=s.kl,
                before=_text(tokenizer, row[max(0, s.position + 1 - _BEFORE) : s.position + 1]),
                token=_text(tokenizer, [row[s.position + 1]]),
                baseline=base,
                quantized=quant,
            )
        )
    return rows


def generations(
    models: list[Model],
    data: EvalSet,
    tokenizer: TextTokenizer,
    count: int,
    kv: KVFormat | None,
    ends: frozenset[int] = frozenset(),
) -> list[Sample]:
    """Greedy continuations of text from `count` windows, by baseline and quantized model, until one of `ends`, a dozen
    tokens after the last of them has divided, or 48."""
    long = (data.lengths > _PROMPT).nonzero().flatten()
    if not count or not len(long):
        return []
    chosen = long[torch.linspace(0, len(long) - 1, min(count, len(long))).long()].unique()
    start = min(_SKIP, int(data.lengths[chosen].min()) - _PROMPT)  # a document often begins with what all begin with
    prompts = data.ids[chosen, start : start + _PROMPT]
    streams = [
        model.stream(prompts, kv_format=how)
        for model, how in zip(models, (KVFormat.FLOAT32, kv or KVFormat.FLOAT32), strict=True)
    ]
    drawn: list[list[Tensor]] = [[], []]
    since, ended = 0, torch.zeros(len(chosen), 2, dtype=torch.bool)
    for pair in islice(zip(*streams, strict=True), _NEW):
        for side, token in zip(drawn, pair, strict=True):
            side.append(token.cpu())
        divided = torch.stack([(a != b).flatten() for a, b in zip(*drawn, strict=True)]).any(0)
        since += bool(divided.all())
        ended |= torch.tensor([[int(token) in ends for token in side[-1]] for side in drawn]).T
        if since > _AFTER or ended.all():
            break
    rows = ([_until(row, ends) for row in torch.cat(side, dim=1).tolist()] for side in drawn)
    return [_sample(tokenizer, *row) for row in zip(prompts.tolist(), *rows, strict=True)]


def _until(ids: list[int], ends: frozenset[int]) -> list[int]:
    """Up to and with the first that ends a text."""
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def _sample(tokenizer: TextTokenizer, prompt: list[int], base: list[int], quant: list[int]) -> Sample:
    shorter = min(len(base), len(quant))
    same = next((i for i, (a, b) in enumerate(zip(base, quant, strict=False)) if a != b), shorter)
    return Sample(
        prompt=_text(tokenizer, prompt),
        common=_text(tokenizer, base[:same]),
        baseline=_text(tokenizer, base[same:]),
        quantized=_text(tokenizer, quant[same:]),
        same=same,
        of=max(len(base), len(quant)),
    )
