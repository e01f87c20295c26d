"""What an allocation decides about: groups of linears that get one scheme, and the schemes that each may get.

Linears that engines fuse (q, k, v; gate, up), and all experts of a layer, are never parted. In a deep model the same linears
of neighbouring layers are one group, since every group costs a measurement for each of its schemes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import ConfigError
from quantkit.formats import compressed_tensors
from quantkit.model.spec import Layer, Linear, ModelSpec, Role
from quantkit.recipe import Recipe
from quantkit.scheme import BF16, Scheme, scheme_named

__all__ = ["BANDS", "Group", "groups_of", "label", "assigned", "named", "nbytes"]

BANDS = 16  # of neighbouring layers, at most
_GROUPED = re.compile(r"(\w+):(\d+)")


@dataclass(frozen=True)
class Group:
    """kind: what groups of other layers share with it. linears: those that get one scheme. choices: the schemes that
    it may get, None for BF16."""

    name: str
    kind: str
    role: Role
    layers: tuple[int, ...]
    linears: tuple[Linear, ...]
    choices: tuple[Scheme | None, ...]

    @property
    def weights(self) -> int:
        return sum(ref.out_features * ref.in_features for ref in self.linears)


def named(text: str, group_size: int | None = None) -> Scheme | None:
    """`W4A16`, `W4A16:32` for groups of 32, or BF16. group_size: of groups, where the text says none. Raises ConfigError."""
    match = _GROUPED.fullmatch(text)
    scheme = scheme_named(match[1], int(match[2])) if match else scheme_named(text, group_size)
    if match and (scheme is None or not scheme.weight.group_size):
        raise ConfigError(f"scheme '{text}' says a size of groups, and {match[1]} has none", f"give {match[1]}")
    return scheme


def label(scheme: Scheme | None) -> str:
    """What `named` reads."""
    if scheme is None:
        return BF16
    size = scheme.weight.group_size
    return f"{scheme.name}:{size}" if size and size != 128 else scheme.name


def nbytes(reader: CheckpointReader, group: Group, scheme: Scheme | None) -> int:
    """What the group takes on disk, as the plan counts it."""
    if scheme is None:
        return sum(reader.entries[ref.weight].nbytes for ref in group.linears)
    return sum(tensor.nbytes for ref in group.linears for tensor in compressed_tensors.planned(ref, scheme))


def groups_of(spec: ModelSpec, recipe: Recipe, schemes: Sequence[Scheme | None], bands: int = BANDS) -> tuple[Group, ...]:
    """The groups, in the order of their layers. What the recipe says of a role or in a rule is no choice any more. Raises
    ConfigError where a group has none that fits."""
    kinds: dict[tuple[int, str], list[tuple[Layer, tuple[Linear, ...]]]] = {}
    for number, layer in enumerate(spec.layers):
        band = number * min(bands, len(spec.layers)) // len(spec.layers)
        for refs in _together(layer):
            kinds.setdefault((band, _kind(refs)), []).append((layer, refs))
    groups = []
    for (_, kind), members in sorted(kinds.items(), key=lambda item: item[1][0][0].index):
        layers = tuple(layer.index for layer, _ in members)
        linears = tuple(ref for _, refs in members for ref in refs)
        first, last = layers[0], layers[-1]
        name = f"{f'layers {first}-{last}' if first != last else f'layer {first}'} {kind}"
        groups.append(_chosen(Group(name, kind, linears[0].role, layers, linears, tuple(schemes)), recipe))
    return tuple(groups)


def _together(layer: Layer) -> list[tuple[Linear, ...]]:
    """The linears of a layer that get one scheme."""
    experts = tuple(ref for ref in layer.linears() if ref.role is Role.EXPERTS)
    others = [refs for refs in layer.same_input() if refs[0].role is not Role.EXPERTS]
    return [*others, experts] if experts else others


def _kind(refs: Iterable[Linear]) -> str:
    """Of linears of one layer, what the same ones of another layer have in common with them."""
    refs = tuple(refs)
    if refs[0].role is Role.EXPERTS:
        return Role.EXPERTS.value
    return f"{refs[0].role.value} {','.join(ref.key.rpartition('.')[2] for ref in refs)}"


def _chosen(group: Group, recipe: Recipe) -> Group:
    """The group with what the recipe leaves it of its choices, and what fits its shapes."""
    stated = {_said(ref, recipe) for ref in group.linears}
    if len(stated) > 1:
        words = ", ".join(sorted(label(s) if not isinstance(s, str) else s for s in stated))
        raise ConfigError(
            f"{group.name}: the recipe says different things of linears that get one scheme: {words}",
            "write rules that cover them alike, or measure finer groups with --bands",
        )
    only = next(iter(stated))
    choices = group.choices if isinstance(only, str) else (only,)
    fitting = tuple(
        s for s in choices if s is None or not any(s.misfit(r.out_features, r.in_features) for r in group.linears)
    )
    if not fitting:
        ref = group.linears[0]
        raise ConfigError(
            f"{group.name}: no scheme of {', '.join(map(label, choices))} fits '{ref.key}' "
            f"[{ref.out_features}, {ref.in_features}]",
            "give --schemes with smaller groups, such as W4A16:32",
        )
    return replace(group, choices=fitting)


def _said(ref: Linear, recipe: Recipe) -> Scheme | str | None:
    """What the recipe itself says of a linear; '' where it leaves it open."""
    rule = recipe.rule_of(ref.key)
    by_role: str | None = getattr(recipe, ref.role.value, None)
    return recipe.scheme_of(ref) if (rule and rule.scheme) or by_role else ""


def assigned(groups: Iterable[Group], chosen: Mapping[str, Scheme | None]) -> dict[str, Scheme | None]:
    """By linear, from what each group has got."""
    return {ref.key: chosen[group.name] for group in groups for ref in group.linears}
