"""What a format of quantized checkpoints is to the rest of quantkit: a few functions, in one row of `formats.table`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from quantkit.choices import FormatName
from quantkit.dtypes import FLOATS, Entry, TensorPlan, torch_dtype
from quantkit.errors import ConfigError
from quantkit.model.spec import Linear
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Scheme, labels

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "ELSEWHERE",
    "KV_SCALE",
    "Entries",
    "Format",
    "Schemes",
    "Tensors",
    "checked",
    "exactly",
    "one_scheme",
    "scale_dtype",
]

Schemes = dict[str, Scheme | None]
Entries = Mapping[str, Entry]
Tensors = Mapping[str, "Tensor"]
Config = TypeVar("Config", bound=BaseModel)

# What to do with a checkpoint that another format cannot hold; it may be compressed-tensors already.
ELSEWHERE = "compressed-tensors can hold it: keep it so, or use --to compressed-tensors; or --to bf16"
# Scales of an FP8 K/V cache, in every spelling that engines load. They stand beside the weights in any format.
KV_SCALE = re.compile(r".*\.self_attn\.(attn\.)?([kv]_scale|kv_scale|[kv]_proj\.([kv]_scale|output_scale))$")


@dataclass(frozen=True)
class Format:
    """name: as `quantkit convert --to` spells it.

    parse(quantization_config, keys, entries): the scheme of every linear named in keys, None where it is kept. Raises
    ConfigError. planned(linear, scheme): the tensors that it is on disk. decode(linear, scheme, tensors): those as codes and
    scales, on whatever device they lie; raises CheckpointError. target(scheme): the scheme as this format stores it, with
    the same values; raises ConfigError with the reason where it cannot. encode(linear, scheme, q): the tensors to write;
    raises ConfigError for values that it cannot hold. config(schemes, routers): the quantization_config.
    """

    name: FormatName
    parse: Callable[[Mapping[str, Any], Iterable[str], Entries], Schemes]
    planned: Callable[[Linear, Scheme], list[TensorPlan]]
    decode: Callable[[Linear, Scheme, Tensors], QuantizedTensor]
    target: Callable[[Scheme], Scheme]
    encode: Callable[[Linear, Scheme, QuantizedTensor], dict[str, Tensor]]
    config: Callable[[Schemes, Iterable[str]], dict[str, Any]]


def scale_dtype(entries: Entries, name: str, default: str) -> str:
    """What a scale is stored in. A missing one, or one that is no float, is reported when names and dtypes are checked."""
    return entries[name].dtype if name in entries and entries[name].dtype in FLOATS else default


def checked(model: type[Config], quantization_config: Mapping[str, Any]) -> Config:
    """A quantization_config's fields, those that `model` knows. Raises ConfigError that names the first that is wrong."""
    try:
        return model.model_validate(quantization_config)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"quantization_config: '{field}' is {first['input']!r}: {first['msg']}",
            "quantkit reads no such variant; fetch config.json again if it should be another",
        ) from error


def one_scheme(schemes: Schemes, name: str) -> Scheme:
    """The only scheme of a format that has but one. Raises ConfigError when there are several."""
    distinct = {scheme for scheme in schemes.values() if scheme is not None}
    if len(distinct) > 1:
        raise ConfigError(
            f"{name} holds one scheme for all quantized linears, this checkpoint has {sorted(labels(distinct).values())}",
            ELSEWHERE,
        )
    return next(iter(distinct))


def exactly(name: str, values: Tensor, dtype: str) -> Tensor:
    """values in another float dtype. Raises ConfigError when one of them would have to be rounded."""
    cast = values.to(torch_dtype(dtype))
    wrong = cast.double() != values.double()
    if wrong.any():
        first = values[wrong][0].item()
        raise ConfigError(
            f"'{name}': {dtype} cannot hold {int(wrong.sum())} of its values exactly, the first {first:.9g}",
            ELSEWHERE,
        )
    return cast
