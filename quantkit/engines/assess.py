"""Whether an engine will load a model with these schemes: every rule, weight by weight, and what would work instead."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.engines.held import CPUS, Deployment, Held
from quantkit.engines.rules import Engine, Hit, Rule, Verdict, View, view_of, worst
from quantkit.errors import ConfigError
from quantkit.formats import compressed_tensors
from quantkit.model.spec import OPTION_ROLES, Layer, ModelSpec, MoE, Role
from quantkit.scheme import Scheme, Strategy, scheme_named

__all__ = ["Assessment", "assess", "check_deployment", "loads"]


@dataclass(frozen=True)
class Assessment:
    """rows: one for each kind of weight. model: what holds for the model as a whole. format: of the checkpoint."""

    engine: Engine
    deployment: Deployment
    format: str
    rows: list[dict[str, Any]]
    model: list[dict[str, str]]

    @property
    def verdict(self) -> Verdict:
        return worst(Verdict(finding["verdict"]) for finding in [*self.model, *self.rows])

    def as_dict(self) -> dict[str, Any]:
        """`loads` is True for that verdict alone."""
        engine = {"name": self.engine.name, "version": self.engine.version, **dataclasses.asdict(self.deployment)}
        verdict = {"format": self.format, "verdict": self.verdict.value, "loads": self.verdict is Verdict.LOADS}
        return {**engine, **verdict, "model": self.model, "weights": self.rows}


def check_deployment(deployment: Deployment, spec: ModelSpec) -> None:
    """Raise ConfigError for a deployment that is none."""
    if not re.fullmatch(rf"gpu|sm\d{{2,3}}|{'|'.join(CPUS)}", deployment.hardware):
        raise ConfigError(f"unknown hardware '{deployment.hardware}'", f"one of gpu, smNN (such as sm90), {', '.join(CPUS)}")
    if deployment.kv_cache not in ("auto", "fp8"):
        raise ConfigError(f"unknown --kv-cache '{deployment.kv_cache}'", "auto (what the checkpoint says) or fp8")
    if deployment.tp < 1 or deployment.pp < 1:
        raise ConfigError(f"--tp {deployment.tp} --pp {deployment.pp}", "both are at least 1")
    if deployment.pp > len(spec.layers):
        raise ConfigError(f"--pp {deployment.pp}, and the model has {len(spec.layers)} layers", "use fewer stages")
    if deployment.ep and not spec.moes():
        raise ConfigError("--ep, and the model has no experts", "leave it out")


def assess(
    engine: Engine,
    spec: ModelSpec,
    config: Mapping[str, Any],
    schemes: Mapping[str, Scheme | None],
    quantization: Mapping[str, Any],
    deployment: Deployment,
    format: str = compressed_tensors.FORMAT.name,
) -> Assessment:
    """Every rule of the engine on this model. config: config.json; quantization: its quantization_config.

    format: of the quantization; for any but compressed-tensors only the rules that ask nothing of the schemes. "" for one
    that quantkit does not read: then schemes say nothing. Raises ConfigError for a deployment that is none.
    """
    check_deployment(deployment, spec)
    view = view_of(spec, config, schemes, quantization, deployment, format)
    hits = _hits(engine, view)
    model = [_finding(rule, hit) for rule, hit in hits if hit.held is None]
    by_weight: dict[int, list[dict[str, str]]] = {}
    for rule, hit in hits:
        by_weight.setdefault(id(hit.held), []).append(_finding(rule, hit))
    rows: dict[tuple[object, ...], dict[str, Any]] = {}
    for weight in view.weights:
        findings = by_weight.get(id(weight), [])
        key = (weight.role, weight.name, weight.scheme, tuple(finding["rule"] + finding["why"] for finding in findings))
        row = rows.setdefault(key, _row(weight, findings, view))
        row["layers"].append(weight.layer)
    for row in rows.values():
        if row["verdict"] != Verdict.LOADS.value and view.format == compressed_tensors.FORMAT.name:
            row["instead"] = list(_instead(engine, view, Role(row["role"])))
    return Assessment(engine, deployment, format or "unknown", list(rows.values()), model)


def loads(
    engine: Engine,
    spec: ModelSpec,
    config: Mapping[str, Any],
    schemes: Mapping[str, Scheme | None],
    deployment: Deployment,
) -> bool:
    """Whether every weight loads and nothing refuses the model as a whole, asked of one layer of each kind: quick enough to
    try many assignments of schemes."""
    thin = _thinned(spec, schemes)
    own = {ref.key: schemes[ref.key] for ref in thin.linears()}
    hits = _hits(engine, view_of(thin, config, own, _config(thin, own), deployment))
    of_model = worst(rule.verdict for rule, hit in hits if hit.held is None)
    of_weights = worst(rule.verdict for rule, hit in hits if hit.held is not None)
    return of_weights is Verdict.LOADS and of_model in (Verdict.LOADS, Verdict.UNKNOWN)


def _hits(engine: Engine, view: View) -> list[tuple[Rule, Hit]]:
    raw = view.format != compressed_tensors.FORMAT.name
    rules = [rule for rule in engine.rules if rule.raw or not raw]
    return [(rule, hit) for rule in rules if rule.check for hit in rule.check(view)]


def _finding(rule: Rule, hit: Hit) -> dict[str, str]:
    return {"rule": rule.id, "verdict": rule.verdict.value, "why": hit.why, "says": rule.says, "fix": rule.fix}


def _row(weight: Held, findings: list[dict[str, str]], view: View) -> dict[str, Any]:
    scheme = weight.scheme.name if weight.scheme else "BF16"
    return {
        "role": weight.role.value,
        "weight": weight.name,
        "linears": [ref.key.rpartition(".")[2] for ref in weight.linears],
        "scheme": scheme if view.format else "unknown",
        "on_device": {"rows": list(weight.parts), "columns": weight.inputs},
        "verdict": worst(
            [Verdict(finding["verdict"]) for finding in findings] + ([] if view.format else [Verdict.UNKNOWN])
        ).value,
        "layers": [],
        "findings": findings,
        "instead": [],
    }


def _instead(engine: Engine, view: View, role: Role) -> Iterator[str]:
    """Changes of one option with which every weight of that role loads, and nothing refuses the model as a whole, each
    tried against the same rules."""
    spec = _thinned(view.spec, view.schemes)
    schemes = {ref.key: view.schemes[ref.key] for ref in spec.linears()}
    for words, changed, deployment in _changes(view, role, schemes):
        trial = view_of(spec, view.config, changed, _config(spec, changed), deployment)
        hits = _hits(engine, trial)
        of_model = worst(rule.verdict for rule, hit in hits if hit.held is None)
        of_role = worst(rule.verdict for rule, hit in hits if hit.held and hit.held.role is role)
        if of_role is Verdict.LOADS and of_model in (Verdict.LOADS, Verdict.UNKNOWN):
            yield words


def _changes(
    view: View, role: Role, schemes: dict[str, Scheme | None]
) -> Iterator[tuple[str, dict[str, Scheme | None], Deployment]]:
    deployment = view.deployment
    refs = {ref.key: ref.role for ref in view.spec.linears() if ref.key in schemes}

    def given(scheme: Scheme | None) -> dict[str, Scheme | None]:
        return {key: scheme if refs[key] is role else old for key, old in schemes.items()}

    present = {scheme for key, scheme in schemes.items() if refs[key] is role and scheme}
    sizes = {scheme.weight.group_size for scheme in schemes.values() if scheme and scheme.weight.group_size}
    for size in (64, 32):
        if any(s.weight.strategy is Strategy.GROUP and s.weight.group_size != size for s in present):
            resized = {key: scheme_named(s.name, size) if s else None for key, s in schemes.items()}
            yield f"--group-size {size}" + (" for all" if len(sizes) > 1 else ""), resized, deployment
    if role is Role.EXPERTS and not deployment.ep and deployment.tp > 1:
        yield "--ep", schemes, dataclasses.replace(deployment, ep=True)
    option = role.option if role in OPTION_ROLES else "--scheme"
    for name in ("FP8_DYNAMIC", "W8A8", "W4A16", *(["BF16"] if role is not Role.EXPERTS else [])):
        if name not in {scheme.name for scheme in present}:
            yield f"{option} {name}", given(scheme_named(name)), deployment
    if len(set(schemes.values())) > 1:
        for name in ("FP8_DYNAMIC", "W4A16"):
            yield f"--scheme {name} for all", dict.fromkeys(schemes, scheme_named(name)), deployment
    for tp in (8, 4, 2, 1):
        if tp < deployment.tp:
            yield f"--tp {tp}", schemes, dataclasses.replace(deployment, tp=tp)


def _config(spec: ModelSpec, schemes: dict[str, Scheme | None]) -> dict[str, Any]:
    return compressed_tensors.written(schemes, [moe.router.key for moe in spec.moes()])


def _thinned(spec: ModelSpec, schemes: Mapping[str, Scheme | None]) -> ModelSpec:
    """One layer of each kind, with one expert: rules look at no more, and trials stay quick."""

    def thin(layer: Layer) -> Layer:
        if not isinstance(layer.mlp, MoE):
            return layer
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=layer.mlp.experts[:1]))

    kinds: dict[tuple[object, ...], Layer] = {}
    for layer in map(thin, spec.layers):
        refs = layer.linears()
        kind = tuple((ref.key.rpartition(".")[2], ref.out_features, ref.in_features, schemes[ref.key]) for ref in refs)
        kinds.setdefault(kind, layer)
    return dataclasses.replace(spec, layers=tuple(kinds.values()))
