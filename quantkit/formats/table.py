"""Which formats of quantized checkpoints are known, and which of them a checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.errors import ConfigError
from quantkit.formats import compressed_tensors
from quantkit.formats.awq import AWQ
from quantkit.formats.base import Entries, Format
from quantkit.formats.fp8 import AUTOFP8, DEEPSEEK, TRANSFORMERS
from quantkit.formats.gptq import V1, V2

__all__ = ["FORMATS", "recognise"]

FORMATS: dict[str, Format] = {
    row.name: row for row in (compressed_tensors.FORMAT, V1, V2, AWQ, DEEPSEEK, AUTOFP8, TRANSFORMERS)
}


def recognise(quantization_config: object, entries: Entries) -> Format:
    """The format that a quantization_config says, and tensors' names where that leaves it open. Raises ConfigError."""
    if not isinstance(quantization_config, Mapping):
        raise ConfigError(f"quantization_config is {quantization_config!r}, not an object", "fetch config.json again")
    method = quantization_config.get("quant_method")
    if method == "compressed-tensors":
        return compressed_tensors.FORMAT
    if method == "gptq":
        return V2 if quantization_config.get("checkpoint_format") == "gptq_v2" else V1
    if method == "awq":
        return AWQ
    if method == "fp8":
        if quantization_config.get("weight_block_size") is not None:
            return DEEPSEEK
        return TRANSFORMERS if any(name.endswith(".weight_scale_inv") for name in entries) else AUTOFP8
    raise ConfigError(
        f"quantization_config has quant_method {method!r}", "quantkit reads compressed-tensors, gptq, awq and fp8"
    )
