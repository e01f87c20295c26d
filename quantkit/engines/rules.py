"""What a rule is, and what it sees. The rules themselves are data, one file an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.engines.held import Deployment, Held, hold
from quantkit.formats import compressed_tensors
from quantkit.model.hunyuan_a13b import is_a13b
from quantkit.model.spec import ModelSpec
from quantkit.scheme import Scheme

__all__ = [
    "Check",
    "Engine",
    "FileCheck",
    "Hit",
    "Naming",
    "Rule",
    "Verdict",
    "View",
    "engines",
    "view_of",
    "worst",
]


class Verdict(str, Enum):
    """What an engine makes of a model, worst first. REFUSED: it raises, at the first request at the latest. WRONG: it
    computes something else. UNKNOWN: nobody has run it or read its code. LOADS: it computes what is stored."""

    REFUSED = "does not load"
    WRONG = "loads and is wrong"
    UNKNOWN = "nobody looked"
    LOADS = "loads"

    @property
    def exit_code(self) -> int:
        return {Verdict.LOADS: 0, Verdict.UNKNOWN: 3}.get(self, 1)


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """The first that counts; LOADS if there is none."""
    present = {*verdicts, Verdict.LOADS}
    return next(verdict for verdict in Verdict if verdict in present)


@dataclass(frozen=True)
class View:
    """One model with its schemes as one engine would hold it. quantization: the quantization_config as on disk. format:
    which of `formats.table` that is, "" for one that quantkit does not read."""

    spec: ModelSpec
    config: Mapping[str, Any]
    schemes: Mapping[str, Scheme | None]
    quantization: Mapping[str, Any]
    deployment: Deployment
    weights: tuple[Held, ...]
    format: str = compressed_tensors.FORMAT.name

    @property
    def model_type(self) -> str:
        """Of the architecture: a Hunyuan-A13B may call itself "hunyuan", as Hunyuan-Large does."""
        model_type = str(self.config.get("model_type"))
        return "hunyuan_v1_moe" if model_type == "hunyuan" and is_a13b(dict(self.config)) else model_type


def view_of(
    spec: ModelSpec,
    config: Mapping[str, Any],
    schemes: Mapping[str, Scheme | None],
    quantization: Mapping[str, Any],
    deployment: Deployment,
    format: str = compressed_tensors.FORMAT.name,
) -> View:
    return View(spec, config, schemes, quantization, deployment, hold(spec, config, schemes, deployment), format)


@dataclass(frozen=True)
class Hit:
    """Where a rule is broken: a weight, or the whole model (None), and what was seen there."""

    held: Held | None
    why: str


Check = Callable[[View], Iterable[Hit]]
Loader = Callable[[View, str, bool], Verdict]
FileCheck = Callable[[View, CheckpointReader], Iterable[str]]


@dataclass(frozen=True)
class Rule:
    """One fact about an engine. source: where it comes from. check sees a plan, on_file a checkpoint on disk.

    verdict: LOADS is a note. fix: what helps where neither another scheme nor another deployment does. raw: asks nothing of
    the schemes, so that it holds in any format, and where the schemes are none that quantkit has. versions: of the engine;
    none for all that there are rules for.
    """

    id: str
    verdict: Verdict
    says: str
    source: str
    check: Check | None = None
    on_file: FileCheck | None = None
    fix: str = ""
    raw: bool = False
    versions: tuple[str, ...] = ()


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
    """An engine in the version that its rules were read from. architectures: model_type to how it is run.

    loader: what it does with a tensor that is not as it wants it: "missing", "unmatched" (no parameter takes it), or of
    another "shape" or "dtype"; and whether that is an expert's.
    """

    name: str
    version: str
    architectures: Mapping[str, str]
    rules: tuple[Rule, ...]
    loader: Loader
    aliases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)


def engines(versions: Iterable[str], whole: Engine) -> tuple[Engine, ...]:
    """An engine in each of these versions, with the rules of that version out of all."""
    return tuple(
        replace(whole, version=version, rules=tuple(r for r in whole.rules if not r.versions or version in r.versions))
        for version in versions
    )
