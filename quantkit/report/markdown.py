"""A report as Markdown for a pull request: the verdict, the gates and the main figures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quantkit.errors import shown
from quantkit.report.metrics import metrics, worst_expert, worst_weight
from quantkit.report.names import METRICS
from quantkit.report.schema import Report, Run
from quantkit.report.words import bounds, interval, number, percent, size, value

__all__ = ["markdown"]

_TITLES = {"pass": "PASS", "fail": "FAIL", "undecided": "UNDECIDED"}
_FIGURES = tuple(name for name, row in METRICS.items() if row.summary)
_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]()#+!|~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def _safe(text: str) -> str:
    """Text that Markdown and HTML take literally, on one line."""
    return shown(text.replace("\n", " "), 2000).translate(_SPECIAL)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [[*head], ["---"] * len(head), *([_safe(cell) for cell in row] for row in rows)]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def markdown(runs: Sequence[Run]) -> str:
    lines: list[str] = []
    if len(runs) > 1:
        lines += ["# quantkit: comparison", "", *_comparison(runs)]
    for run in runs:
        lines += _one(run.report)
    return "\n".join(lines)


def _comparison(runs: Sequence[Run]) -> list[str]:
    def row(run: Run) -> list[str]:
        known = metrics(run.report)
        names = ("size.bytes", "kl.mean", "kl.p99", "perplexity.ratio", "top1_agreement")
        cells = [value(name, known[name].figure.value) if name in known else "–" for name in names]
        return [run.name, _TITLES[run.report.verdict.status], *cells]

    rows = _table(("run", "verdict", "size", "mean KL", "p99 KL", "perplexity ratio", "top-1"), map(row, runs))
    if len({run.report.provenance.text_digest for run in runs}) > 1:
        rows += ["**These runs were evaluated on different texts: their figures cannot be compared.**", ""]
    return rows


def _one(report: Report) -> list[str]:
    origin, known = report.provenance, metrics(report)
    lines = [f"# {_TITLES[report.verdict.status]}: {_safe(origin.quantized)}", ""]
    lines += [f"- {_safe(reason)}" for reason in report.verdict.reasons] + [""]
    gates = ((r.gate, value(r.metric, r.measured.value if r.measured else None), bounds(r), r.status) for r in report.gates)
    lines += _table(("gate", "measured", "95 % interval", "decision"), gates)
    present = [name for name in _FIGURES if name in known]
    figures = ((name, value(name, known[name].figure.value), interval(name, known[name].figure)) for name in present)
    lines += _table(("figure", "value", "95 % interval"), figures)
    if report.tasks:
        tasks = (
            (
                f"{t.name} ({t.metric})",
                *(percent(x) for x in (t.baseline, t.quantized, t.recovery)),
                " to ".join(percent(x) for x in t.ci95 or ()),
                f"{t.right_to_wrong} / {t.wrong_to_right}",
                number(t.mcnemar_p),
                str(t.n),
            )
            for t in report.tasks
        )
        head = ("task", "baseline", "quantised", "recovery", "95 % interval", "right→wrong / wrong→right", "McNemar p", "n")
        lines += _table(head, tasks)
    if report.changes:
        changes = (
            (
                c.metric,
                value(c.metric, c.previous.value),
                value(c.metric, c.current.value),
                "regression" if c.regression else "",
            )
            for c in report.changes
        )
        lines += [f"Against {_safe(report.previous or '')}:", "", *_table(("metric", "before", "now", ""), changes)]
    return [*lines, *_facts(report)]


def _facts(report: Report) -> list[str]:
    origin, of = report.provenance, [row for row in report.linears if row.scheme]
    fallbacks = [row for row in of if row.fallback]
    expert, weight = worst_expert(report), worst_weight(report)
    shrunk = f"{size(report.size.baseline_bytes)} to {size(report.size.bytes)}"
    lines = [
        f"- Size: {shrunk}, {report.size.bits_per_weight:.2f} bits a weight.",
        f"- Fallbacks: {len(fallbacks)} of {len(of)} quantised linears.",
        f"- Text: {origin.tokens:,} tokens, {origin.units} {_safe(origin.unit)}s of {_safe(origin.text)}.",
    ]
    if text := origin.text_tokens:
        begun = " ".join(map(str, text.first_ids))
        known = "not known" if text.bos_added is None else "added to raw text" if text.bos_added else "not added"
        lines.append(f"- Its ids begin {begun}; BOS token: {known} ({_safe(text.bos_why)}).")
    if report.moe.not_finite:
        lines.append(f"- Output not finite: {'; '.join(report.moe.not_finite[:20])}.")
    if expert:
        lines.append(f"- Largest output error of an MLP: {percent(expert[1].value)} of its energy, {expert[0]}.")
    if weight:
        lines.append(f"- Largest weight error: {percent(weight[1])} of its length, {_safe(weight[0])}.")
    lines += [f"- {_safe(note)}." for note in report.notes]
    return [*lines, "", "To reproduce:", "", f"    {shown(origin.command, 2000)}", ""]
