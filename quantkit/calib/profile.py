"""What kind of text a text is, in two measures that need no model: the scripts of its letters, and how much looks like code.

A letter's script is the first word of its name in Unicode ("LATIN SMALL LETTER A"). A line looks like code that is indented
by four spaces or a tab, begins as a comment or decorator does, or ends as statements do.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from quantkit.calib.documents import Conversation, Document

__all__ = ["Profile", "one_kind", "profile_of", "unlike"]

_DOCUMENTS, _CHARACTERS = 256, 4000  # looked at: evenly spread documents, and of each its beginning
_CODE = re.compile(r"^(?: {4}|\t|#|//|@)|[;{}()\[\]:]$| = ")
_SCRIPTS = {"CJK": "Han", "FULLWIDTH": "Latin", "HIRAGANA": "Kana", "KATAKANA": "Kana"}
_ALL, _MOSTLY_CODE, _MUCH, _LITTLE = 0.95, 0.6, 0.3, 0.05  # shares: when a note is given


@dataclass(frozen=True)
class Profile:
    """scripts: of the letters, the share of each, largest first. code: of the lines that are not empty, the share that looks
    like code."""

    scripts: dict[str, float]
    code: float

    def as_dict(self) -> dict[str, Any]:
        return {"scripts": {name: round(share, 4) for name, share in self.scripts.items()}, "code": round(self.code, 4)}

    @classmethod
    def of(cls, fields: Any) -> Profile | None:
        """From `as_dict`; None for anything else."""
        if not isinstance(fields, dict) or not isinstance(fields.get("scripts"), dict) or "code" not in fields:
            return None
        return cls({str(name): float(share) for name, share in fields["scripts"].items()}, float(fields["code"]))


@cache
def _script(letter: str) -> str:
    word = unicodedata.name(letter, "OTHER").split(" ")[0].split("-")[0]
    return _SCRIPTS.get(word, word.capitalize())


def _plain(document: Document) -> str:
    if not isinstance(document, Conversation):
        return document
    return "\n".join(str(message.get("content") or "") for message in document.messages)


def profile_of(documents: Sequence[Document]) -> Profile:
    """Of a few of the documents, evenly spread."""
    step = max(1, len(documents) // _DOCUMENTS)
    return _profile(_plain(documents[i])[:_CHARACTERS] for i in range(0, len(documents), step))


def _profile(texts: Iterable[str]) -> Profile:
    letters: Counter[str] = Counter()
    lines = code = 0
    for text in texts:
        letters.update(_script(letter) for letter in text if letter.isalpha())
        written = [line.rstrip() for line in text.split("\n") if line.strip()]
        lines += len(written)
        code += sum(_CODE.search(line) is not None for line in written)
    total = max(1, letters.total())
    return Profile({name: count / total for name, count in letters.most_common()}, code / max(1, lines))


def one_kind(name: str, profile: Profile) -> str | None:
    """What to tell of a calibration text that is all of one script or domain: what it has not read is hardly calibrated."""
    script, share = next(iter(profile.scripts.items()), ("none", 1.0))
    kinds = [f"{share:.0%} of its letters are {script}"] if share >= _ALL else []
    if profile.code >= _MOSTLY_CODE:
        kinds.append(f"{profile.code:.0%} of its lines look like code")
    if not kinds:
        return None
    return (
        f"calibration text '{name}' is nearly all of one kind: {', and '.join(kinds)}; what the model is to read besides "
        "loses more (--calibration a+b mixes texts)"
    )


def unlike(calibration: Profile, evaluation: Profile) -> list[str]:
    """What much of an evaluation text is, and nothing or little of the calibration text was."""
    kinds = [
        (f"letters are {script}", share, calibration.scripts.get(script, 0.0))
        for script, share in evaluation.scripts.items()
    ]
    kinds += [
        ("lines look like code", evaluation.code, calibration.code),
        ("lines look like prose", 1 - evaluation.code, 1 - calibration.code),
    ]
    return [
        f"{now:.0%} of the evaluation text's {words}, and {then:.0%} of the calibration text's: the model was calibrated "
        "for other text"
        for words, now, then in kinds
        if now >= _MUCH and then < _LITTLE
    ]
