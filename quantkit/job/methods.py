"""Which method makes each linear, and the refusal of rules of which a part would decide nothing."""

from __future__ import annotations

from quantkit.checkpoint.by_name import NamedSpec
from quantkit.errors import ConfigError
from quantkit.model.spec import ModelSpec
from quantkit.quant.method import PARAMETERS, Method
from quantkit.recipe import Recipe, Rule
from quantkit.scheme import Kind, Scheme, Strategy

__all__ = ["methods_of", "needs_tokens"]


def needs_tokens(scheme: Scheme | None, method: Method) -> bool:
    """Whether quantizing to this scheme by this method looks at calibration text."""
    return scheme is not None and (scheme.static or method.hessian)


def methods_of(spec: ModelSpec | NamedSpec, recipe: Recipe, schemes: dict[str, Scheme | None]) -> dict[str, Method]:
    """The method of each linear that is quantized; linears that are solved as one have one scheme.

    Raises ConfigError where those would differ in method, or a rule says what changes nothing.
    """
    assigned = {ref.key: recipe.method_of(ref) for ref in spec.linears() if schemes[ref.key]}
    methods = {key: method for key, method in assigned.items() if method}
    for layer in spec.layers:
        for first, *others in layer.same_input():
            for ref in others:
                if methods.get(ref.key) != methods.get(first.key):
                    raise ConfigError(
                        f"'{first.key}' and '{ref.key}' get different methods ({methods[first.key]}; {methods[ref.key]}), "
                        "but engines fuse them into one weight, and so they are solved as one",
                        "write a rule that covers both alike",
                    )
    _only_integers_learned(schemes, methods)
    _no_idle_fields(recipe, schemes, methods)
    return methods


def _only_integers_learned(schemes: dict[str, Scheme | None], methods: dict[str, Method]) -> None:
    for key, method in methods.items():
        scheme = schemes[key]
        if method.name == "learned" and scheme and scheme.weight.kind is not Kind.INT:
            raise ConfigError(
                f"'{key}' in {scheme.name} cannot be learned: its codes are no integers", "choose method rtn or gptq for it"
            )


def _no_idle_fields(recipe: Recipe, schemes: dict[str, Scheme | None], methods: dict[str, Method]) -> None:
    """A field of a rule that decides nothing of any linear would leave its user believing that it was done."""
    decided: dict[Rule, list[str]] = {}
    if any(rule.how for rule in recipe.rules):
        for key in schemes:
            if rule := recipe.rule_of(key):
                decided.setdefault(rule, []).append(key)
    for rule in recipe.rules:
        for field, value in rule.how.items():
            if not any(_decides(field, schemes[key], methods.get(key)) for key in decided.get(rule, ())):
                raise ConfigError(
                    f"rule '{rule.match}': {field} is {value}, and changes nothing of any linear that the rule decides",
                    f"leave {field} out, or choose what has it; of rules the first that matches wins",
                )


def _decides(field: str, scheme: Scheme | None, method: Method | None) -> bool:
    """Whether what a rule says beside its scheme has a meaning for a linear."""
    if scheme is None or method is None:
        return False
    if field == "group_size":
        return scheme.weight.strategy is Strategy.GROUP
    return field == "method" or field in PARAMETERS[method.name]
