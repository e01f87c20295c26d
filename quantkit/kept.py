"""How much of a model stays in BF16, and the refusal of a run that leaves much there without being told to."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.chosen import is_kept_by_rule, target
from quantkit.errors import ConfigError
from quantkit.formats.dtypes import FLOATS
from quantkit.formats.reader import CheckpointReader
from quantkit.model.by_name import NamedSpec
from quantkit.model.names import Special, is_outside, specials, template
from quantkit.model.spec import Linear, ModelSpec, Role
from quantkit.scheme import BF16, Recipe, Scheme

__all__ = ["MOST", "check_meant", "share", "share_line"]

MOST = 0.05  # of the bytes of the matrices inside the layers
_BYTES = 2  # of a weight in the source, where it is quantised and its own size is not known any more
_ALWAYS = (Special.ROUTER, Special.GATE)  # are never quantised unless they are named
_OPTIONS = {Role.EXPERTS: "experts", Role.SHARED_EXPERTS: "shared_experts", Role.ATTENTION: "attention"}


def share(reader: CheckpointReader, spec: ModelSpec | NamedSpec, schemes: Mapping[str, Scheme | None]) -> dict[str, float]:
    """The part of the source's bytes that stayed in BF16 (or another plain float): of all, and of the matrices inside the
    layers, routers among them. From 0 to 1, for a checkpoint before or after quantising."""
    quantised = sum(_BYTES * r.out_features * r.in_features for r in spec.linears() if schemes[r.key])
    names = {ref.weight for ref in spec.linears() if schemes[ref.key]}
    plain = {
        name: reader.entries[name].nbytes
        for name in {*spec.tensors(), "lm_head.weight"}
        if name not in names and name in reader.entries and reader.entries[name].dtype in FLOATS
    }
    inside = sum(size for name, size in plain.items() if _is_inside(reader, spec, name))
    kept = sum(plain.values())
    return {
        "of_all": kept / max(kept + quantised, 1),
        "of_matrices_in_layers": inside / max(inside + quantised, 1),
    }


def share_line(found: Mapping[str, float]) -> str:
    return (
        f"in BF16 stayed {found['of_all']:.1%} of the source's bytes, and {found['of_matrices_in_layers']:.1%} of those of "
        "the matrices inside the layers"
    )


def _is_inside(reader: CheckpointReader, spec: ModelSpec | NamedSpec, name: str) -> bool:
    """Whether a tensor is a matrix (or several in one tensor) of a layer."""
    shape = reader.entries[name].shape
    if len(shape) < 2:
        return False
    if isinstance(spec, ModelSpec):
        return name not in spec.around()
    return not is_outside(specials(target(name), shape, reader.config))


def check_meant(
    reader: CheckpointReader, spec: ModelSpec | NamedSpec, recipe: Recipe, schemes: Mapping[str, Scheme | None]
) -> None:
    """Refuse a run that leaves more than MOST of the matrices inside the layers in BF16 where nothing says that it should:
    no rule, no --keep, no option of their role. Raises ConfigError."""
    linears = {ref.weight: ref for ref in spec.linears()}
    total, untold = 0, dict[tuple[str, str], int]()
    for name, entry in reader.entries.items():
        ref = linears.get(name)
        always = ref is None and isinstance(spec, ModelSpec)  # a router
        if entry.dtype not in FLOATS or always or not _is_inside(reader, spec, name):
            continue
        total += entry.nbytes
        if (ref is None or schemes[ref.key] is None) and not _is_told(reader, recipe, name, ref):
            group = template(target(name)), _option(spec, target(name), ref)
            untold[group] = untold.get(group, 0) + entry.nbytes
    left = sum(untold.values())
    if left <= MOST * total:
        return
    largest = sorted(untold.items(), key=lambda item: -item[1])
    shown = "; ".join(f"'{name}' with {size / total:.1%}" for (name, _), size in largest[:3])
    wanted = " ".join([*dict.fromkeys(option for (_, option), _ in largest)][:8])
    raise ConfigError(
        f"{left / total:.1%} of the bytes of the matrices inside the layers would stay in BF16, and nothing says that they "
        f"should: {shown}",
        f"quantise them, or say that it is meant: {wanted}",
    )


def _is_told(reader: CheckpointReader, recipe: Recipe, name: str, ref: Linear | None) -> bool:
    """Whether a tensor that stays was named, or is of a kind that always stays."""
    if is_kept_by_rule(recipe, target(name)):
        return True
    if ref is not None and ref.role in _OPTIONS:
        return bool(getattr(recipe, _OPTIONS[ref.role]) == BF16)
    if ref is not None and ref.role is not Role.LINEAR:
        return False
    found = specials(target(name), reader.entries[name].shape, reader.config)
    return bool(found) and all(special in _ALWAYS for special in found.values())


def _option(spec: ModelSpec | NamedSpec, name: str, ref: Linear | None) -> str:
    """What says that this tensor stays on purpose."""
    role = _OPTIONS.get(ref.role) if ref is not None else None
    return f"--{role.replace('_', '-')} BF16" if role else f"--keep '{template(name)}'"
