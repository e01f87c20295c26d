"""What engines make of checkpoints that are not compressed-tensors: what was run, a row each. For all else nobody looked.

The formats are those of `formats.table`, as `quantkit convert --to` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.engines.rules import Check, Hit, Rule, Verdict, View
from quantkit.formats import compressed_tensors
from quantkit.formats.table import FORMATS

__all__ = ["SGLANG", "TRANSFORMERS", "VLLM"]

_INTEGERS, _FP8 = ("gptq", "gptq-v2", "awq"), ("fp8", "fp8-transformers", "deepseek-fp8")
_MOES = ("hunyuan", "hunyuan_v1_moe", "mixtral", "deepseek_v2", "qwen3_moe")


def _of(formats: tuple[str, ...], models: tuple[str, ...], hardware: tuple[str, ...] | None = None) -> Check:
    """Checkpoints in one of these formats, of one of these architectures, on that hardware (None: any)."""
    assert set(formats) <= FORMATS.keys()

    def check(view: View) -> Iterator[Hit]:
        there = hardware is None or view.deployment.hardware in hardware
        if there and view.format in formats and view.model_type in models:
            yield Hit(None, f"{view.format} of {view.model_type} on {view.deployment.hardware}")

    return check


def _with_the_rest(engine: str, rows: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """These, and one for every checkpoint that none of them is about."""

    def unseen(view: View) -> Iterator[Hit]:
        foreign = view.format not in ("", compressed_tensors.FORMAT.name)
        if foreign and not any(hit for rule in rows if rule.check for hit in rule.check(view)):
            yield Hit(None, f"{view.format} of {view.model_type} on {view.deployment.hardware}")

    rest = Rule(
        f"{engine}.format",
        Verdict.UNKNOWN,
        "What it does with this format, architecture and hardware was not looked at.",
        "not looked at",
        unseen,
        fix="quantkit convert --to compressed-tensors, for which there are rules",
        raw=True,
    )
    return (*rows, rest)


VLLM = _with_the_rest("vllm", ())
SGLANG = _with_the_rest("sglang", ())
TRANSFORMERS = _with_the_rest("transformers", ())
