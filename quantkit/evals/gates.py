"""Gates: `metric < number`, decided on the confidence bound. A verdict that a release can hang on, and JUnit XML of it.

A gate passes when the whole 95 % interval lies on the right side of its threshold, fails when the whole of it lies on the
wrong side, and is undecided when the threshold is inside. An exact metric (a count, a size, an error of stored weights) is
its own bound.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast
from xml.etree import ElementTree

import yaml

from quantkit.errors import ConfigError
from quantkit.evals.metrics import Metric, metrics
from quantkit.evals.schema import Figure, GateResult, Report, Status, Verdict
from quantkit.evals.words import interval, value

__all__ = ["DEFAULT_GATES", "EXIT_CODES", "Gate", "decide", "junit", "parse_gate", "read_gates"]

Operator = Literal["<", "<=", ">", ">="]
# What a sound 4-bit model meets and a damaged one does not. The first three are about the whole; the last two find a single
# matrix: rounding to 4 bits costs an expert some per cent of its output's energy, and a scale that is wrong by a factor of
# 2 costs at least a quarter of it; weights in groups of 128 move by 8 to 20 % in length.
DEFAULT_GATES = (
    "kl.mean < 0.05",
    "perplexity.ratio < 1.02",
    "top1_agreement > 0.85",
    "mlp.output_error.max < 0.15",
    "weights.error.max < 0.3",
)
_ALWAYS = "not_finite.tokens <= 0"
EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 3}
_GATE = re.compile(r"\s*([A-Za-z][\w.:-]*)\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_HOW = {
    "context": "quantkit eval --context",
    "kv_cache": "quantkit eval --kv-cache fp8",
    "tasks": "quantkit eval --tasks",
    "change": "--against PREVIOUS",
    "coverage": "a calibrated quantkit checkpoint with routed experts",
    "fallbacks": "a quantkit checkpoint, which has a run.json",
}


@dataclass(frozen=True)
class Gate:
    text: str
    metric: str
    operator: Operator
    threshold: float

    def holds(self, value: float) -> bool:
        below, equal = value < self.threshold, value == self.threshold
        return {"<": below, "<=": below or equal, ">": not below and not equal, ">=": not below}[self.operator]


def parse_gate(text: str) -> Gate:
    """`kl.mean<0.02`. Raises ConfigError."""
    match = _GATE.fullmatch(text)
    if not match or not math.isfinite(float(match[3])):
        raise ConfigError(f"gate {text!r} is not understood", "write METRIC<NUMBER, with <, <=, > or >=: 'kl.mean<0.02'")
    return Gate(text.strip(), match[1], cast(Operator, match[2]), float(match[3]))


def read_gates(path: Path) -> list[Gate]:
    """A YAML file: a list of gates, or such a list under the key `gates`. Raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"gates {path} cannot be read: {error}", "give a YAML file with a list of gates") from error
    rows = data["gates"] if isinstance(data, dict) and set(data) == {"gates"} else data
    if not isinstance(rows, list) or not rows or not all(isinstance(row, str) for row in rows):
        raise ConfigError(f"gates {path} holds no list of gates", 'write lines such as "- kl.mean < 0.02"')
    return [parse_gate(row) for row in rows]


def decide(report: Report, gates: Sequence[Gate] | None = None) -> Report:
    """The report with these gates (None: the default ones that its model has metrics for) and the verdict. Raises
    ConfigError for a gate whose metric is unknown, was not measured or has no interval."""
    known = metrics(report)
    broken = report.finite.tokens > 0
    if gates is None:
        gates = [gate for gate in map(parse_gate, DEFAULT_GATES) if gate.metric in known or broken]
    results = [_decide(gate, known, report) for gate in [parse_gate(_ALWAYS), *gates]]
    failed, open_ = ([r for r in results if r.status == status] for status in ("fail", "undecided"))
    reasons = [f"{r.gate}: {r.reason}" for r in (*failed, *open_)] or [f"all {len(results)} gates pass"]
    status: Status = "fail" if failed else "undecided" if open_ else "pass"
    return report.model_copy(update={"gates": results, "verdict": Verdict(status=status, reasons=reasons)})


def _decide(gate: Gate, known: dict[str, Metric], report: Report) -> GateResult:
    metric = known.get(gate.metric)
    if report.finite.tokens and (metric is None or metric.quality):
        where = known["not_finite.tokens"].where
        reason = f"{report.finite.tokens:,} of {report.finite.of:,} tokens have logits that are not finite: {where}"
        return _result(gate, metric.figure if metric else None, "fail", reason, where)
    if metric is None:
        raise _unknown(gate, known)
    figure, where = metric.figure, metric.where
    at = f"; {where}" if where else ""
    measured = value(gate.metric, figure.value)
    if metric.exact:
        return _result(gate, figure, "pass" if gate.holds(figure.value) else "fail", f"{measured}, exact{at}", where)
    if gate.metric == "kl.max":
        raise ConfigError("kl.max is the extreme of a sample and has no interval to decide on", "gate kl.p999 instead")
    units = f"{report.provenance.unit}s"
    if figure.low is None or figure.high is None:
        reason = f"{measured} without an interval: fewer than 5 {units} were read{at}"
        return _result(gate, figure, "undecided", reason, where, max(5, report.provenance.units + 1))
    reason = f"{measured}, 95 % interval {interval(gate.metric, figure)}{at}"
    passed, missed = (gate.holds(bound) for bound in (figure.low, figure.high))
    if passed == missed:
        return _result(gate, figure, "pass" if passed else "fail", reason, where)
    needed = _needed(gate, figure, report.provenance.units)
    more = f"about {needed:,} {units} instead of {report.provenance.units:,}" if needed else f"no number of {units}"
    return _result(gate, figure, "undecided", f"{reason}; the threshold lies inside, {more} would decide", where, needed)


def _result(
    gate: Gate, measured: Figure | None, status: Status, reason: str, where: str = "", more: int | None = None
) -> GateResult:
    return GateResult(
        gate=gate.text,
        metric=gate.metric,
        measured=measured,
        operator=gate.operator,
        threshold=gate.threshold,
        status=status,
        reason=reason,
        where=where,
        more_documents=more,
    )


def _needed(gate: Gate, figure: Figure, units: int) -> int | None:
    """An interval's width falls as 1 / sqrt(n): how many units bring its bound to the threshold, if the value stays."""
    distance = abs(figure.value - gate.threshold)
    if not distance or figure.low is None or figure.high is None:
        return None
    reach = figure.high - figure.value if figure.value < gate.threshold else figure.value - figure.low
    factor = (reach / distance) ** 2
    return math.ceil(units * max(factor, 1.0)) + 1 if factor < 1e6 else None


def _unknown(gate: Gate, known: dict[str, Metric]) -> ConfigError:
    group = gate.metric.partition(".")[0]
    if group in _HOW and not any(name.startswith(f"{group}.") for name in known):
        return ConfigError(f"gate '{gate.text}': {gate.metric} was not measured", f"it needs {_HOW[group]}")
    near = difflib.get_close_matches(gate.metric, known, n=1, cutoff=0.75)
    meant = f"did you mean {near[0]}? " if near else ""
    return ConfigError(f"gate '{gate.text}' names no metric of this report", f"{meant}known are {', '.join(sorted(known))}")


def junit(reports: Sequence[tuple[str, Report]]) -> bytes:
    """One suite for each named report, one case for each gate: failure when it failed, error when it is undecided."""
    root = ElementTree.Element("testsuites")
    for name, report in reports:
        count = {s: str(sum(r.status == s for r in report.gates)) for s in ("fail", "undecided")}
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            {
                "name": _printable(f"quantkit gates: {name}"),
                "tests": str(len(report.gates)),
                "failures": count["fail"],
                "errors": count["undecided"],
            },
        )
        for result in report.gates:
            case = ElementTree.SubElement(suite, "testcase", classname="quantkit.gates", name=_printable(result.gate))
            if result.status != "pass":
                kind = "failure" if result.status == "fail" else "error"
                ElementTree.SubElement(case, kind, message=_printable(result.reason), type=result.status)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)
