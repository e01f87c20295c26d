"""Checkpoints with `quant_method: fp8`: names, dtypes and shapes on disk, and their `quantization_config`.

A weight is float8_e4m3fn [out, in] under its own name; scales are multipliers, float32. Three spellings exist:

* `fp8`, as AutoFP8 and vLLM write it: weight_scale, one value; input_scale, one value, when activation_scheme is static.
* `fp8-transformers`: the same under the names weight_scale_inv and activation_scale, which transformers loads.
* `deepseek-fp8`: weight_scale_inv [out / rows, in / columns] (rounded up), weight_block_size [rows, columns]; inputs are
  rounded per `columns` of a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, PositiveInt

from quantkit.choices import FormatName
from quantkit.dtypes import FLOATS, TensorPlan
from quantkit.errors import ConfigError
from quantkit.formats.base import ELSEWHERE, Entries, Format, Schemes, Tensors, checked, exactly, one_scheme, scale_dtype
from quantkit.model.spec import Linear
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import FP8_TENSOR, PRESETS, Kind, Scheme, Strategy, fp8_block

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AUTOFP8", "DEEPSEEK", "TRANSFORMERS"]


@dataclass(frozen=True)
class _Names:
    scale: str
    input_scale: str


class _Config(BaseModel):
    quant_method: Literal["fp8"]
    activation_scheme: Literal["static", "dynamic"] = "dynamic"
    fmt: Literal["e4m3", "float8_e4m3fn", None] = None
    weight_block_size: tuple[PositiveInt, PositiveInt] | None = None
    ignored_layers: tuple[str, ...] | None = None
    modules_to_not_convert: tuple[str, ...] | None = None


def _scheme(config: _Config) -> Scheme:
    static = config.activation_scheme == "static"
    if config.weight_block_size is None:
        return PRESETS["FP8"] if static else FP8_TENSOR
    if static:
        raise ConfigError("quantization_config: blocks of weights with a static activation_scheme", "no engine has this")
    return fp8_block(*config.weight_block_size)


def _parse(quantization_config: Mapping[str, Any], keys: Iterable[str], entries: Entries, names: _Names) -> Schemes:
    """A linear is quantized unless its weight is stored in a wider float: engines disagree on how exceptions are matched."""
    config = checked(_Config, quantization_config)
    scheme, named = _scheme(config), {*(config.ignored_layers or ()), *(config.modules_to_not_convert or ())}
    schemes: Schemes = {}
    for key in keys:
        weight = entries.get(f"{key}.weight")
        plain = weight is not None and weight.dtype in FLOATS
        if key in named and weight is not None and not plain:
            raise ConfigError(f"quantization_config keeps '{key}', but it is {weight.dtype}", "fetch config.json again")
        scales = (scale_dtype(entries, f"{key}.{name}", "F32") for name in (names.scale, names.input_scale))
        schemes[key] = None if plain else scheme.stored(*scales)
    return schemes


def _planned(ref: Linear, scheme: Scheme, names: _Names) -> list[TensorPlan]:
    out, inputs, grid = ref.out_features, ref.in_features, scheme.weight
    shape = grid.scale_shape(out, inputs) if grid.block else ()
    plans = [
        TensorPlan(f"{ref.key}.weight", "F8_E4M3", (out, inputs)),
        TensorPlan(f"{ref.key}.{names.scale}", grid.scale_dtype, shape),
    ]
    if scheme.static and scheme.activation:
        plans.append(TensorPlan(f"{ref.key}.{names.input_scale}", scheme.activation.scale_dtype, ()))
    return plans


def _decode(ref: Linear, scheme: Scheme, tensors: Tensors, names: _Names) -> QuantizedTensor:
    shape = scheme.weight.scale_shape(ref.out_features, ref.in_features)
    calibrated = tensors[f"{ref.key}.{names.input_scale}"].reshape(1) if scheme.static else None
    step = tensors[f"{ref.key}.{names.scale}"].reshape(shape)
    return QuantizedTensor(tensors[f"{ref.key}.weight"], step, None, scheme.weight, calibrated)


def _target(scheme: Scheme, name: str, block: bool) -> Scheme:
    """Raises ConfigError for what this spelling does not hold."""
    expected = Strategy.BLOCK if block else Strategy.TENSOR
    if scheme.weight.kind is not Kind.FLOAT or scheme.weight.strategy is not expected:
        what = "a scale per block" if block else "one scale for a weight"
        raise ConfigError(f"{scheme.name} cannot be {name}: it holds FP8 with {what}", ELSEWHERE)
    return scheme.stored("F32")


def _encode(ref: Linear, scheme: Scheme, q: QuantizedTensor, names: _Names) -> dict[str, Tensor]:
    scale, input_scale = f"{ref.key}.{names.scale}", f"{ref.key}.{names.input_scale}"
    values = exactly(scale, q.scale, "F32")
    tensors = {f"{ref.key}.weight": q.codes, scale: values if scheme.weight.block else values.reshape(())}
    if q.input_scale is not None:
        tensors[input_scale] = exactly(input_scale, q.input_scale, "F32").reshape(())
    return tensors


def _config(schemes: Schemes, routers: Iterable[str]) -> dict[str, Any]:
    scheme = one_scheme(schemes, "an fp8 checkpoint")
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "static" if scheme.static else "dynamic",
        "weight_block_size": list(scheme.weight.block) if scheme.weight.block else None,
        "ignored_layers": ["lm_head", *sorted({*routers, *(key for key, assigned in schemes.items() if assigned is None)})],
    }


def _format(name: FormatName, scale: str, input_scale: str, block: bool) -> Format:
    names = _Names(scale, input_scale)
    return Format(
        name=name,
        parse=partial(_parse, names=names),
        planned=partial(_planned, names=names),
        decode=partial(_decode, names=names),
        target=partial(_target, name=name, block=block),
        encode=partial(_encode, names=names),
        config=_config,
    )


AUTOFP8 = _format("fp8", "weight_scale", "input_scale", block=False)
TRANSFORMERS = _format("fp8-transformers", "weight_scale_inv", "activation_scale", block=False)
DEEPSEEK = _format("deepseek-fp8", "weight_scale_inv", "activation_scale", block=True)
