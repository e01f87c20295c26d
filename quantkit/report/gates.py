"""Gates: `metric < number`, decided on the confidence bound. A verdict that a release can hang on, and JUnit XML of it.

A gate passes when the whole 95 % interval lies on the right side of its threshold, fails when the whole of it lies on the
wrong side, and is undecided when the threshold is inside. An exact metric (a count, a size, an error of stored weights) is
its own bound.
"""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from xml.etree import ElementTree

import yaml

from quantkit.errors import ConfigError, shown
from quantkit.report.metrics import Metric, Sample, broken_where, metrics
from quantkit.report.names import METRICS, NEEDS
from quantkit.report.schema import Decision, Figure, GateResult, Operator, Report, Status, Verdict
from quantkit.report.words import interval, value

__all__ = [
    "DEFAULT_GATES",
    "EXIT_CODES",
    "EXTREME",
    "Gate",
    "decide",
    "junit",
    "meant",
    "no_bound",
    "parse_gate",
    "read_gates",
]

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
_FINITE = "not_finite.tokens"
_ALWAYS = f"{_FINITE} <= 0"
EXIT_CODES = {"pass": 0, "fail": 1, "undecided": 3}
_GATE = re.compile(r"\s*([A-Za-z][\w.:-]*)\s*(<=|>=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
EXTREME = "kl.max"  # of a sample: no interval to decide on
_HOW = {
    **NEEDS,
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
        """False for every operator when the value is not a number."""
        compare = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
        return bool(compare[self.operator](value, self.threshold))


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
    """The report with these gates (None: the default ones, of which those that its model has no metric for are shown as not
    measured) and the verdict. Raises ConfigError for a gate whose metric is unknown, was not measured or has no interval."""
    available = metrics(report)
    absent: list[GateResult] = []
    if gates is None:
        defaults = [parse_gate(text) for text in DEFAULT_GATES]
        gates = [
            gate for gate in defaults if gate.metric in available or _not_finite(gate, report, available.get(gate.metric))
        ]
        absent = [_result(gate, None, "not measured", _absent(gate)) for gate in defaults if gate not in gates]
    results = [*(_decide(gate, available, report) for gate in [parse_gate(_ALWAYS), *gates]), *absent]
    failed, open_ = ([r for r in results if r.status == status] for status in ("fail", "undecided"))
    passed = len(results) - len(absent)
    reasons = [f"{r.gate}: {r.reason}" for r in (*failed, *open_)] or [
        f"all {passed} {'measured ' if absent else ''}gates pass"
    ]
    reasons += [f"{r.gate}: {r.reason}" for r in absent]
    status: Status = "fail" if failed else "undecided" if open_ else "pass"
    return report.model_copy(update={"gates": results, "verdict": Verdict(status=status, reasons=reasons)})


def _absent(gate: Gate) -> str:
    why = {
        "mlp.output_error.max": "no scored token of the probe reached an MLP",
        "weights.error.max": "no linear is quantized",
    }
    return f"not measured: {why.get(gate.metric, 'this report has no such figure')}"


def _not_finite(gate: Gate, report: Report, metric: Metric | None) -> tuple[str, str] | None:
    """What is not finite, such that the gate fails whatever else was measured, and where."""
    name, finite = gate.metric.removeprefix("change."), report.finite
    if finite.tokens and (metric is None or metric.quality):
        where = broken_where(report)
        return f"{finite.tokens:,} of {finite.of:,} tokens have logits that are not finite: {where}", where
    if name in ("mlp.output_error.max", _FINITE) and report.moe.not_finite:
        count, where = len(report.moe.not_finite), ", ".join(report.moe.not_finite[:5])
        where += ", ..." if count > 5 else ""
        return f"the output of {count} MLP{'s' if count > 1 else ''} is not finite: {where}", where
    if name in METRICS and METRICS[name].probe and any(finite.probe.values()):
        where = ", ".join(f"{count:,} in '{variant}'" for variant, count in finite.probe.items() if count)
        return f"logits of the probe are not finite for some tokens: {where}", where
    return None


def _decide(gate: Gate, available: dict[str, Metric], report: Report) -> GateResult:
    metric = available.get(gate.metric)
    if broken := _not_finite(gate, report, metric):
        return _result(gate, metric, "fail", *broken)
    if metric is None:
        raise _unknown(gate, available, report)
    if gate.metric == EXTREME:
        raise no_bound(gate)
    figure, where, sample = metric.figure, metric.where, metric.sample
    at = f"; {where}" if where else ""
    measured = value(gate.metric, figure.value)
    if sample is None:
        return _result(gate, metric, "pass" if gate.holds(figure.value) else "fail", f"{measured}, exact{at}", where)
    if figure.low is None or figure.high is None:
        needed = max(sample.least, sample.count + 1)
        reason = f"{measured} without an interval, which takes {sample.least:,} {sample.unit}s{at}"
        return _result(gate, metric, "undecided", f"{reason}; {_advice(sample, figure, needed)}", where, needed)
    reason = f"{measured}, 95 % interval {interval(gate.metric, figure)}{at}"
    passed, missed = (gate.holds(bound) for bound in (figure.low, figure.high))
    if passed == missed:
        return _result(gate, metric, "pass" if passed else "fail", reason, where)
    more = _needed(gate, figure, sample.count)
    return _result(
        gate, metric, "undecided", f"{reason}; the threshold lies inside, {_advice(sample, figure, more)}", where, more
    )


def _result(
    gate: Gate, metric: Metric | None, status: Decision, reason: str, where: str = "", needed: int | None = None
) -> GateResult:
    sample = metric.sample if metric and status == "undecided" else None
    advice = _advice(sample, metric.figure, needed) if metric and sample else ""
    return GateResult(
        gate=gate.text,
        metric=gate.metric,
        measured=metric.figure if metric else None,
        operator=gate.operator,
        threshold=gate.threshold,
        status=status,
        reason=reason,
        exact=metric is not None and metric.exact,
        where=where,
        needed=needed,
        unit=sample.unit if sample else "",
        advice=advice,
    )


def _advice(sample: Sample, figure: Figure, needed: int | None) -> str:
    """How much would decide, if the value stays, and how to get it. Of a figure without an interval nobody can tell: how
    much gives it one."""
    if needed is None:
        return f"no number of {sample.unit}s would decide"
    about, end = ("", "give one") if figure.low is None else ("about ", "would decide if the value stays")
    advice = f"{about}{needed:,} {sample.unit}s instead of {sample.count:,} {end}"
    reached = sample.most is None or needed <= sample.most
    return f"{advice}: {sample.option}" if reached else f"{advice}, but {sample.bounded}"


def _needed(gate: Gate, figure: Figure, units: int) -> int | None:
    """An interval's width falls as 1 / sqrt(n): how many units bring its bound to the threshold, if the value stays."""
    distance = abs(figure.value - gate.threshold)
    if not distance or figure.low is None or figure.high is None:
        return None
    reach = figure.high - figure.value if figure.value < gate.threshold else figure.value - figure.low
    factor = (reach / distance) ** 2
    return math.ceil(units * max(factor, 1.0)) + 1 if factor < 1e6 else None


def _unknown(gate: Gate, available: dict[str, Metric], report: Report) -> ConfigError:
    group, _, rest = gate.metric.removeprefix("change.").partition(".")
    name, _, leaf = rest.rpartition(".")
    if group == "tasks" and leaf == "mcnemar_p":
        problem = "a p-value passes it the more easily the fewer items were run, and is no measure of the loss"
        return ConfigError(f"gate '{gate.text}': {problem}", f"gate tasks.{name}.recovery, which is decided on its interval")
    if group == "tasks" and leaf == "recovery" and any(t.name == name and t.recovery is None for t in report.tasks):
        problem = f"the baseline got no item of {name} right, so there is nothing to recover"
        return ConfigError(f"gate '{gate.text}': {problem}", "run more items (--limit), or gate another task")
    group = gate.metric.partition(".")[0]
    if group in _HOW and not any(name.startswith(f"{group}.") for name in available):
        return ConfigError(f"gate '{gate.text}': {gate.metric} was not measured", f"it needs {_HOW[group]}")
    problem = f"gate '{gate.text}' names no metric of this report"
    return ConfigError(problem, f"{meant(gate.metric, available)}known are {', '.join(sorted(available))}")


def meant(name: str, names: Iterable[str]) -> str:
    """What a name that is not known may be a slip of, as the beginning of a sentence."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return f"did you mean {near[0]}? " if near else ""


def no_bound(gate: Gate) -> ConfigError:
    problem = f"{EXTREME} is the extreme of a sample and has no interval to decide on"
    return ConfigError(f"gate '{gate.text}': {problem}", "gate kl.p999 instead")


def junit(reports: Sequence[tuple[str, Report]]) -> bytes:
    """One suite for each named report, one case for each gate: failure when it failed, error when it is undecided, skipped
    when it was not measured."""
    root = ElementTree.Element("testsuites")
    for name, report in reports:
        count = {s: str(sum(r.status == s for r in report.gates)) for s in ("fail", "undecided", "not measured")}
        suite = ElementTree.SubElement(
            root,
            "testsuite",
            {
                "name": _printable(f"quantkit gates: {name}"),
                "tests": str(len(report.gates)),
                "failures": count["fail"],
                "errors": count["undecided"],
                "skipped": count["not measured"],
            },
        )
        for result in report.gates:
            case = ElementTree.SubElement(suite, "testcase", classname="quantkit.gates", name=_printable(result.gate))
            if result.status == "not measured":
                ElementTree.SubElement(case, "skipped", message=_printable(result.reason))
            elif result.status != "pass":
                kind = "failure" if result.status == "fail" else "error"
                ElementTree.SubElement(case, kind, message=_printable(result.reason), type=result.status)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _printable(text: str) -> str:
    """Without the control characters that XML cannot hold."""
    return shown(text, 2000)
