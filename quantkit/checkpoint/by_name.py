"""A checkpoint of an architecture that quantkit does not know: linears chosen by name, and rounded without a forward pass.

Every matrix called `*.weight` may be chosen; which are, a recipe's `linears` patterns say. All else is carried over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import ConfigError, shown
from quantkit.formats import compressed_tensors
from quantkit.model.registry import ARCHITECTURES, build_spec
from quantkit.model.spec import Linear, ModelSpec, MoE, Role

__all__ = ["NamedSpec", "Part", "is_known", "spec_by_name", "spec_of"]

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What one shard of the source holds: its matrices, and other tensors with their shapes. Stands for a `Layer`."""

    index: int
    refs: tuple[Linear, ...]
    others: tuple[tuple[str, Shape], ...]

    def linears(self) -> tuple[Linear, ...]:
        return self.refs

    def same_input(self) -> list[tuple[Linear, ...]]:
        """Each alone: what reads the same input is not known."""
        return [(ref,) for ref in self.refs]

    def kept(self) -> dict[str, Shape]:
        return dict(self.others)


@dataclass(frozen=True)
class NamedSpec:
    """A model as a set of tensors. Has what planning, writing and verifying ask of a `ModelSpec`, and cannot be run."""

    architecture: str
    layers: tuple[Part, ...]

    def linears(self) -> Iterator[Linear]:
        for part in self.layers:
            yield from part.refs

    def tensors(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for part in self.layers:
            shapes.update({ref.weight: (ref.out_features, ref.in_features) for ref in part.refs})
            shapes.update(part.others)
        return shapes

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors().values())

    def groups(self) -> list[tuple[Part, ...]]:
        return [(part,) for part in self.layers]

    def moes(self) -> list[MoE]:
        return []

    def around(self) -> tuple[str, ...]:
        return ()


def is_known(config: Mapping[str, Any]) -> bool:
    name = config.get("model_type")
    return isinstance(name, str) and name in ARCHITECTURES


def spec_by_name(reader: CheckpointReader) -> NamedSpec:
    """A checkpoint, quantized or not, as its matrices and the rest. Raises ConfigError when it has no matrix."""
    entries = reader.entries
    shapes, others = compressed_tensors.matrices({name: (e.dtype, e.shape) for name, e in entries.items()}, reader.tensor)
    if not shapes:
        raise ConfigError(f"{reader.folder} holds no matrix called '*.weight'", "give a model's checkpoint")
    refs: dict[str, list[Linear]] = {shard: [] for shard in reader.shards}
    rest: dict[str, list[tuple[str, Shape]]] = {shard: [] for shard in reader.shards}
    for key, (out, inputs) in shapes.items():
        stored = entries.get(f"{key}.weight") or entries[f"{key}.weight_packed"]
        refs[stored.shard].append(Linear(key, out, inputs, Role.LINEAR))
    for name in others:
        rest[entries[name].shard].append((name, entries[name].shape))
    parts = (Part(i, tuple(refs[shard]), tuple(rest[shard])) for i, shard in enumerate(reader.shards))
    return NamedSpec(f"{shown(reader.config.get('model_type'))} (by name)", tuple(parts))


def spec_of(reader: CheckpointReader) -> ModelSpec | NamedSpec:
    """A checkpoint's architecture, or the tensors of a quantized one whose architecture is unknown. Raises ConfigError."""
    if reader.config.get("quantization_config") and not is_known(reader.config):
        return spec_by_name(reader)
    return build_spec(reader.config, str(reader.folder / "config.json"))
