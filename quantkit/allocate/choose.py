"""From sensitivities and a target to a recipe: which scheme each group gets, its predicted loss, and the curve."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.allocate.engine import Served, ties
from quantkit.allocate.groups import Group, assigned, groups_of, label, named, nbytes
from quantkit.allocate.programme import Option, fewest_bytes, least_loss
from quantkit.allocate.sensitivity import Sensitivity, combined
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import ConfigError
from quantkit.model.names import experts_of
from quantkit.model.registry import build_spec
from quantkit.model.spec import Role
from quantkit.recipe import Recipe, Rule
from quantkit.report.words import size
from quantkit.scheme import BF16, Scheme, scheme_named

__all__ = ["Allocation", "Target", "allocate", "bytes_of", "check_bytes"]

_POINTS = 12  # of the curve
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMGT]?)(i?)B?", re.IGNORECASE)


@dataclass(frozen=True)
class Target:
    """One of: bits per weight, of what is quantized, scales included; bytes of all shards; mean KL in nats a token."""

    bits: float | None = None
    nbytes: int | None = None
    kl: float | None = None

    def __str__(self) -> str:
        if self.bits is not None:
            return f"{self.bits:g} bits a weight"
        return f"a mean KL of {self.kl:g} nats" if self.kl is not None else size(self.nbytes or 0)


@dataclass(frozen=True)
class Point:
    """An allocation without its recipe: bytes of all shards, bits per weight of what is quantized, predicted mean KL."""

    nbytes: int
    bits: float
    kl: float


@dataclass(frozen=True)
class Allocation:
    """recipe: an ordinary one, whose rules say what was chosen. chosen: by group, the scheme. curve: by bytes; nothing that
    was measured loses less at no more bytes. reached, served: the target and the engine that was asked, in words."""

    recipe: Recipe
    chosen: dict[str, str]
    point: Point
    curve: tuple[Point, ...]
    reached: str
    served: str | None
    sensitivity: Sensitivity

    def as_dict(self) -> dict[str, Any]:
        """For run.json and reports."""
        measured = self.sensitivity
        return {
            "target": self.reached,
            "engine": self.served,
            "output_bytes": self.point.nbytes,
            "bits_per_weight": self.point.bits,
            "predicted_kl": self.point.kl,
            "schemes": self.chosen,
            "curve": [{"output_bytes": p.nbytes, "bits_per_weight": p.bits, "predicted_kl": p.kl} for p in self.curve],
            "exponent": measured.exponent,
            "anchors": [
                {"name": anchor.name, "kl": anchor.kl, "predicted_kl": _of_anchor(measured, anchor.schemes)}
                for anchor in measured.anchors
            ],
            "text": measured.text,
            "tokens": measured.tokens,
        }


def _of_anchor(measured: Sensitivity, schemes: dict[str, str]) -> float:
    return combined([measured.kl(group, scheme) for group, scheme in schemes.items()], measured.exponent)


def bytes_of(text: str) -> int:
    """`200GB`, `6.2 MB`, `190GiB` or a number of bytes. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"'{text}' is no size", "give bytes, such as 200GB or 186GiB")
    unit = 1024 if match[3] else 1000
    return int(float(match[1]) * unit ** " KMGT".index(match[2].upper() or " "))


def check_bytes(reader: CheckpointReader, groups: Sequence[Group], target: Target) -> None:
    """Raises ConfigError for bytes or bits that no choice meets, with the least that one does; nothing need be measured."""
    weights, entries = sum(group.weights for group in groups), reader.entries.values()
    fixed = sum(entry.nbytes for entry in entries) - sum(nbytes(reader, group, None) for group in groups)
    inside = sum(min(nbytes(reader, group, scheme) for scheme in group.choices) for group in groups)
    limit = target.bits * weights / 8 if target.bits is not None else target.nbytes and target.nbytes - fixed
    if limit is not None and inside > limit:
        schemes = ", ".join(dict.fromkeys(label(scheme) for group in groups for scheme in group.choices))
        least = f"{8 * inside / weights:.3f} bits a weight, {size(fixed + inside)} in all"
        raise ConfigError(f"{target} cannot be met with {schemes}: the least is {least}", "raise the target, or name others")


class _Choice:
    """The programme: classes of tied groups, their options, and what of the checkpoint is no choice."""

    def __init__(self, reader: CheckpointReader, classes: Sequence[Sequence[Group]], measured: Sensitivity) -> None:
        self.classes, self.measured = classes, measured
        self.weights = sum(group.weights for members in classes for group in members)
        own = sum(nbytes(reader, group, None) for members in classes for group in members)
        self.fixed = sum(entry.nbytes for entry in reader.entries.values()) - own
        self.options = [[self._option(reader, members, s) for s in members[0].choices] for members in classes]

    def _option(self, reader: CheckpointReader, members: Sequence[Group], scheme: Scheme | None) -> Option:
        losses = (self.measured.kl(group.name, label(scheme)) ** self.measured.exponent for group in members)
        return Option(sum(nbytes(reader, group, scheme) for group in members), sum(losses))

    def point(self, chosen: Sequence[int]) -> Point:
        options = [row[i] for row, i in zip(self.options, chosen, strict=True)]
        inside = sum(option.nbytes for option in options)
        kl = sum(option.loss for option in options) ** (1 / self.measured.exponent)
        return Point(self.fixed + inside, 8 * inside / self.weights, kl)

    def extreme(self, *, bytes_first: bool) -> Point:
        """The point with the fewest bytes, or with the least loss."""
        key = (lambda o: (o.nbytes, o.loss)) if bytes_first else (lambda o: (o.loss, o.nbytes))
        return self.point([min(range(len(row)), key=lambda i, row=row: key(row[i])) for row in self.options])  # type: ignore[misc]

    def inside(self, target: Target) -> int:
        """The bytes that the target leaves for what is chosen."""
        if target.bits is not None:
            return int(target.bits * self.weights / 8)
        return (target.nbytes or 0) - self.fixed

    def solve(self, target: Target) -> list[int]:
        """Raises ConfigError for a target that cannot be met, with the least that can."""
        if target.kl is not None:
            chosen = fewest_bytes(self.options, target.kl**self.measured.exponent)
        else:
            chosen = least_loss(self.options, self.inside(target))
        if chosen is not None:
            return chosen
        best = self.extreme(bytes_first=target.kl is None)
        least = (
            f"{best.kl:.2g} nats, at {size(best.nbytes)}"
            if target.kl is not None
            else (f"{best.bits:.3f} bits a weight, {size(best.nbytes)} in all")
        )
        schemes = ", ".join(dict.fromkeys(label(s) for members in self.classes for s in members[0].choices))
        raise ConfigError(
            f"{target} cannot be met with {schemes}: the least is {least}", "raise the target, or measure other --schemes"
        )

    def curve(self) -> tuple[Point, ...]:
        low, high = (self.extreme(bytes_first=first).nbytes - self.fixed for first in (True, False))
        step = (max(high, low + 1) / low) ** (1 / (_POINTS - 1))
        budgets = [int(low * step**i) + 1 for i in range(_POINTS)]
        solved = [least_loss(self.options, budget) for budget in budgets]
        points = dict.fromkeys(self.point(chosen) for chosen in solved if chosen is not None)
        return tuple(points)


def allocate(
    reader: CheckpointReader, recipe: Recipe, measured: Sensitivity, target: Target, served: Served | None = None
) -> Allocation:
    """Choose. recipe: what it says of roles and in rules is no choice. served: the engine that must load the result. Raises
    ConfigError where the measurement is another model's, or the target cannot be met."""
    _check(reader, recipe, measured)
    spec = build_spec(reader.config, str(reader.folder / "config.json"))
    groups = groups_of(spec, recipe, tuple(map(named, measured.schemes)), measured.bands)
    _check_groups(groups, measured)
    choice = _Choice(reader, ties(served, spec, groups), measured)
    indices = choice.solve(target)
    chosen = {
        group.name: members[0].choices[i] for members, i in zip(choice.classes, indices, strict=True) for group in members
    }
    if served and not served.loads(spec, assigned(groups, chosen)):
        raise ConfigError(f"{served.name} does not load what was chosen", "name other --schemes, or report this")
    return Allocation(
        recipe=_recipe(recipe, groups, chosen),
        chosen={name: label(scheme) for name, scheme in chosen.items()},
        point=choice.point(indices),
        curve=choice.curve(),
        reached=str(target),
        served=served.name if served else None,
        sensitivity=measured,
    )


def _check(reader: CheckpointReader, recipe: Recipe, measured: Sensitivity) -> None:
    if measured.source != reader.fingerprint():
        raise ConfigError(
            f"these sensitivities are not of {reader.folder}: its weights or its config.json are others",
            "measure them: quantkit sensitivity MODEL -o FILE",
        )
    then, now = measured.recipe, recipe.model_dump(mode="json")
    for name in ("method", "damping"):
        if then.get(name) != now[name]:
            raise ConfigError(
                f"these sensitivities were measured with {name} {then.get(name)}, and {now[name]} is asked for",
                f"give the same --{name}, or measure them anew",
            )
    if any(rule.scheme is None for rule in recipe.rules):
        raise ConfigError("a rule without a scheme, and a target, which chooses schemes", "name a scheme in the rule")


def _check_groups(groups: Sequence[Group], measured: Sensitivity) -> None:
    """What is to be chosen must have been measured."""
    measured_rows = {row.name: row for row in measured.groups}
    for group in groups:
        row = measured_rows.get(group.name)
        keys = tuple(ref.key for ref in group.linears)
        missing = [label(s) for s in group.choices if s and (row is None or label(s) not in row.kl)]
        if row is None or row.linears != keys or missing:
            raise ConfigError(
                f"{group.name} was not measured in {', '.join(missing) or 'this form'}",
                "measure with the same options of the recipe: quantkit sensitivity MODEL -o FILE",
            )


def _recipe(recipe: Recipe, groups: Sequence[Group], chosen: dict[str, Scheme | None]) -> Recipe:
    """What was chosen, as a recipe: for each role the scheme of most of its weights, and rules for the rest, behind those
    that the recipe has."""
    sizes: Counter[int] = Counter()
    roles: dict[Role, Counter[Scheme | None]] = {}
    for group in groups:
        scheme = chosen[group.name]
        roles.setdefault(group.role, Counter())[scheme] += group.weights
        if scheme and scheme.weight.group_size:
            sizes[scheme.weight.group_size] += group.weights
    common = sizes.most_common(1)[0][0] if sizes else None
    usual = {role: counts.most_common(1)[0][0] for role, counts in roles.items()}
    general = recipe.group_size if recipe.group_size or common == 128 else common
    rules = [rule for g in groups for rule in _rules(g, chosen[g.name]) if _differs(chosen[g.name], usual[g.role], general)]
    own_matches = {rule.match for rule in recipe.rules}
    return recipe.model_copy(
        update={
            "rules": (*recipe.rules, *(rule for rule in rules if rule.match not in own_matches)),
            "group_size": general,
            **{role.value: scheme.name if scheme else BF16 for role, scheme in usual.items()},
        }
    )


def _differs(scheme: Scheme | None, usual: Scheme | None, group_size: int | None) -> bool:
    """Whether a role's scheme, under the recipe's size of groups, is not this one."""
    return scheme != (scheme_named(usual.name, group_size) if usual else None)


def _rules(group: Group, scheme: Scheme | None) -> list[Rule]:
    matches = dict.fromkeys(f"{experts_of(ref.key)}.*" if group.role is Role.EXPERTS else ref.key for ref in group.linears)
    name, grouped = (BF16, None) if scheme is None else (scheme.name, scheme.weight.group_size)
    return [Rule(match=match, scheme=name, group_size=grouped) for match in matches]
