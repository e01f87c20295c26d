"""AWQ checkpoints in gemm packing: names, dtypes and shapes on disk, and their `quantization_config`.

For a weight [out, in] of 4 bits in groups of g inputs: qweight int32 [in, out / 8], unsigned codes of eight outputs to a
word, whose nibbles from the least significant end are the outputs 0, 2, 4, 6, 1, 3, 5, 7; qzeros int32 [in / g, out / 8]
likewise; scales float16 [in / g, out]. w = (q - z) * s. Layout: AutoAWQ.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, field_validator

from quantkit.dtypes import TensorPlan, torch_dtype
from quantkit.errors import ConfigError
from quantkit.formats.base import ELSEWHERE, Entries, Format, Schemes, Tensors, checked, exactly, one_scheme, scale_dtype
from quantkit.formats.gptq import integer_scheme
from quantkit.formats.packing import pack_rows, unpack_rows
from quantkit.model.spec import Linear
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Scheme, weight_only

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AWQ"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
BACK = (0, 4, 1, 5, 2, 6, 3, 7)


class _Config(BaseModel):
    quant_method: Literal["awq"]
    bits: Literal[4]
    group_size: int
    zero_point: Literal[True] = True
    version: Literal["gemm"] = "gemm"

    @field_validator("version", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value


def _parse(quantization_config: Mapping[str, Any], keys: Iterable[str], entries: Entries) -> Schemes:
    """A linear is quantized unless it is there as a plain weight; engines disagree on how the config names exceptions."""
    config = checked(_Config, quantization_config)
    scheme = integer_scheme(config.bits, False, config.group_size)
    schemes: Schemes = {}
    for key in keys:
        plain = f"{key}.weight" in entries and f"{key}.qweight" not in entries
        schemes[key] = None if plain else scheme.stored(scale_dtype(entries, f"{key}.scales", "F16"))
    return schemes


def _planned(ref: Linear, scheme: Scheme) -> list[TensorPlan]:
    groups = scheme.weight.scale_shape(ref.out_features, ref.in_features)[1]
    return [
        TensorPlan(f"{ref.key}.qweight", "I32", (ref.in_features, ref.out_features // 8)),
        TensorPlan(f"{ref.key}.qzeros", "I32", (groups, ref.out_features // 8)),
        TensorPlan(f"{ref.key}.scales", scheme.weight.scale_dtype, (groups, ref.out_features)),
    ]


def _pack(columns: Tensor) -> Tensor:
    """int8 [n, out] -> int32 [n, out / 8]."""
    return pack_rows(columns.unflatten(1, (-1, 8))[:, :, ORDER].flatten(1), 4)


def _unpack(words: Tensor) -> Tensor:
    """Inverse of `_pack`, transposed: int32 [n, out / 8] -> int8 [out, n]."""
    columns: Tensor = unpack_rows(words, 4).unflatten(1, (-1, 8))[:, :, BACK].flatten(1)
    return columns.T.contiguous()


def _decode(ref: Linear, scheme: Scheme, tensors: Tensors) -> QuantizedTensor:
    codes, zero = _unpack(tensors[f"{ref.key}.qweight"]), _unpack(tensors[f"{ref.key}.qzeros"])
    return QuantizedTensor(codes, tensors[f"{ref.key}.scales"].T.contiguous(), zero, scheme.weight)


def _target(scheme: Scheme) -> Scheme:
    """A symmetric weight becomes one whose zero points are all in the middle. Raises ConfigError for what is not AWQ's."""
    grid = scheme.weight
    if grid.bits != 4 or scheme.activation is not None:
        raise ConfigError(
            f"{scheme.name} cannot be AWQ: it holds 4-bit integers and leaves inputs as they are",
            ELSEWHERE,
        )
    return weight_only(4, False, grid.group_size).stored("F16")


def _encode(ref: Linear, scheme: Scheme, q: QuantizedTensor) -> dict[str, Tensor]:
    if ref.out_features % 8:
        raise ConfigError(
            f"'{ref.key}' has {ref.out_features} outputs: AWQ packs eight outputs to a word",
            ELSEWHERE,
        )
    zero = q.scale.new_zeros(q.scale.shape, dtype=torch_dtype("I8")) if q.zero is None else q.zero
    return {
        f"{ref.key}.qweight": _pack(q.codes.T),
        f"{ref.key}.qzeros": _pack(zero.T),
        f"{ref.key}.scales": exactly(f"{ref.key}.scales", q.scale, "F16").T.contiguous(),
    }


def _config(schemes: Schemes, routers: Iterable[str]) -> dict[str, Any]:
    grid = one_scheme(schemes, "AWQ").weight
    unquantized = ["lm_head", *sorted({*routers, *(key for key, scheme in schemes.items() if scheme is None)})]
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": grid.group_size or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": unquantized,
    }


AWQ = Format("awq", _parse, _planned, _decode, _target, _encode, _config)
