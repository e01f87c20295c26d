"""`verify --engine`: what an engine's loader would do with the tensors on disk, by their headers, without that engine.

Each tensor's name is mapped to a parameter and a place in it, as the loader maps it (q_proj to qkv_proj, an expert's
gate_proj to w13). What no parameter takes is unmatched, what no tensor fills is missing, and what has another dtype or shape
is said. Then the engine's rules are asked, also those that only a file can break.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.checkpoint.coverage import bystanders
from quantkit.checkpoint.reader import CheckpointReader, Entry
from quantkit.dtypes import FLOATS, TensorPlan
from quantkit.engines.assess import Assessment, assess, check_deployment
from quantkit.engines.held import EXPERT_PARTS, FUSED, Deployment
from quantkit.engines.rules import Engine, Verdict, View, view_of, worst
from quantkit.errors import ConfigError
from quantkit.formats.base import KV_SCALE, Format, Schemes
from quantkit.formats.table import recognise
from quantkit.model.registry import build_spec
from quantkit.model.spec import HEAD, Linear, ModelSpec
from quantkit.scheme import Scheme

__all__ = ["parameter", "replay"]

_EXPERT = re.compile(r"(?P<prefix>.*\.experts)\.(?P<number>\d+)\.(?P<name>\w+)\.(?P<suffix>\w+)")
_LINEAR = re.compile(r"(?P<prefix>.*)\.(?P<name>\w+)\.(?P<suffix>\w+)")
_FUSED = {part: fused for fused, parts in FUSED.items() for part in parts}
_SKIPPED = re.compile(r".*rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_SHOWN = 20


def parameter(name: str, aliases: Mapping[str, str]) -> tuple[str, str]:
    """A tensor's name on disk -> the engine's parameter, and the place in it ('' where it is the whole of it)."""
    if match := _EXPERT.fullmatch(name):
        part = aliases.get(match["name"], match["name"])
        place = EXPERT_PARTS.get(part, part)
        return f"{match['prefix']}.{'w2' if place == 'w2' else 'w13'}_{match['suffix']}", f"{match['number']}.{part}"
    match = _LINEAR.fullmatch(name)
    if match and match["name"] in _FUSED:
        return f"{match['prefix']}.{_FUSED[match['name']]}.{match['suffix']}", match["name"]
    return name, ""


def replay(folder: Path, engine: Engine, deployment: Deployment) -> dict[str, Any]:
    """What would be unmatched, missing or mis-scaled, and what the rules say. `verdict` is the worst of all that was found.

    Raises CheckpointError, ConfigError for a folder, engine or deployment that cannot be looked at.
    """
    reader = CheckpointReader(folder)
    where = str(folder / "config.json")
    spec = build_spec(reader.config, where)
    check_deployment(deployment, spec)
    quantization = reader.config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise ConfigError(f"{where} has no quantization_config", "give a quantized checkpoint")
    schemes, form, problems = _schemes(spec, quantization, reader, where)
    name: str = form.name if form else ""
    assessed = assess(engine, spec, reader.config, schemes, quantization, deployment, name)
    if form:
        view = view_of(spec, reader.config, schemes, quantization, deployment, name)
        aliases = engine.aliases.get(view.model_type, {})
        for kind, name, text in _mapped(reader, spec, _expected(spec, schemes, form), schemes, quantization, aliases):
            problems.append(_problem(kind, text, engine.loader(view, kind, _EXPERT.fullmatch(name) is not None)))
        problems += list(_on_file(engine, view, reader))
    return _report(folder, assessed, problems)


def _report(folder: Path, assessed: Assessment, problems: list[dict[str, str]]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for problem in problems:
        counts[problem["kind"]] = counts.get(problem["kind"], 0) + 1
    verdict = worst([assessed.verdict, *(Verdict(problem["verdict"]) for problem in problems)])
    summary = {**assessed.as_dict(), "verdict": verdict.value, "loads": verdict is Verdict.LOADS}
    return {"path": str(folder), **summary, "counts": counts, "problems": problems[:_SHOWN]}


def _schemes(
    spec: ModelSpec, quantization: dict[str, Any], reader: CheckpointReader, where: str
) -> tuple[Schemes, Format | None, list[dict[str, str]]]:
    """What the config says of each linear, in its format; if that is none that quantkit has, no format and one problem."""
    keys = [ref.key for ref in spec.linears()]
    try:
        form = recognise(quantization, reader.entries)
        schemes = form.parse(quantization, keys, reader.entries)
        # An engine asks the config, which does not say what scales are stored in.
        return {key: scheme.stored("BF16") if scheme else None for key, scheme in schemes.items()}, form, []
    except ConfigError as error:
        return dict.fromkeys(keys), None, [_problem("scheme", f"{where}: {error.problem}", Verdict.UNKNOWN)]


def _problem(kind: str, text: str, verdict: Verdict) -> dict[str, str]:
    return {"kind": kind, "problem": text, "verdict": verdict.value}


def _expected(spec: ModelSpec, schemes: Schemes, form: Format) -> dict[str, TensorPlan]:
    """Every tensor that the engine's parameters want, by its name on disk."""
    expected = {key: TensorPlan(key, FLOATS[0], shape) for key, shape in spec.tensors().items()}
    for ref in spec.linears():
        if (scheme := schemes[ref.key]) is not None:
            del expected[ref.weight]
            expected.update({tensor.name: tensor for tensor in form.planned(ref, scheme)})
    return expected


def _mapped(
    reader: CheckpointReader,
    spec: ModelSpec,
    expected: Mapping[str, TensorPlan],
    schemes: Schemes,
    quantization: Mapping[str, Any],
    aliases: Mapping[str, str],
) -> Iterator[tuple[str, str, str]]:
    """Map every tensor, and compare with what the parameters want: kind of problem, tensor, and what to say.

    Scales are copied into the dtype of the parameter, so any float does; codes and zero points must be what they are.
    """
    parameters = {parameter(name, aliases): tensor for name, tensor in expected.items()}
    linears, (never, _) = {ref.key: ref for ref in spec.linears()}, bystanders(spec)
    filled: set[tuple[str, str]] = set()
    for name, entry in reader.entries.items():
        place = parameter(name, aliases)
        if place in parameters:
            filled.add(place)
            tensor = parameters[place]
            if entry.dtype not in tensor.dtypes or entry.shape != tensor.shape:
                kind = "shape" if entry.shape != tensor.shape else "dtype"
                yield kind, name, _misfit(name, entry, tensor)
        elif not _harmless(name, spec, quantization):
            yield "unmatched", name, _why_unmatched(name, linears, schemes, never)
    for place, tensor in parameters.items():
        if place not in filled and not tensor.optional:
            where = f"of {place[0]}" + (f", part {place[1]}" if place[1] else "")
            yield "missing", tensor.name, f"'{tensor.name}' is missing: {where}, stays unfilled"


def _misfit(name: str, entry: Entry, tensor: TensorPlan) -> str:
    expected = f"{' or '.join(tensor.dtypes)} {tensor.shape}"
    return f"'{name}' is {entry.dtype} {entry.shape}, the engine wants {expected}"


def _harmless(name: str, spec: ModelSpec, quantization: Mapping[str, Any]) -> bool:
    """A tied head stored once more, rotary tables, and K/V scales where the config has a scheme for them: all are skipped
    or taken by every engine."""
    if name == HEAD and spec.head is None:
        return True
    return bool(_SKIPPED.fullmatch(name) or (quantization.get("kv_cache_scheme") and KV_SCALE.match(name)))


def _why_unmatched(
    name: str, linears: Mapping[str, Linear], schemes: Mapping[str, Scheme | None], never: Sequence[str]
) -> str:
    key, _, suffix = name.rpartition(".")
    scheme = schemes.get(key)
    if suffix == "weight_zero_point" and scheme and scheme.weight.symmetric:
        return f"'{name}': {scheme.name} is symmetric and has no zero point"
    if key in never:
        return f"'{name}': routers and the head are never quantized"
    if key in linears:
        return f"'{name}': the config says {scheme.name if scheme else 'it is not quantized'}, which has no such tensor"
    if suffix != "weight" and suffix.startswith(("weight_", "input_")):
        return f"'{name}': the engine has no quantized linear there"
    return f"'{name}' is no parameter"


def _on_file(engine: Engine, view: View, reader: CheckpointReader) -> Iterator[dict[str, str]]:
    for rule in engine.rules:
        if rule.on_file:
            for problem in rule.on_file(view, reader):
                yield {**_problem("rule", f"{problem} ({rule.id}: {rule.says})", rule.verdict), "rule": rule.id}
