"""Rules that only a file can break: they read headers and the few scalars that decide, never a weight."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.engines.rules import View
from quantkit.model.spec import MoE

__all__ = ["random_experts", "unequal_input_scales"]


def unequal_input_scales(view: View, reader: CheckpointReader) -> Iterator[str]:
    """Experts whose gate and up have different input scales (static FP8)."""
    pairs = [
        (f"{expert.gate.key}.input_scale", f"{expert.up.key}.input_scale")
        for layer in view.spec.layers
        if isinstance(layer.mlp, MoE)
        for expert in layer.mlp.experts
    ]
    pairs = [pair for pair in pairs if pair[0] in reader.entries and pair[1] in reader.entries]
    values = scalars(reader, {name for pair in pairs for name in pair})
    for gate, up in pairs:
        if not abs(values[gate] - values[up]) <= 1e-5:
            yield f"'{gate}' is {values[gate]:.6g} and '{up}' is {values[up]:.6g}"


def random_experts(view: View, reader: CheckpointReader) -> Iterator[str]:
    """Mixtral experts under names that transformers does not read."""
    if view.model_type == "mixtral":
        pattern = re.compile(r".*\.block_sparse_moe\.experts\.\d+\.(gate|up|down)_proj\.")
        names = [name for name in reader.entries if pattern.match(name)]
        if names:
            yield f"{len(names)} tensors such as '{names[0]}' are not read: those experts stay random"


def scalars(reader: CheckpointReader, names: Iterable[str]) -> dict[str, float]:
    """Tensors of one element, shard after shard."""
    values: dict[str, float] = {}
    for name in sorted(names, key=lambda name: reader.entries[name].shard):
        tensor = reader.stored(name)
        values[name] = float(tensor) if tensor.numel() == 1 else float("nan")
    return values
