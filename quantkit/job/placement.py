"""Where everything of OUT goes: units, which are committed at once, and their shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from quantkit.checkpoint.by_name import NamedSpec, Part
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.writer import ShardPlan
from quantkit.dtypes import TensorPlan
from quantkit.formats import compressed_tensors
from quantkit.model.spec import Layer, ModelSpec
from quantkit.scheme import Scheme

__all__ = ["MAX_SHARD_BYTES", "Unit", "in_shards", "place", "shard_name"]

MAX_SHARD_BYTES = 5_000_000_000
T = TypeVar("T")


@dataclass(frozen=True)
class Unit:
    """What is committed at once: layers that share K/V (none for the tensors around the layers), and their shards.

    In a model of unknown architecture a part of its tensors stands for a layer.
    """

    layers: tuple[Layer, ...] | tuple[Part, ...]
    kept: tuple[str, ...]
    shards: tuple[ShardPlan, ...]

    def source(self) -> list[str]:
        """The tensors of the source that it is made from."""
        return [*self.kept, *(ref.weight for layer in self.layers for ref in layer.linears())]


def place(reader: CheckpointReader, spec: ModelSpec | NamedSpec, schemes: dict[str, Scheme | None]) -> tuple[Unit, ...]:
    """Around the layers first, then each group of layers; every tensor placed in a shard of at most MAX_SHARD_BYTES."""

    def plain(key: str) -> TensorPlan:
        return TensorPlan(key, reader.entries[key].dtype, reader.entries[key].shape)

    around = [key for key in spec.around() if key in reader.entries]
    drafts: list[tuple[tuple[Layer, ...] | tuple[Part, ...], tuple[str, ...], list[TensorPlan]]] = []
    if around:
        drafts.append(((), tuple(around), [plain(key) for key in around]))
    for layers in spec.groups():
        plain_keys: list[str] = []
        tensors: list[TensorPlan] = []
        for layer in layers:
            plain_keys += layer.kept()
            tensors += [plain(key) for key in layer.kept()]
            for ref in layer.linears():
                scheme = schemes[ref.key]
                tensors += compressed_tensors.planned(ref, scheme) if scheme else [plain(ref.weight)]
        drafts.append((layers, tuple(plain_keys), tensors))
    split = [in_shards(tensors, lambda tensor: tensor.nbytes) for _, _, tensors in drafts]
    total, number, units = sum(map(len, split)), 0, []
    for (layers, kept_keys, _), parts in zip(drafts, split, strict=True):
        shards = []
        for part in parts:
            number += 1
            shards.append(ShardPlan(shard_name(number, total), part))
        units.append(Unit(layers, kept_keys, tuple(shards)))
    return tuple(units)


def in_shards(items: Iterable[T], nbytes: Callable[[T], int]) -> list[list[T]]:
    """Items in their order, as many to a shard as MAX_SHARD_BYTES hold; a larger one is alone."""
    parts: list[list[T]] = [[]]
    size = 0
    for item in items:
        wide = nbytes(item)
        if parts[-1] and size + wide > MAX_SHARD_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(item)
        size += wide
    return parts


def shard_name(number: int, total: int) -> str:
    """Of the shards 1 to total."""
    return f"model-{number:05d}-of-{total:05d}.safetensors"
