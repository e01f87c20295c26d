"""What an engine can load of what an allocation might choose: asked of the engine's rules, which name no allocation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from quantkit.allocate.groups import Group, assigned, label
from quantkit.engines.assess import check_deployment, loads
from quantkit.engines.held import Deployment
from quantkit.engines.rules import Engine
from quantkit.errors import ConfigError
from quantkit.model.registry import build_spec
from quantkit.model.spec import ModelSpec, Role
from quantkit.recipe import Recipe
from quantkit.scheme import Scheme

__all__ = ["Served", "ties", "with_groups"]

_SIZES = (128, 64, 32)  # of groups: what engines have kernels for
Schemes = dict[str, Scheme | None]
# How groups may have to be tied, finest first: what groups that share a key must have in common is their scheme.
_TIES: tuple[Callable[[Group], str], ...] = (
    lambda group: group.name,
    lambda group: group.role.value if group.role is Role.EXPERTS else group.name,
    lambda group: group.role.value,
    lambda group: "all",
)


@dataclass(frozen=True)
class Served:
    """The engine, how it would be run, and the model's config.json."""

    engine: Engine
    deployment: Deployment
    config: Mapping[str, Any]

    def loads(self, spec: ModelSpec, schemes: Mapping[str, Scheme | None]) -> bool:
        return loads(self.engine, spec, self.config, schemes, self.deployment)

    @property
    def name(self) -> str:
        return f"{self.engine.name} {self.engine.version} with --tp {self.deployment.tp}" + (
            " --ep" if self.deployment.ep else ""
        )


def ties(served: Served | None, spec: ModelSpec, groups: Sequence[Group]) -> list[list[Group]]:
    """The groups, each with the choices that the engine loads, tied as it demands: those of one list get one scheme.

    What is tied is found by trial: schemes are dealt out in turn, and the finest ties with which the engine loads that are
    taken. Raises ConfigError where it loads nothing.
    """
    if served is None:
        return [[group] for group in groups]
    check_deployment(served.deployment, spec)
    usable = _usable(served, spec, groups)
    for tie in _TIES:
        tied: dict[str, list[Group]] = {}
        for group in usable:
            tied.setdefault(tie(group), []).append(group)
        classes = [_alike(members) for members in tied.values()]
        if all(members[0].choices for members in classes) and _takes_any(served, spec, classes):
            return classes
    raise ConfigError(f"{served.name} loads no mixture of these schemes", "name one with --scheme, or see `quantkit plan`")


def _alike(members: Sequence[Group]) -> list[Group]:
    """With the choices that all of them have."""
    common = [scheme for scheme in members[0].choices if all(scheme in group.choices for group in members)]
    return [replace(group, choices=tuple(common)) for group in members]


def _takes_any(served: Served, spec: ModelSpec, classes: Sequence[Sequence[Group]]) -> bool:
    """Whether it loads schemes that are dealt out in turn, each class beginning with another of its choices."""
    for shift in range(2):
        schemes: Schemes = {}
        for number, members in enumerate(classes):
            choices = members[0].choices
            schemes |= assigned(members, {group.name: choices[(number + shift) % len(choices)] for group in members})
        if not served.loads(spec, schemes):
            return False
    return True


def _usable(served: Served, spec: ModelSpec, groups: Sequence[Group]) -> list[Group]:
    """The groups with the choices that load: of each kind those that can stand in the first assignment of a scheme to each
    role that loads."""
    roles = list(dict.fromkeys(group.role for group in groups))
    offered = [list(dict.fromkeys(s for g in groups if g.role is role for s in g.choices)) for role in roles]
    uniform = (dict(zip(roles, schemes, strict=True)) for schemes in product(*offered))
    starts = ({g.name: by[g.role] if by[g.role] in g.choices else g.choices[0] for g in groups} for by in uniform)
    first = next((start for start in starts if served.loads(spec, assigned(groups, start))), None)
    if first is None:
        names = ", ".join(dict.fromkeys(label(s) for schemes in offered for s in schemes))
        raise ConfigError(
            f"{served.name} loads this model in no combination of {names}",
            "give --schemes that it loads (`quantkit plan --engine` says which), or another --tp",
        )
    allowed: dict[tuple[str, Scheme | None], bool] = {}
    for group in groups:
        for scheme in group.choices:
            if (group.kind, scheme) not in allowed:
                of_kind = {g.name: scheme for g in groups if g.kind == group.kind and scheme in g.choices}
                allowed[group.kind, scheme] = served.loads(spec, assigned(groups, {**first, **of_kind}))
    return [replace(g, choices=tuple(s for s in g.choices if allowed[g.kind, s])) for g in groups]


def with_groups(served: Served | None, recipe: Recipe) -> Recipe:
    """The recipe with the largest groups, of 128, 64 and 32, with which the engine loads what it says: tensor parallelism
    does not cut a group. As it is where it names a size, or where no size helps."""
    if served is None or recipe.group_size is not None or recipe.linears:
        return recipe
    spec = build_spec(dict(served.config), "config.json")
    check_deployment(served.deployment, spec)
    refs = list(spec.linears())
    settled = recipe.settled({ref.role for ref in refs})
    for size in _SIZES:
        sized = settled.model_copy(update={"group_size": size})
        schemes = {ref.key: sized.scheme_of(ref) for ref in refs}
        fits = not any(
            s and s.misfit(ref.out_features, ref.in_features) for ref, s in zip(refs, schemes.values(), strict=True)
        )
        if fits and served.loads(spec, schemes):
            return recipe if size == _SIZES[0] else recipe.model_copy(update={"group_size": size})
    return recipe
