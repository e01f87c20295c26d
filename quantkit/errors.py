"""Every error a user can meet, as one tree. The command line prints the message and exits with `exit_code`.

QuantkitError
├── ConfigError        a config.json, recipe or option asks for something that is unknown or contradictory
├── CheckpointError    a shard, an index or a tensor is missing, truncated, hostile or not finite
│   └── NotFiniteError     logits that were needed for an answer are not finite
├── CalibrationError   the calibration or evaluation text cannot serve
├── OutputError        the destination exists, is in use, is full, or belongs to another job
└── VerificationError  what lies on disk is not what it claims to be
"""

from __future__ import annotations

from pathlib import Path

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "NotFiniteError",
    "OutputError",
    "QuantkitError",
    "VerificationError",
    "counted",
    "shown",
    "shown_lines",
]

_LONGEST_LINE = 2000


class QuantkitError(Exception):
    """What went wrong, where, what was seen, what is allowed, and the fix: one message, no traceback."""

    exit_code = 2

    def __init__(self, problem: str, fix: str = "") -> None:
        problem, fix = shown_lines(problem), shown_lines(fix)
        super().__init__(f"{problem}\nFix: {fix}" if fix else problem)
        self.problem = problem
        self.fix = fix


class ConfigError(QuantkitError):
    """A config.json, recipe or option asks for something that is unknown or contradictory."""


class CheckpointError(QuantkitError):
    """A shard, an index or a tensor is missing, truncated, hostile or not finite."""


class NotFiniteError(CheckpointError):
    """Logits that were needed for an answer are not finite. folder: of the model."""

    def __init__(self, folder: Path, problem: str) -> None:
        fix = "`quantkit eval` without tasks names the first layer whose output is not finite; quantize again"
        super().__init__(f"{folder}: {problem}", fix)
        self.folder = folder


class CalibrationError(QuantkitError):
    """The calibration or evaluation text cannot serve: too short, empty, not UTF-8, no such field."""


class OutputError(QuantkitError):
    """The destination exists, is in use, is full, or belongs to another job."""


class VerificationError(QuantkitError):
    """What lies on disk is not what it claims to be."""


def counted(number: int, thing: str) -> str:
    """`1 tensor`, `2 tensors`."""
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def shown(value: object, limit: int = 200) -> str:
    """Text from a file (a name, a key, a value) on one line, as a message, a table or a page may show it.

    What does not print (control characters, ANSI sequences, marks that turn the direction of writing) is escaped as in a
    Python string, and what is longer than `limit` characters loses its middle.
    """
    text = str(value)
    if len(text) > limit:
        text = f"{text[: limit - limit // 3]}[...]{text[-(limit // 3) :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shown_lines(text: str) -> str:
    """Text with lines of its own; whatever else does not print came from a file."""
    return "\n".join(shown(line, _LONGEST_LINE) for line in text.split("\n"))
