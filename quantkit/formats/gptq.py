"""GPTQ checkpoints, both conventions for zero points: names, dtypes and shapes on disk, and their `quantization_config`.

For a weight [out, in] with b bits and groups of g inputs: qweight int32 [in * b / 32, out], unsigned codes of a column of
inputs packed from the least significant end; qzeros int32 [in / g, out * b / 32]; scales float16 [in / g, out]; g_idx int32
[in], the group of every input. w = (q - z) * s, where "gptq" stores z - 1 and "gptq_v2" stores z. A symmetric weight has
z = 2^(b-1) everywhere. Layout: AutoGPTQ and GPTQModel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from quantkit.choices import FormatName
from quantkit.dtypes import TensorPlan, torch_dtype
from quantkit.errors import CheckpointError, ConfigError
from quantkit.formats.base import ELSEWHERE, Entries, Format, Schemes, Tensors, checked, exactly, one_scheme, scale_dtype
from quantkit.formats.packing import pack_rows, unpack_rows
from quantkit.model.spec import Linear
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Kind, Scheme, Strategy, weight_only

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["V1", "V2", "integer_scheme"]


class _Config(BaseModel):
    quant_method: Literal["gptq"]
    bits: Literal[4, 8]
    group_size: int
    sym: bool = True
    desc_act: bool = False
    checkpoint_format: Literal["gptq", "gptq_v2"] = "gptq"
    pack_dtype: Literal["int32", None] = None
    dynamic: dict[str, dict[str, Any]] | None = None


def integer_scheme(bits: int, symmetric: bool, group_size: int) -> Scheme:
    """Weight-only integers as GPTQ and AWQ configs describe them, with float16 scales. Raises ConfigError."""
    if group_size != -1 and group_size < 1:
        raise ConfigError(f"quantization_config: 'group_size' is {group_size}", "it is a positive number, or -1 for a row")
    return weight_only(bits, symmetric, None if group_size == -1 else group_size).stored("F16")


def _parse(quantization_config: Mapping[str, Any], keys: Iterable[str], entries: Entries) -> Schemes:
    """A linear is quantized unless it is there as a plain weight: the config need not name the exceptions."""
    config = checked(_Config, quantization_config)
    if changed := [rule for rule, value in (config.dynamic or {}).items() if value and not rule.startswith("-:")]:
        raise ConfigError(
            f"quantization_config: 'dynamic' gives {changed[0]!r} other bits or groups", "quantkit reads one scheme per file"
        )
    scheme = integer_scheme(config.bits, config.sym, config.group_size)
    schemes: Schemes = {}
    for key in keys:
        plain = f"{key}.weight" in entries and f"{key}.qweight" not in entries
        schemes[key] = None if plain else scheme.stored(scale_dtype(entries, f"{key}.scales", "F16"))
    return schemes


def planned(ref: Linear, scheme: Scheme) -> list[TensorPlan]:
    """The tensors that one quantized linear becomes."""
    grid, out, inputs = scheme.weight, ref.out_features, ref.in_features
    groups = grid.scale_shape(out, inputs)[1]
    return [
        TensorPlan(f"{ref.key}.qweight", "I32", (inputs * grid.bits // 32, out)),
        TensorPlan(f"{ref.key}.qzeros", "I32", (groups, out * grid.bits // 32)),
        TensorPlan(f"{ref.key}.scales", grid.scale_dtype, (groups, out)),
        TensorPlan(f"{ref.key}.g_idx", "I32", (inputs,), optional=True),
    ]


def _zeros(ref: Linear, scheme: Scheme, stored: Tensor, offset: int) -> Tensor | None:
    """Zero points int8 [out, groups] of qzeros; None for a symmetric weight, whose stored ones must all be the middle."""
    zeros = unpack_rows(stored, scheme.weight.bits).T
    if scheme.weight.symmetric:
        if (zeros == -1).all() or (zeros == 0).all():  # engines ignore them, so writers differ in the convention
            return None
        raise CheckpointError(
            f"'{ref.key}.qzeros' holds zero points that differ, but quantization_config says sym", "set sym to false"
        )
    if offset and (zeros == scheme.weight.qmax).any():
        raise CheckpointError(
            f"'{ref.key}.qzeros' holds {2**scheme.weight.bits - 1}, which engines read as {2**scheme.weight.bits} or as 0",
            "quantize again to checkpoint_format gptq_v2, which has no such case",
        )
    return (zeros + offset).to(torch_dtype("I8")).contiguous()


def _groups(inputs: int, size: int, device: torch.device | str = "cpu") -> Tensor:
    """g_idx of groups of neighbours: int32 [inputs]."""
    import torch

    return torch.arange(inputs, dtype=torch.int32, device=device) // size


def _decode(ref: Linear, scheme: Scheme, tensors: Tensors, offset: int) -> QuantizedTensor:
    scale = tensors[f"{ref.key}.scales"].T.contiguous()
    if (order := f"{ref.key}.g_idx") in tensors:
        index, size = tensors[order], ref.in_features // scale.shape[1]
        if not index.equal(_groups(ref.in_features, size, index.device)):
            raise CheckpointError(
                f"'{order}' puts inputs into groups out of order (desc_act without static groups)",
                "quantize with desc_act false or static_groups true: quantkit reads groups of neighbours only",
            )
    codes = unpack_rows(tensors[f"{ref.key}.qweight"].T.contiguous(), scheme.weight.bits)
    return QuantizedTensor(codes, scale, _zeros(ref, scheme, tensors[f"{ref.key}.qzeros"], offset), scheme.weight)


def _target(scheme: Scheme) -> Scheme:
    """Raises ConfigError for what GPTQ does not hold."""
    grid, problem = scheme.weight, None
    if scheme.activation is not None:
        problem = f"it has no place for how inputs are rounded, and {scheme.name} rounds them"
    elif grid.kind is not Kind.INT or grid.strategy not in (Strategy.GROUP, Strategy.CHANNEL):
        problem = "it holds integers with a scale per group or row"
    if problem:
        raise ConfigError(f"{scheme.name} cannot be GPTQ: {problem}", ELSEWHERE)
    return scheme.stored("F16")


def _encode(ref: Linear, scheme: Scheme, q: QuantizedTensor, offset: int) -> dict[str, Tensor]:
    bits, scale = scheme.weight.bits, exactly(f"{ref.key}.scales", q.scale, "F16")
    if problem := scheme.misfit(ref.out_features, ref.in_features):
        raise ConfigError(f"'{ref.key}' cannot be GPTQ: {problem}", "keep it as it is, or use --to bf16")
    if ref.out_features % (32 // bits):
        raise ConfigError(
            f"'{ref.key}' has {ref.out_features} outputs: GPTQ packs zero points of {32 // bits} outputs to a word",
            ELSEWHERE,
        )
    zeros = scale.new_zeros(scale.shape, dtype=torch_dtype("I8")) if q.zero is None else q.zero
    if offset and (zeros == scheme.weight.qmin).any():
        raise ConfigError(f"'{ref.key}' has a zero point of 0, which GPTQ v1 stores as -1 and cannot", "use --to gptq-v2")
    inputs, size = ref.in_features, ref.in_features // scale.shape[1]
    return {
        f"{ref.key}.qweight": pack_rows(q.codes, bits).T.contiguous(),
        f"{ref.key}.qzeros": pack_rows((zeros - offset).T, bits),
        f"{ref.key}.scales": scale.T.contiguous(),
        f"{ref.key}.g_idx": _groups(inputs, size),
    }


def _config(schemes: Schemes, routers: Iterable[str], checkpoint_format: str) -> dict[str, Any]:
    grid = one_scheme(schemes, "GPTQ").weight
    unquantized = ["lm_head", *sorted({*routers, *(key for key, scheme in schemes.items() if scheme is None)})]
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size or -1,
        "sym": grid.symmetric,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": True,
        "checkpoint_format": checkpoint_format,
        "lm_head": False,
        "dynamic": {f"-:^{re.escape(key)}$": {} for key in unquantized},
    }


def _format(name: FormatName, checkpoint_format: str, offset: int) -> Format:
    return Format(
        name=name,
        parse=_parse,
        planned=planned,
        decode=partial(_decode, offset=offset),
        target=_target,
        encode=partial(_encode, offset=offset),
        config=partial(_config, checkpoint_format=checkpoint_format),
    )


V1, V2 = _format("gptq", "gptq", 1), _format("gptq-v2", "gptq_v2", 0)
