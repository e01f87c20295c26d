"""How much of a model stays in BF16."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.checkpoint.by_name import NamedSpec
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.dtypes import FLOATS
from quantkit.model.names import is_outside, specials, target
from quantkit.model.spec import HEAD, ModelSpec
from quantkit.scheme import Scheme

__all__ = ["is_inside", "share", "share_line"]

_BYTES = 2  # of a weight in the source, where it is quantized and its own size is not known any more


def share(reader: CheckpointReader, spec: ModelSpec | NamedSpec, schemes: Mapping[str, Scheme | None]) -> dict[str, float]:
    """The part of the source's bytes that stayed in BF16 (or another plain float): of all, and of the matrices inside the
    layers, routers among them. From 0 to 1, for a checkpoint before or after quantizing."""
    quantized = sum(_BYTES * r.out_features * r.in_features for r in spec.linears() if schemes[r.key])
    names = {ref.weight for ref in spec.linears() if schemes[ref.key]}
    plain = {
        name: reader.entries[name].nbytes
        for name in {*spec.tensors(), HEAD}
        if name not in names and name in reader.entries and reader.entries[name].dtype in FLOATS
    }
    inside = sum(size for name, size in plain.items() if is_inside(reader, spec, name))
    plain_bytes = sum(plain.values())
    return {
        "of_all": plain_bytes / max(plain_bytes + quantized, 1),
        "of_matrices_in_layers": inside / max(inside + quantized, 1),
    }


def share_line(shares: Mapping[str, float]) -> str:
    return (
        f"in BF16 stayed {shares['of_all']:.1%} of the source's bytes, and {shares['of_matrices_in_layers']:.1%} of those "
        "of the matrices inside the layers"
    )


def is_inside(reader: CheckpointReader, spec: ModelSpec | NamedSpec, name: str) -> bool:
    """Whether a tensor is a matrix (or several in one tensor) of a layer."""
    shape = reader.entries[name].shape
    if len(shape) < 2:
        return False
    if isinstance(spec, ModelSpec):
        return name not in spec.around()
    return not is_outside(specials(target(name), shape, reader.config))
