"""What to quantise to: `Grid` (how a weight is stored), `Scheme` (weight and activation), `PRESETS` and `Recipe`.

Scheme names and their meaning are those of compressed-tensors' presets; a test holds this table against that library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from quantkit.errors import ConfigError
from quantkit.model.spec import Linear, Role

__all__ = [
    "BF16",
    "FP8_TENSOR",
    "PRESETS",
    "Activation",
    "Grid",
    "Kind",
    "Recipe",
    "Rule",
    "Scheme",
    "Strategy",
    "fp8_block",
    "scheme_named",
    "weight_only",
]

BF16 = "BF16"
Method = Literal["rtn", "gptq"]


class Kind(str, Enum):
    INT = "int"
    FLOAT = "float"


class Strategy(str, Enum):
    """How many weights share a scale: all, one output row, `group_size` of a row, a block, or (activations) a token."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"
    TOKEN = "token"


@dataclass(frozen=True)
class Grid:
    """The values a weight may take: code * scale, or (code - zero) * scale. FLOAT with 8 bits is float8 e4m3fn.

    scale_dtype: what scales are stored in, BF16, F16 or F32. quantkit makes BF16 ones; other tools' are kept as they are.
    """

    kind: Kind
    bits: int
    strategy: Strategy
    symmetric: bool = True
    group_size: int | None = None
    block: tuple[int, int] | None = None
    scale_dtype: str = "BF16"

    @property
    def qmin(self) -> float:
        return -448.0 if self.kind is Kind.FLOAT else -float(2 ** (self.bits - 1))

    @property
    def qmax(self) -> float:
        return 448.0 if self.kind is Kind.FLOAT else float(2 ** (self.bits - 1) - 1)

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, ...]:
        """Shape of the scale (and of the zero point, before packing) of a weight [out_features, in_features]."""
        if self.strategy is Strategy.TENSOR:
            return (1,)
        if self.strategy is Strategy.CHANNEL:
            return (out_features, 1)
        if self.strategy is Strategy.GROUP:
            assert self.group_size
            return (out_features, in_features // self.group_size)
        assert self.block
        return (-(-out_features // self.block[0]), -(-in_features // self.block[1]))


@dataclass(frozen=True)
class Activation:
    """How a linear's input is rounded: per tensor with a calibrated scale, or dynamically per token or token group.

    scale_dtype: what the calibrated scale is stored in.
    """

    kind: Kind
    strategy: Strategy
    dynamic: bool
    group_size: int | None = None
    scale_dtype: str = "BF16"


@dataclass(frozen=True)
class Scheme:
    """A named pair of weight grid and activation rounding (None: the input stays as it is)."""

    name: str
    weight: Grid
    activation: Activation | None = None

    @property
    def static(self) -> bool:
        return self.activation is not None and not self.activation.dynamic

    def stored(self, scale: str, input_scale: str | None = None) -> Scheme:
        """The same with scales of these dtypes; input_scale counts where there is one, and is `scale` unless given."""
        weight = dataclasses.replace(self.weight, scale_dtype=scale)
        if not self.static or self.activation is None:
            return dataclasses.replace(self, weight=weight)
        activation = dataclasses.replace(self.activation, scale_dtype=input_scale or scale)
        return dataclasses.replace(self, weight=weight, activation=activation)

    def misfit(self, out_features: int, in_features: int) -> str | None:
        """Why a weight of that shape cannot take this scheme, or None."""
        grid, groups = self.weight, self.activation.group_size if self.activation else None
        if grid.strategy is Strategy.GROUP and grid.group_size and in_features % grid.group_size:
            return f"in_features {in_features} is not a multiple of group size {grid.group_size}"
        if groups and in_features % groups:
            return f"in_features {in_features} is not a multiple of {groups}, the activation's group"
        word = 32 // grid.bits
        if grid.kind is Kind.INT and self.activation is None and in_features % word:
            return f"in_features {in_features} is not a multiple of {word}, which packing {word} codes to a word needs"
        if not grid.symmetric and out_features % word:
            return f"out_features {out_features} is not a multiple of {word}, which packing zero points needs"
        return None

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Codes, scales and zero points on disk, in bits per weight."""
        scales = 1
        for size in self.weight.scale_shape(out_features, in_features):
            scales *= size
        wide = 32 if self.weight.scale_dtype == "F32" else 16
        extra = scales * (wide + (0 if self.weight.symmetric else self.weight.bits))
        return self.weight.bits + extra / (out_features * in_features)


def _int(bits: int, strategy: Strategy, symmetric: bool = True) -> Grid:
    return Grid(Kind.INT, bits, strategy, symmetric, group_size=128 if strategy is Strategy.GROUP else None)


def _fp8(strategy: Strategy) -> Grid:
    return Grid(Kind.FLOAT, 8, strategy, block=(128, 128) if strategy is Strategy.BLOCK else None)


_ROWS = (
    Scheme("W4A16", _int(4, Strategy.GROUP)),
    Scheme("W4A16_ASYM", _int(4, Strategy.GROUP, symmetric=False)),
    Scheme("W8A16", _int(8, Strategy.GROUP)),
    Scheme("W8A8", _int(8, Strategy.CHANNEL), Activation(Kind.INT, Strategy.TOKEN, dynamic=True)),
    Scheme("FP8_DYNAMIC", _fp8(Strategy.CHANNEL), Activation(Kind.FLOAT, Strategy.TOKEN, dynamic=True)),
    Scheme("FP8", _fp8(Strategy.TENSOR), Activation(Kind.FLOAT, Strategy.TENSOR, dynamic=False)),
    Scheme("FP8_BLOCK", _fp8(Strategy.BLOCK), Activation(Kind.FLOAT, Strategy.GROUP, dynamic=True, group_size=128)),
)
PRESETS: dict[str, Scheme] = {scheme.name: scheme for scheme in _ROWS}


@cache
def scheme_named(name: str, group_size: int | None = None) -> Scheme | None:
    """The preset of that name, with another group size if it has groups; None for BF16. Raises ConfigError."""
    if name == BF16:
        return None
    if name not in PRESETS:
        raise ConfigError(f"unknown scheme '{name}'", f"use one of {', '.join([*PRESETS, BF16])}")
    scheme = PRESETS[name]
    if group_size is None or scheme.weight.strategy is not Strategy.GROUP:
        return scheme
    return dataclasses.replace(scheme, weight=dataclasses.replace(scheme.weight, group_size=group_size))


def weight_only(bits: int, symmetric: bool, group_size: int | None) -> Scheme:
    """Integers that meet inputs as they are, with a scale per group_size inputs of a row, or per row for None."""
    strategy = Strategy.GROUP if group_size else Strategy.CHANNEL
    name = f"W{bits}A16{'' if symmetric else '_ASYM'}{'' if group_size else '_CHANNEL'}"
    return Scheme(name, Grid(Kind.INT, bits, strategy, symmetric, group_size))


def fp8_block(rows: int, columns: int) -> Scheme:
    """FP8_BLOCK with blocks of another size; inputs are rounded per `columns` of a token."""
    scheme = PRESETS["FP8_BLOCK"]
    activation = Activation(Kind.FLOAT, Strategy.GROUP, dynamic=True, group_size=columns)
    return Scheme(scheme.name, dataclasses.replace(scheme.weight, block=(rows, columns)), activation)


# One scale for a whole FP8 weight, and inputs rounded per token: what `activation_scheme: dynamic` means in FP8 checkpoints.
FP8_TENSOR = Scheme("FP8_TENSOR", _fp8(Strategy.TENSOR), Activation(Kind.FLOAT, Strategy.TOKEN, dynamic=True))


class _EachKeyOnce(yaml.SafeLoader):
    """Of equal keys PyYAML takes the last, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[object] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


class Rule(BaseModel):
    """An exception to the roles: linears whose name matches the glob `match` get `scheme`. The first match wins."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    match: str
    scheme: str


class Recipe(BaseModel):
    """All that decides the numbers of a run. The command line's options and a YAML file both end here.

    Raises one ConfigError that names the first field that is wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    scheme: str = "W4A16"
    experts: str | None = None
    shared_experts: str | None = None
    attention: str | None = None
    linears: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    group_size: int | None = Field(default=None, ge=8)
    method: Method | None = None
    calibration: str = "stdlib"
    samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=512, ge=8)
    seed: int = Field(default=0, ge=0)
    add_bos: bool | None = None  # whether raw text gets a beginning-of-text token; None: as the model was trained

    @model_validator(mode="before")
    @classmethod
    def _kept_by_rules(cls, fields: Any) -> Any:
        """`keep: [GLOB, ...]` is short for rules that say BF16, before all others."""
        if not isinstance(fields, dict) or "keep" not in fields:
            return fields
        keep, rules = fields["keep"], fields.get("rules", ())
        if not isinstance(keep, list | tuple) or not isinstance(rules, list | tuple):
            raise ValueError(f"keep is {keep!r}, and must be a list of globs")
        first = [{"match": glob, "scheme": BF16} for glob in keep]
        return {**{key: value for key, value in fields.items() if key != "keep"}, "rules": [*first, *rules]}

    @field_validator("scheme", "experts", "shared_experts", "attention")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            scheme_named(value)
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _one_message(cls, fields: Any, build: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        try:
            return build(fields)
        except ValidationError as error:
            first, where = error.errors()[0], (info.context or {}).get("where", "recipe")
            name = ".".join(str(part) for part in first["loc"])
            known = f"fields are {', '.join([*cls.model_fields, 'keep'])}"
            fix = known if first["type"] == "extra_forbidden" else "see 'quantkit quantize --help' for what is allowed"
            raise ConfigError(f"{where}: field '{name}' is {first['input']!r}: {first['msg']}", fix) from error

    def scheme_of(self, ref: Linear) -> Scheme | None:
        """The scheme of one linear: first matching rule, else its role's, else the general one. None keeps it.

        linears: for an unknown architecture, globs of which a linear must match one.
        """
        if self.linears and not any(fnmatchcase(ref.key, pattern) for pattern in self.linears):
            return None
        for rule in self.rules:
            if fnmatchcase(ref.key, rule.match):
                return scheme_named(rule.scheme, self.group_size)
        by_role = {
            Role.EXPERTS: self.experts,
            Role.SHARED_EXPERTS: self.shared_experts,
            Role.ATTENTION: self.attention,
        }
        return scheme_named(by_role.get(ref.role) or self.scheme, self.group_size)

    def method_of(self, scheme: Scheme) -> Method:
        """GPTQ for 4-bit integers, rounding to nearest for the 8-bit grids, unless the recipe names a method."""
        return self.method or ("gptq" if scheme.weight.kind is Kind.INT and scheme.weight.bits == 4 else "rtn")

    @classmethod
    def read(cls, path: Path, overrides: dict[str, object]) -> Recipe:
        """A recipe from a YAML file; `overrides` (options given on the command line) win. Raises ConfigError."""
        try:
            data = yaml.load(path.read_text("utf-8"), Loader=_EachKeyOnce)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"recipe {path} cannot be read: {error}", "give a YAML file of recipe fields") from error
        if not isinstance(data, dict):
            raise ConfigError(
                f"recipe {path} holds {type(data).__name__}, not fields", "write lines such as 'scheme: W4A16'"
            )
        return cls.of({**data, **overrides}, str(path))

    @classmethod
    def of(cls, fields: dict[str, object], where: str = "recipe") -> Recipe:
        """A recipe from plain fields; `where` they come from, for the message. Raises ConfigError."""
        return cls.model_validate(fields, context={"where": where})
