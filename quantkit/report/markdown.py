"""A report as Markdown for a pull request (verdict, gates, main figures): the template beside this file, filled by Jinja."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantkit.errors import shown
from quantkit.report import words
from quantkit.report.metrics import Metric, metrics, worst_expert, worst_weight
from quantkit.report.names import METRICS
from quantkit.report.schema import Figure, Report, Run
from quantkit.report.template import environment

if TYPE_CHECKING:
    from jinja2 import Environment

__all__ = ["markdown"]

_FIGURES = tuple(name for name, row in METRICS.items() if row.summary)
_COMPARED = ("size.bytes", "kl.mean", "kl.p99", "perplexity.ratio", "top1_agreement")
_SPECIAL = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]()#+!|~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def _safe(text: str) -> str:
    """Text that Markdown and HTML take literally, on one line."""
    return shown(text.replace("\n", " "), 2000).translate(_SPECIAL)


@dataclass(frozen=True)
class _View:
    """What the template shows of one run beside its report. fallbacks: of how many quantized linears."""

    name: str
    report: Report
    known: dict[str, Metric]
    fallbacks: int
    quantized: int
    expert: tuple[str, Figure] | None
    weight: tuple[str, float] | None


def markdown(runs: Sequence[Run]) -> str:
    """The text. Everything that comes from a model, a text or a name is escaped; the command, which stands as code, is shown
    as it is."""
    texts = {run.report.provenance.text_digest for run in runs}
    views = [_view(run.name, run.report) for run in runs]
    template = _environment().get_template("report.md.j2")
    return template.render(views=views, figures=_FIGURES, compared=_COMPARED, texts=len(texts))


def _view(name: str, report: Report) -> _View:
    of = [row for row in report.linears if row.scheme]
    fallbacks = sum(bool(row.fallback) for row in of)
    return _View(name, report, metrics(report), fallbacks, len(of), worst_expert(report), worst_weight(report))


def _environment() -> Environment:
    from markupsafe import Markup

    def escaped(value: object) -> object:
        """Of each expression of the template: what Markdown would read is marked as text, so Jinja leaves it alone."""
        return Markup(_safe(value)) if isinstance(value, str) and not isinstance(value, Markup) else value

    text = environment(escaped)
    text.filters["literal"] = lambda text: Markup(shown(text, 2000))
    text.globals.update({name: getattr(words, name) for name in words.__all__})
    return text
