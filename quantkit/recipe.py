"""`Recipe`: which scheme and method each linear gets. The command line's options and a YAML file both end here."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from quantkit.choices import Effort
from quantkit.errors import ConfigError
from quantkit.model.spec import OPTION_ROLES, Linear, Role
from quantkit.quant.method import BEST_TOKENS, PARAMETERS, Method, MethodName
from quantkit.scheme import BF16, Scheme, scheme_named

__all__ = ["Recipe", "Rule"]

_PARAMETERS = tuple(dict.fromkeys(name for names in PARAMETERS.values() for name in names))  # fields of rules and recipes
_Damping = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
_Steps = Annotated[int, Field(ge=1, strict=True)]


class _EachKeyOnce(yaml.SafeLoader):
    """Of equal keys PyYAML takes the last, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys: list[object] = []
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            keys.append(key.value)
        return super().construct_mapping(node, deep)


def _known_scheme(name: str | None) -> str | None:
    if name is not None:
        scheme_named(name)
    return name


def _of_method(value: object, info: ValidationInfo) -> object:
    """A parameter beside a method must be one of that method's."""
    method = info.data.get("method")
    if value is not None and method is not None and info.field_name not in PARAMETERS[method]:
        raise ValueError(f"{method} has no such parameter; it has {', '.join(PARAMETERS[method]) or 'none'}")
    return value


class Rule(BaseModel):
    """An exception: what linears whose name matches the glob `match` get. The first match wins, whatever it says; what it
    leaves out is as the recipe says of their role, or of all."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    match: str
    scheme: str | None = None
    group_size: int | None = Field(default=None, ge=8)
    method: MethodName | None = None
    damping: _Damping | None = None
    steps: _Steps | None = None

    @field_validator("scheme")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return _known_scheme(value)

    @field_validator(*_PARAMETERS)
    @classmethod
    def _of_the_method(cls, value: object, info: ValidationInfo) -> object:
        return _of_method(value, info)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.scheme is None and not self.how:
            fields = ", ".join(name for name in type(self).model_fields if name != "match")
            raise ValueError(f"the rule says nothing of what it matches; give one of {fields}")
        return self

    @model_serializer(mode="wrap")
    def _without_the_unsaid(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in dump(self).items() if value is not None}

    @property
    def how(self) -> dict[str, Any]:
        """What it says beside the scheme."""
        values = {name: getattr(self, name) for name in ("group_size", "method", *_PARAMETERS)}
        return {name: value for name, value in values.items() if value is not None}


_NOTHING = Rule.model_construct(match="*")  # what is as if there were no rule
_USUAL, _EVERY_TOKEN = "W4A16", "W8A16"  # schemes that nobody has to name


class Recipe(BaseModel):
    """All that decides the numbers of a run. The command line's options and a YAML file both end here.

    Raises one ConfigError that names the first field that is wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    scheme: str | None = None  # None: by what the model is, see `settled`
    experts: str | None = None
    shared_experts: str | None = None
    attention: str | None = None
    mlp: str | None = None
    linears: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    group_size: int | None = Field(default=None, ge=8)
    effort: Effort | None = None  # which methods are meant where none is given, and how much text
    method: MethodName | None = None
    damping: _Damping | None = None
    steps: _Steps | None = None
    fisher_tokens: int | None = Field(default=None, ge=0)  # by whose gradients errors are weighed in learning; 0: all alike
    tune: bool = False  # scales, end to end, at last
    calibration: str = "stdlib"
    samples: int | None = Field(default=None, ge=1)  # None: by the model's shapes, see job/forecast.py
    seq_len: int = Field(default=512, ge=8)
    seed: int = Field(default=0, ge=0)
    cover: bool = False  # choose windows by where the BF16 model routes them, see calib/covering.py
    add_bos: bool | None = None  # whether raw text gets a beginning-of-text token; None: as the model was trained

    @model_validator(mode="before")
    @classmethod
    def _kept_by_rules(cls, fields: Any) -> Any:
        """`keep: [GLOB, ...]` is short for rules that say BF16, before all others."""
        if not isinstance(fields, dict) or "keep" not in fields:
            return fields
        keep, rules = fields["keep"], fields.get("rules", ())
        if not isinstance(keep, list | tuple) or not isinstance(rules, list | tuple):
            raise ValueError(f"keep is {keep!r}, and must be a list of globs")
        first = [{"match": glob, "scheme": BF16} for glob in keep]
        return {**{key: value for key, value in fields.items() if key != "keep"}, "rules": [*first, *rules]}

    @model_validator(mode="before")
    @classmethod
    def _text_for_the_effort(cls, fields: Any) -> Any:
        if not isinstance(fields, dict) or fields.get("effort") != "best" or "samples" in fields:
            return fields
        length = fields.get("seq_len", cls.model_fields["seq_len"].default)
        return {**fields, "samples": -(-BEST_TOKENS // length)} if isinstance(length, int) and length > 0 else fields

    @field_validator("scheme", *(role.value for role in OPTION_ROLES))
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        return _known_scheme(value)

    @field_validator(*_PARAMETERS)
    @classmethod
    def _of_the_method(cls, value: object, info: ValidationInfo) -> object:
        return _of_method(value, info)

    @model_validator(mode="wrap")
    @classmethod
    def _one_message(cls, fields: Any, build: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        try:
            return build(fields)
        except ValidationError as error:
            problems, where = error.errors(), (info.context or {}).get("where", "recipe")
            first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])  # a typo
            name = ".".join(str(part) for part in first["loc"])
            rule = first["loc"][:1] == ("rules",)
            allowed = f"fields are {', '.join(Rule.model_fields if rule else [*cls.model_fields, 'keep'])}"
            fix = (
                allowed
                if first["type"] == "extra_forbidden"
                else "see 'quantkit quantize --help' and docs/quantize.md for what is allowed"
            )
            raise ConfigError(f"{where}: field '{name}' is {first['input']!r}: {first['msg']}", fix) from error

    def settled(self, roles: Collection[Role]) -> Recipe:
        """The recipe with a general scheme, for a model that has these roles. Where none is named it is W4A16; in a model
        with routed experts what every token passes gets W8A16, at a few per cent of the bytes (docs/accuracy.md)."""
        if self.scheme is not None:
            return self
        every = (Role.ATTENTION, Role.SHARED_EXPERTS, Role.MLP) if Role.EXPERTS in roles else ()
        named = {role.value: _EVERY_TOKEN for role in every if role in roles and getattr(self, role.value) is None}
        return self.model_copy(update={"scheme": _USUAL, **named})

    def scheme_of(self, ref: Linear) -> Scheme | None:
        """The scheme of one linear: first matching rule, else its role's, else the general one, which is W4A16 in a recipe
        that is not settled. None keeps it.

        linears: for an unknown architecture, globs of which a linear must match one.
        """
        if self.linears and not any(fnmatchcase(ref.key, pattern) for pattern in self.linears):
            return None
        rule = self.rule_of(ref.key) or _NOTHING
        by_role = getattr(self, ref.role.value) if ref.role in OPTION_ROLES else None
        return scheme_named(rule.scheme or by_role or self.scheme or _USUAL, rule.group_size or self.group_size)

    def rule_of(self, key: str) -> Rule | None:
        """The rule that decides of a linear: the first that matches its name."""
        return next((rule for rule in self.rules if fnmatchcase(key, rule.match)), None)

    def method_of(self, ref: Linear) -> Method | None:
        """The method of one linear, None where it is kept: its rule's, else the general one, else GPTQ for 4 bits and
        rounding to nearest for 8, as where only 4 bits are learned. A parameter that the method does not have is for other
        linears."""
        if (scheme := self.scheme_of(ref)) is None:
            return None
        rule = self.rule_of(ref.key) or _NOTHING
        few = scheme.weight.bits == 4
        general = self.method or ("learned" if self._is_learned(ref) else None)
        name = rule.method or (general if few or general != "learned" else None) or ("gptq" if few else "rtn")
        parameters = {field: getattr(rule, field) or getattr(self, field) for field in PARAMETERS[name]}
        return Method(name, **{field: value for field, value in parameters.items() if value is not None})

    def _is_learned(self, ref: Linear) -> bool:
        """What the effort says: all, or those that every token passes, whose rounding costs most and is learned soonest."""
        return self.effort == "best" or (self.effort == "default" and ref.role is not Role.EXPERTS)

    @classmethod
    def read(cls, path: Path, overrides: dict[str, object]) -> Recipe:
        """A recipe from a YAML file; `overrides` (options given on the command line) win. Raises ConfigError."""
        try:
            data = yaml.load(path.read_text("utf-8"), Loader=_EachKeyOnce)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ConfigError(f"recipe {path} cannot be read: {error}", "give a YAML file of recipe fields") from error
        if not isinstance(data, dict):
            raise ConfigError(
                f"recipe {path} holds {type(data).__name__}, not fields", "write lines such as 'scheme: W4A16'"
            )
        return cls.of({**data, **overrides}, str(path))

    @classmethod
    def of(cls, fields: dict[str, object], where: str = "recipe") -> Recipe:
        """A recipe from plain fields; `where` they come from, for the message. Raises ConfigError."""
        return cls.model_validate(fields, context={"where": where})
