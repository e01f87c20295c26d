"""What is in a checkpoint, from its headers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from quantkit.checkpoint.by_name import spec_of
from quantkit.checkpoint.opened import format_of, schemes_of
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.sets import weight_sets
from quantkit.checkpoint.share import share
from quantkit.checkpoint.stored import head_problem
from quantkit.model.spec import HEAD, ModelSpec
from quantkit.scheme import labels

__all__ = ["inspect"]


def inspect(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds: per role the schemes, linears, weights, bytes and bits per weight; the same in total."""
    reader = CheckpointReader(folder)
    spec = spec_of(reader)
    schemes, layout = schemes_of(reader), format_of(reader)
    names_of = labels(schemes.values())
    roles: dict[str, dict[str, Any]] = {}
    counted = 0

    def count(role: str, scheme: str, weights: int, size: int) -> None:
        row = roles.setdefault(role, {"schemes": [], "tensors": 0, "weights": 0, "bytes": 0})
        row["schemes"] += [scheme] if scheme not in row["schemes"] else []
        row["tensors"] += 1
        row["weights"] += weights
        row["bytes"] += size

    for ref in spec.linears():
        scheme = schemes[ref.key]
        names = [t.name for t in layout.planned(ref, scheme) if t.name in reader.entries] if scheme else [ref.weight]
        size = sum(reader.entry(name).nbytes for name in names)
        label = names_of[scheme] if scheme else reader.entry(ref.weight).dtype
        count(ref.role.value, label, ref.out_features * ref.in_features, size)
        counted += size
    others = spec.tensors().keys() - {ref.weight for ref in spec.linears()}
    for key in sorted({*others, HEAD} & reader.entries.keys()):
        entry = reader.entries[key]
        role = "norms and router" if isinstance(spec, ModelSpec) else "others"
        role = "embedding and head" if key in (*spec.around()[:1], HEAD) else role
        count(role, entry.dtype, math.prod(entry.shape), entry.nbytes)
        counted += entry.nbytes
    for row in roles.values():
        row["bits_per_weight"] = round(8 * row["bytes"] / row["weights"], 3)
    total = {key: sum(row[key] for row in roles.values()) for key in ("tensors", "weights", "bytes")}
    differing = head_problem(reader, spec) if isinstance(spec, ModelSpec) else None
    return {
        "path": str(folder),
        "architecture": spec.architecture,
        "layers": len(spec.layers),
        "quantized": any(schemes.values()),
        "format": layout.name if any(schemes.values()) else None,
        "shards": len(reader.shards),
        "roles": roles,
        "total": {**total, "bits_per_weight": round(8 * total["bytes"] / total["weights"], 3)},
        "bf16_share": share(reader, spec, schemes),
        "notes": [*weight_sets(folder), *([differing] if differing else [])],
        "unknown_bytes": sum(entry.nbytes for entry in reader.entries.values()) - counted,
    }
