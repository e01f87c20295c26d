"""Text to token windows: for calibration (packed, all of one length) and for evaluation (by document, padded)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantkit.calib.documents import Document, Documents
from quantkit.calib.tokenizer import TextTokenizer
from quantkit.errors import CalibrationError

__all__ = ["EvalSet", "beginning", "calibration_windows", "digest", "evaluation_set", "spare_windows"]

_SHOWN = 8


def beginning(tokenizer: TextTokenizer, documents: Documents) -> dict[str, Any]:
    """What a text is and how its ids begin, for records: documents (of them conversations) and skipped rows, the first ids
    of the first document, and whether raw text gets the beginning-of-text token, with the reason."""
    ids = tokenizer.encode_document(documents[0], _SHOWN) if documents else []
    written = bool(documents) and documents.conversations == len(documents)
    return {
        "documents": len(documents),
        "conversations": documents.conversations,
        "skipped_rows": documents.skipped,
        "first_ids": ids,
        "first_tokens": [tokenizer.token(token) for token in ids],
        "bos_id": tokenizer.bos.id,
        "bos_added": False if written else tokenizer.bos.added,
        "bos_why": "all are conversations: the chat template writes what they begin with" if written else tokenizer.bos.why,
    }


def calibration_windows(
    tokenizer: TextTokenizer,
    texts: Sequence[Document],
    samples: int,
    seq_len: int,
    seed: int,
    name: str = "given",
    each: int | None = None,
    purpose: tuple[str, str] = ("calibration", "lower --samples or --seq-len"),
) -> Tensor:
    """int64 [samples, seq_len]: documents in random order, joined, cut into windows, `samples` of them drawn at random.

    Documents are taken until they give twice the tokens needed, so that a huge corpus costs no more than a large one.
    each: at most so many tokens of a document. purpose: what the text is for, and what to lower where it is too short.
    Raises CalibrationError when all of them give too few.
    """
    return _drawn(tokenizer, texts, (samples, 0), seq_len, seed, name, each, purpose)[0]


def spare_windows(
    tokenizer: TextTokenizer,
    texts: Sequence[Document],
    samples: int,
    spare: int,
    seq_len: int,
    seed: int,
    name: str = "given",
) -> Tensor:
    """int64 [spare, seq_len]: windows of the same text that `calibration_windows` with the same arguments leaves. Raises
    CalibrationError where it leaves too few."""
    purpose = ("calibration", f"lower --samples or --seq-len; {spare} windows beside those of the calibration are needed")
    return _drawn(tokenizer, texts, (samples, spare), seq_len, seed, name, None, purpose)[1]


def _drawn(
    tokenizer: TextTokenizer,
    texts: Sequence[Document],
    counts: tuple[int, int],
    seq_len: int,
    seed: int,
    name: str,
    each: int | None,
    purpose: tuple[str, str],
) -> list[Tensor]:
    """So many windows, and so many others; see `calibration_windows`."""
    samples = counts[0]
    generator = np.random.default_rng(seed)
    parts: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    total, needed = 0, 2 * samples * seq_len
    for index in generator.permutation(len(texts)):
        if total >= needed:
            break
        parts.append(np.array(tokenizer.encode_document(texts[index], each), dtype=np.int64))
        total += len(parts[-1])
    count = total // seq_len
    if count < sum(counts):
        enough = f"{count} windows of {seq_len}, and {sum(counts)} are asked for"
        raise CalibrationError(
            f"the {purpose[0]} text '{name}' has {total:,} tokens: {enough}", f"give more text, or {purpose[1]}"
        )
    order, windows = generator.permutation(count), np.concatenate(parts)[: count * seq_len].reshape(count, seq_len)
    return [torch.from_numpy(windows[np.sort(part)]) for part in (order[:samples], order[samples : sum(counts)])]


@dataclass(frozen=True)
class EvalSet:
    """Windows to score. ids int64 [n, longest window], right-padded with 0; lengths int64 [n]; unit int64 [n].

    unit: which document a window belongs to, or itself when there is but one: what the bootstrap resamples.
    """

    ids: Tensor
    lengths: Tensor
    unit: Tensor
    unit_name: str

    def digest(self) -> str:
        """sha256 of the windows, of how long each is (padding is a token id too), and of the documents they are from."""
        return hashlib.sha256("".join(digest(part) for part in (self.ids, self.lengths, self.unit)).encode()).hexdigest()


def evaluation_set(
    tokenizer: TextTokenizer, texts: Sequence[Document], seq_len: int, max_windows: int, name: str = "given"
) -> EvalSet:
    """The first windows of every document in turn, until `max_windows`. Raises CalibrationError when there is none.

    Of a document only as much is encoded as its windows need.
    """
    chosen = sorted(_in_turn(tokenizer, texts, seq_len, max_windows))
    if not chosen:
        raise CalibrationError(f"the evaluation text '{name}' has no document of two tokens or more", "give more text")
    ids = torch.zeros(len(chosen), max(len(window) for *_, window in chosen), dtype=torch.int64)
    for row, (*_, window) in enumerate(chosen):
        ids[row, : len(window)] = torch.tensor(window)
    lengths = torch.tensor([len(window) for *_, window in chosen])
    several = len({d for d, *_ in chosen}) > 1
    unit = torch.tensor([d for d, *_ in chosen]) if several else torch.arange(len(chosen))
    return EvalSet(ids, lengths, unit, "document" if several else "window")


def _in_turn(
    tokenizer: TextTokenizer, texts: Sequence[Document], seq_len: int, max_windows: int
) -> list[tuple[int, int, list[int]]]:
    """(document, window, ids) round-robin: every document gives its first window before any gives its second."""
    chosen: list[tuple[int, int, list[int]]] = []
    live, encoded, index = list(range(len(texts))), dict[int, list[int]](), 0
    while live and len(chosen) < max_windows:
        longer = []
        for d in live:
            stop = (index + 1) * seq_len
            if len(encoded.get(d, [])) < stop:  # twice as much as before: each document is encoded a few times at most
                encoded[d] = tokenizer.encode_document(texts[d], stop if index == 0 else 2 * stop)
            window = encoded[d][stop - seq_len : stop]
            if len(window) >= 2:
                chosen.append((d, index, window))
            if len(window) == seq_len:
                longer.append(d)
            if len(chosen) == max_windows:
                break
        live, index = longer, index + 1
    return chosen


def digest(ids: Tensor) -> str:
    """sha256 of token ids and their shape."""
    return hashlib.sha256(f"{tuple(ids.shape)}".encode() + ids.numpy().tobytes()).hexdigest()
