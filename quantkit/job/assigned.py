"""Which scheme each linear gets by a recipe; what nobody could have meant is refused, what is idle is said."""

from __future__ import annotations

from fnmatch import fnmatchcase

from quantkit.checkpoint.by_name import NamedSpec
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.errors import ConfigError
from quantkit.job.chosen import Chosen, is_kept_by_rule, joined
from quantkit.job.methods import needs_tokens
from quantkit.model.names import target
from quantkit.model.spec import OPTION_ROLES, Linear, ModelSpec, Role
from quantkit.quant.method import PARAMETERS, Method
from quantkit.recipe import Recipe
from quantkit.scheme import BF16, Scheme

__all__ = ["assign", "unused"]


def assign(
    reader: CheckpointReader, spec: ModelSpec | NamedSpec, recipe: Recipe, chosen: Chosen | None
) -> dict[str, Scheme | None]:
    """chosen: the linears that a run by name takes."""
    _nothing_idle(recipe, spec)
    schemes: dict[str, Scheme | None] = {}
    for ref in spec.linears():
        scheme = recipe.scheme_of(ref) if chosen is None or ref.key in chosen.keys else None
        problem = scheme.misfit(ref.out_features, ref.in_features) if scheme else None
        if problem:
            assert scheme
            raise ConfigError(
                f"tensor '{ref.weight}' [{ref.out_features}, {ref.in_features}] cannot take {scheme.name}: {problem}",
                "choose a --group-size that divides it, another scheme, or BF16 for its role",
            )
        schemes[ref.key] = scheme
    keepable = schemes if chosen is None else [target(name) for name in reader.entries]
    for rule in recipe.rules:
        nameable = keepable if rule.scheme == BF16 or chosen is None else chosen.keys
        if not any(fnmatchcase(key, rule.match) for key in nameable):
            raise ConfigError(f"rule '{rule.match}' matches no linear", "name linears as in 'model.layers.0.mlp.*'")
    _no_accident(recipe, spec, schemes)
    if not any(schemes.values()):
        raise ConfigError("every linear is kept in BF16: there is nothing to quantize", "choose a scheme")
    for layer in spec.layers:
        for group in layer.same_input():
            _same_scheme(group, schemes, "engines fuse them into one weight")
    for refs, why in joined(spec) if isinstance(spec, NamedSpec) else ():
        _same_scheme(refs, schemes, why)
    for moe in spec.moes():
        _same_scheme([ref for e in moe.experts for ref in e.linears()], schemes, "engines fuse a layer's experts")
    return schemes


def _nothing_idle(recipe: Recipe, spec: ModelSpec | NamedSpec) -> None:
    """An option for what the model does not have would leave its user believing that it was done."""
    roles = {ref.role for ref in spec.linears()}
    for role in OPTION_ROLES:
        field = role.value
        if getattr(recipe, field) is not None and role not in roles:
            raise ConfigError(
                f"{field} is {getattr(recipe, field)}, and {spec.architecture} has no linear with the role {role.value}",
                f"leave {field} out; the roles here are {', '.join(sorted(r.value for r in roles))}",
            )


def unused(recipe: Recipe, schemes: dict[str, Scheme | None], methods: dict[str, Method]) -> list[str]:
    """What changes nothing is no mistake where one command line serves several schemes; it is said."""
    notes, names = [], ", ".join(sorted({scheme.name for scheme in schemes.values() if scheme}))
    if recipe.group_size is not None and not any(scheme and scheme.weight.group_size for scheme in schemes.values()):
        notes.append(f"group size {recipe.group_size} changes nothing: {names} has no groups")
    for field in ("damping", "steps"):
        value = getattr(recipe, field)
        if value is not None and not any(field in PARAMETERS[method.name] for method in methods.values()):
            notes.append(f"{field} {value:g} changes nothing: no linear is made by a method that has it")
    if recipe.effort == "default" and not any(method.name == "learned" for method in methods.values()):
        notes.append("effort default changes nothing: what every token passes has no 4 bits to learn; best learns experts")
    if recipe.fisher_tokens is not None and not any(method.name == "learned" for method in methods.values()):
        notes.append(f"fisher_tokens {recipe.fisher_tokens} changes nothing: no rounding is learned")
    if recipe.calibration != Recipe().calibration and not any(needs_tokens(schemes[k], m) for k, m in methods.items()):
        notes.append(f"calibration '{recipe.calibration}' is not read: {names} is rounded without calibration")
    return notes


def _no_accident(recipe: Recipe, spec: ModelSpec | NamedSpec, schemes: dict[str, Scheme | None]) -> None:
    """Routed experts hold nearly all weights: they stay in BF16 only where the recipe says so of them."""
    if not any(schemes.values()) or recipe.experts == BF16:
        return
    for ref in spec.linears():
        if ref.role is not Role.EXPERTS or schemes[ref.key] is not None:
            continue
        if not is_kept_by_rule(recipe, ref.key):
            raise ConfigError(
                f"routed expert '{ref.key}' would stay in BF16 because the general scheme is BF16",
                "give --experts a scheme, or say --experts BF16 if that is meant",
            )


def _same_scheme(refs: list[Linear] | tuple[Linear, ...], schemes: dict[str, Scheme | None], why: str) -> None:
    for ref in refs[1:]:
        if schemes[ref.key] != schemes[refs[0].key]:
            raise ConfigError(
                f"'{refs[0].key}' and '{ref.key}' get different schemes, but {why}",
                "write a rule that covers both alike",
            )
