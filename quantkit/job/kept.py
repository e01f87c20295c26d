"""How much of a model stays in BF16, and the refusal of a run that leaves much there without being told to."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.checkpoint.by_name import NamedSpec
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.share import is_inside
from quantkit.dtypes import FLOATS
from quantkit.errors import ConfigError
from quantkit.job.chosen import is_kept_by_rule
from quantkit.model.names import Special, specials, target, template
from quantkit.model.spec import OPTION_ROLES, Linear, ModelSpec, Role
from quantkit.recipe import Recipe
from quantkit.scheme import BF16, Scheme

__all__ = ["MOST", "check_meant"]

MOST = 0.05  # of the bytes of the matrices inside the layers
_ALWAYS = (Special.ROUTER, Special.GATE)  # are never quantized unless they are named


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
        if entry.dtype not in FLOATS or always or not is_inside(reader, spec, name):
            continue
        total += entry.nbytes
        if (ref is None or schemes[ref.key] is None) and not _is_told(reader, recipe, name, ref):
            group = template(target(name)), _option(spec, target(name), ref)
            untold[group] = untold.get(group, 0) + entry.nbytes
    left = sum(untold.values())
    if left <= MOST * total:
        return
    largest = sorted(untold.items(), key=lambda item: -item[1])
    examples = "; ".join(f"'{name}' with {size / total:.1%}" for (name, _), size in largest[:3])
    options = " ".join([*dict.fromkeys(option for (_, option), _ in largest)][:8])
    raise ConfigError(
        f"{left / total:.1%} of the bytes of the matrices inside the layers would stay in BF16, and nothing says that they "
        f"should: {examples}",
        f"quantize them, or say that it is meant: {options}",
    )


def _is_told(reader: CheckpointReader, recipe: Recipe, name: str, ref: Linear | None) -> bool:
    """Whether a tensor that stays was named, or is of a kind that always stays."""
    if is_kept_by_rule(recipe, target(name)):
        return True
    if ref is not None and ref.role in OPTION_ROLES:
        return bool(getattr(recipe, ref.role.value) == BF16)
    if ref is not None and ref.role is not Role.LINEAR:
        return False
    parts = specials(target(name), reader.entries[name].shape, reader.config)
    return bool(parts) and all(special in _ALWAYS for special in parts.values())


def _option(spec: ModelSpec | NamedSpec, name: str, ref: Linear | None) -> str:
    """What says that this tensor stays on purpose."""
    if ref is not None and ref.role in OPTION_ROLES:
        return f"{ref.role.option} BF16"
    return f"--keep '{template(name)}'"
