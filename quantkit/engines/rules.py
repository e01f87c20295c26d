"""What a rule is, and what it sees. The rules themselves are data, one file an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from quantkit.engines.held import Deployment, Held, hold
from quantkit.formats.reader import CheckpointReader
from quantkit.model.spec import ModelSpec
from quantkit.scheme import Scheme

__all__ = ["Check", "Engine", "FileCheck", "Hit", "Naming", "Rule", "Verdict", "View", "view_of"]


class Verdict(str, Enum):
    """REFUSED: the engine raises. WRONG: it loads, and computes otherwise. UNKNOWN: nobody has looked. NOTE: it works."""

    REFUSED = "refused"
    WRONG = "wrong"
    UNKNOWN = "unknown"
    NOTE = "note"

    @property
    def loads(self) -> bool:
        return self not in (Verdict.REFUSED, Verdict.WRONG)


@dataclass(frozen=True)
class View:
    """One model with its schemes as one engine would hold it. quantization: the quantization_config as on disk."""

    spec: ModelSpec
    config: Mapping[str, Any]
    schemes: Mapping[str, Scheme | None]
    quantization: Mapping[str, Any]
    deployment: Deployment
    weights: tuple[Held, ...]

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))


def view_of(
    spec: ModelSpec,
    config: Mapping[str, Any],
    schemes: Mapping[str, Scheme | None],
    quantization: Mapping[str, Any],
    deployment: Deployment,
) -> View:
    return View(spec, config, schemes, quantization, deployment, hold(spec, config, schemes, deployment))


@dataclass(frozen=True)
class Hit:
    """Where a rule is broken: a weight, or the whole model (None), and what was seen there."""

    held: Held | None
    why: str


Check = Callable[[View], Iterable[Hit]]
FileCheck = Callable[[View, CheckpointReader], Iterable[str]]


@dataclass(frozen=True)
class Rule:
    """One fact about an engine. source: where it comes from. check sees a plan, on_file a checkpoint on disk.

    fix: what helps where neither another scheme nor another deployment does. raw: asks nothing of the schemes, so that it
    can be asked of a config whose schemes quantkit has not.
    """

    id: str
    verdict: Verdict
    says: str
    source: str
    check: Check | None = None
    on_file: FileCheck | None = None
    fix: str = ""
    raw: bool = False


@dataclass(frozen=True)
class Naming:
    """How an engine looks a weight up in quantization_config. All by model_type.

    fused: the fused names whose parts it knows. nameless: models whose layers it builds without a name. experts: the
    names of an expert's gate, up and down that it looks up. unmatched: whether a weight in no group is an error.
    """

    fused: Mapping[str, frozenset[str]]
    experts: Mapping[str, tuple[str, str, str]]
    nameless: frozenset[str] = frozenset()
    class_first: bool = False
    suffixes: bool = False
    unmatched_raises: bool = False


@dataclass(frozen=True)
class Engine:
    """An engine in the version that its rules were read from. architectures: model_type to how it is run."""

    name: str
    version: str
    architectures: Mapping[str, str]
    rules: tuple[Rule, ...]
    aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
