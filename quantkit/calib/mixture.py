"""Calibration text from several sources, with shares: `chat.jsonl=2+code.jsonl+zh.txt`."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calib import hub
from quantkit.calib.corpus import NAMED
from quantkit.calib.documents import Document, Documents, read_documents
from quantkit.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor

    from quantkit.calib.tokenizer import TextTokenizer

__all__ = ["Mixture", "Source", "read_mixture", "short_name", "sources_of"]

_SHARE = re.compile(r"(.+)=(\d+(?:\.\d+)?)", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """name: what `read_documents` takes. share: of the windows, beside the other sources' shares."""

    name: str
    share: float = 1.0


def sources_of(text: str) -> tuple[Source, ...]:
    """The sources that a text names. A name that is a file, with whatever signs, is that file. Raises CalibrationError."""
    if text in NAMED or os.path.isfile(text) or hub.is_name(text) or not ("+" in text or _SHARE.fullmatch(text)):
        return (Source(text),)
    sources = []
    for part in text.split("+"):
        match = None if os.path.isfile(part) else _SHARE.fullmatch(part)
        sources.append(Source(match[1], float(match[2])) if match else Source(part))
    problem = next((f"source '{s.name}' with share {s.share:g}" for s in sources if not s.name or s.share <= 0), None)
    names = [source.name for source in sources]
    if problem is None and len(set(names)) < len(names):
        problem = f"'{next(name for name in names if names.count(name) > 1)}' twice"
    if problem:
        raise CalibrationError(f"the mixture '{text}' has {problem}", "give sources as in chat.jsonl=2+code.jsonl+zh.txt")
    return tuple(sources)


def short_name(text: str) -> str:
    """The text without the folders of its files: what decides nothing of a job is no part of its key."""
    sources = sources_of(text)
    if len(sources) == 1:
        return Path(text).name
    return "+".join(f"{Path(source.name).name}={source.share:g}" for source in sources)


@dataclass(frozen=True)
class Mixture:
    """Sources and the documents of each."""

    sources: tuple[Source, ...]
    texts: tuple[Documents, ...]

    @property
    def documents(self) -> Documents:
        """All, source by source."""
        if len(self.texts) == 1:
            return self.texts[0]
        skipped: Counter[str] = Counter()
        every: list[Document] = []
        for texts in self.texts:
            every += texts
            skipped.update(texts.skipped)
        return Documents(every, dict(skipped))

    def notes(self) -> tuple[str, ...]:
        every = (texts.note(source.name) for source, texts in zip(self.sources, self.texts, strict=True))
        return tuple(note for note in every if note)

    def counts(self, samples: int) -> list[int]:
        """Of so many windows how many are each source's: by share, what is left to those with the largest remainders."""
        total = sum(source.share for source in self.sources)
        exact = [samples * source.share / total for source in self.sources]
        counts = [math.floor(x) for x in exact]
        order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for i in order[: samples - sum(counts)]:
            counts[i] += 1
        return counts

    def windows(self, tokenizer: TextTokenizer, samples: int, seq_len: int, seed: int) -> Tensor:
        """int64 [samples, seq_len], source by source, each drawn as `tokens.calibration_windows` says."""
        return self._drawn(tokenizer, self.counts(samples), [0] * len(self.sources), seq_len, seed)

    def spare(self, tokenizer: TextTokenizer, samples: int, spare: int, seq_len: int, seed: int) -> Tensor:
        """int64 [spare, seq_len]: others of the same texts, in the same shares, see `tokens.spare_windows`."""
        return self._drawn(tokenizer, self.counts(samples), self.counts(spare), seq_len, seed)

    def _drawn(
        self, tokenizer: TextTokenizer, samples: Sequence[int], spare: Sequence[int], seq_len: int, seed: int
    ) -> Tensor:
        import torch

        from quantkit.calib.tokens import calibration_windows, spare_windows

        parts = []
        for source, texts, count, more in zip(self.sources, self.texts, samples, spare, strict=True):
            if more:
                parts.append(spare_windows(tokenizer, texts, count, more, seq_len, seed, source.name))
            elif count and not any(spare):
                parts.append(calibration_windows(tokenizer, texts, count, seq_len, seed, source.name))
        return torch.cat(parts)


def read_mixture(text: str) -> Mixture:
    """Raises CalibrationError, and ConfigError where the library that reads a source is not installed."""
    sources = sources_of(text)
    return Mixture(sources, tuple(read_documents(source.name) for source in sources))
