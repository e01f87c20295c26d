"""`Recipe`: which scheme and method each linear gets. The command line's options and a YAML file both end here."""

from __future__ import annotations

from collections.abc import Hashable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from quantkit.choices import Method
from quantkit.errors import ConfigError
from quantkit.model.spec import Linear, Role
from quantkit.scheme import BF16, Kind, Scheme, scheme_named

__all__ = ["Recipe", "Rule"]


class _EachKeyOnce(yaml.SafeLoader):
    """Of equal keys PyYAML takes the last, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: list[object] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


class Rule(BaseModel):
    """An exception to the roles: linears whose name matches the glob `match` get `scheme`. The first match wins."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    match: str
    scheme: str


class Recipe(BaseModel):
    """All that decides the numbers of a run. The command line's options and a YAML file both end here.

    Raises one ConfigError that names the first field that is wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    scheme: str = "W4A16"
    experts: str | None = None
    shared_experts: str | None = None
    attention: str | None = None
    linears: tuple[str, ...] = ()
    rules: tuple[Rule, ...] = ()
    group_size: int | None = Field(default=None, ge=8)
    method: Method | None = None
    calibration: str = "stdlib"
    samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=512, ge=8)
    seed: int = Field(default=0, ge=0)
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

    @field_validator("scheme", "experts", "shared_experts", "attention")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            scheme_named(value)
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _one_message(cls, fields: Any, build: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        try:
            return build(fields)
        except ValidationError as error:
            first, where = error.errors()[0], (info.context or {}).get("where", "recipe")
            name = ".".join(str(part) for part in first["loc"])
            known = f"fields are {', '.join([*cls.model_fields, 'keep'])}"
            fix = known if first["type"] == "extra_forbidden" else "see 'quantkit quantize --help' for what is allowed"
            raise ConfigError(f"{where}: field '{name}' is {first['input']!r}: {first['msg']}", fix) from error

    def scheme_of(self, ref: Linear) -> Scheme | None:
        """The scheme of one linear: first matching rule, else its role's, else the general one. None keeps it.

        linears: for an unknown architecture, globs of which a linear must match one.
        """
        if self.linears and not any(fnmatchcase(ref.key, pattern) for pattern in self.linears):
            return None
        for rule in self.rules:
            if fnmatchcase(ref.key, rule.match):
                return scheme_named(rule.scheme, self.group_size)
        by_role = {
            Role.EXPERTS: self.experts,
            Role.SHARED_EXPERTS: self.shared_experts,
            Role.ATTENTION: self.attention,
        }
        return scheme_named(by_role.get(ref.role) or self.scheme, self.group_size)

    def method_of(self, scheme: Scheme) -> Method:
        """GPTQ for 4-bit integers, rounding to nearest for the 8-bit grids, unless the recipe names a method."""
        return self.method or ("gptq" if scheme.weight.kind is Kind.INT and scheme.weight.bits == 4 else "rtn")

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
