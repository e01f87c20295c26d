"""What to quantize to: `CODES` (what a code is), `Grid` (how a weight is stored), `Scheme` (weight and inputs), `PRESETS`.

Scheme names and their meaning are those of compressed-tensors' presets; a test holds this table against that library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache

from quantkit.errors import ConfigError

__all__ = [
    "BF16",
    "CODES",
    "FP8_TENSOR",
    "PRESETS",
    "Activation",
    "Codes",
    "Grid",
    "Kind",
    "Packing",
    "Scheme",
    "Strategy",
    "fp8_block",
    "labels",
    "scheme_named",
    "weight_only",
]

BF16 = "BF16"


class Kind(str, Enum):
    INT = "int"
    FLOAT = "float"


class Packing(str, Enum):
    """How codes lie in a compressed-tensors file, by its name for that. WORDS: as many as fit in an int32, as in
    `formats.packing`; BYTES, FLOATS: each code is an element."""

    WORDS = "pack-quantized"
    BYTES = "int-quantized"
    FLOATS = "float-quantized"


@dataclass(frozen=True)
class Codes:
    """One type of code: a row of `CODES`.

    smallest, largest: the range of codes. dtype: of a code in memory, and on disk where codes are elements. scale_dtype: of
    the scales that quantkit makes. packing: on disk, by what inputs are rounded to (None: they are not); a pair that is not
    there is not stored. worst: ||W - Q|| / ||W|| that no sound rounding reaches on a weight of any usual distribution, and
    every wrong layout exceeds.
    """

    kind: Kind
    bits: int
    smallest: float
    largest: float
    dtype: str
    scale_dtype: str
    packing: Mapping[Kind | None, Packing]
    worst: float


_INT4_FILES = {None: Packing.WORDS, Kind.FLOAT: Packing.WORDS}
_INT8_FILES = {None: Packing.WORDS, Kind.INT: Packing.BYTES}
_E4M3_FILES = {None: Packing.FLOATS, Kind.FLOAT: Packing.FLOATS}
# What a weight's codes may be, and all that follows from it alone. Scales have one level: no type here has a second.
CODES: dict[tuple[Kind, int], Codes] = {
    (row.kind, row.bits): row
    for row in (
        Codes(Kind.INT, 4, -8.0, 7.0, "I8", "BF16", _INT4_FILES, worst=0.5),
        Codes(Kind.INT, 8, -128.0, 127.0, "I8", "BF16", _INT8_FILES, worst=0.1),
        Codes(Kind.FLOAT, 8, -448.0, 448.0, "F8_E4M3", "BF16", _E4M3_FILES, worst=0.1),
    )
}


class Strategy(str, Enum):
    """How many weights share a scale: all, one output row, `group_size` of a row, a block, or (activations) a token."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"
    TOKEN = "token"


@dataclass(frozen=True)
class Grid:
    """The values a weight may take: code * scale, or (code - zero) * scale. Its kind and bits are a row of `CODES`.

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
    def codes(self) -> Codes:
        """Raises ConfigError for a type of code that quantkit does not have."""
        if (self.kind, self.bits) not in CODES:
            supported = ", ".join(f"{bits}-bit {kind.value}" for kind, bits in CODES)
            raise ConfigError(f"there are no {self.bits}-bit {self.kind.value} codes", f"quantkit has {supported}")
        return CODES[self.kind, self.bits]

    @property
    def signed(self) -> bool:
        """Whether a scale may be negative: symmetric integers reach one further on one side, and either may be that one."""
        return self.symmetric and self.kind is Kind.INT

    @property
    def qmin(self) -> float:
        return self.codes.smallest

    @property
    def qmax(self) -> float:
        return self.codes.largest

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

    @property
    def packing(self) -> Packing:
        """How codes lie on disk. Raises ConfigError where such codes with such inputs are not stored."""
        inputs = self.activation.kind if self.activation else None
        if inputs not in self.weight.codes.packing:
            rounded = f"inputs rounded to {inputs.value}" if inputs else "inputs as they are"
            raise ConfigError(
                f"{self.name}: {self.weight.bits}-bit {self.weight.kind.value} codes with {rounded} have no place on disk",
                f"use one of {', '.join(PRESETS)}",
            )
        return self.weight.codes.packing[inputs]

    @property
    def full_name(self) -> str:
        """The name, with the size of its groups where that is not the preset's."""
        size, preset = self.weight.group_size, PRESETS.get(self.name)
        return f"{self.name} in groups of {size}" if size and (not preset or preset.weight.group_size != size) else self.name

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
        if self.packing is Packing.WORDS and in_features % word:
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
    size = 128 if strategy is Strategy.GROUP else None
    return Grid(Kind.INT, bits, strategy, symmetric, size, scale_dtype=CODES[Kind.INT, bits].scale_dtype)


def _fp8(strategy: Strategy) -> Grid:
    block = (128, 128) if strategy is Strategy.BLOCK else None
    return Grid(Kind.FLOAT, 8, strategy, block=block, scale_dtype=CODES[Kind.FLOAT, 8].scale_dtype)


_ROWS = (
    Scheme("W4A16", _int(4, Strategy.GROUP)),
    Scheme("W4A16_ASYM", _int(4, Strategy.GROUP, symmetric=False)),
    Scheme("W4AFP8", _int(4, Strategy.GROUP), Activation(Kind.FLOAT, Strategy.TOKEN, dynamic=True)),
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


def labels(schemes: Iterable[Scheme | None]) -> dict[Scheme | None, str]:
    """What to call each: its name, with the size of its groups where the same name stands for several."""
    distinct = dict.fromkeys(schemes)
    sizes: dict[str, set[int | None]] = {}
    for scheme in distinct:
        if scheme:
            sizes.setdefault(scheme.name, set()).add(scheme.weight.group_size)
    return {s: BF16 if s is None else s.full_name if len(sizes[s.name]) > 1 else s.name for s in distinct}


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
