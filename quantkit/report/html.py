"""A report as one HTML file that needs nothing else: the template beside this file, filled and escaped by Jinja."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quantkit.errors import shown_lines
from quantkit.report import plots, words
from quantkit.report.metrics import Metric, broken_where, metrics, worst_expert, worst_weight
from quantkit.report.schema import LinearRow, Report, Run
from quantkit.report.template import environment

__all__ = ["html"]


@dataclass(frozen=True)
class _View:
    """What the template shows of one run. id: prefix of its anchors."""

    id: str
    name: str
    report: Report
    plots: dict[str, Markup]
    known: dict[str, Metric]

    @property
    def quantized(self) -> list[LinearRow]:
        return [row for row in self.report.linears if row.scheme]

    @property
    def methods(self) -> dict[str, int]:
        """How many linears each scheme and method really got."""
        counts: dict[str, int] = {}
        for row in self.report.linears:
            name = f"{row.scheme}, {row.method or 'method not recorded'}" if row.scheme else "kept in BF16"
            counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    @property
    def fallbacks(self) -> list[LinearRow]:
        return [row for row in self.quantized if row.fallback]

    @property
    def thin(self) -> list[LinearRow]:
        """Expert inputs with fewer calibration tokens than features, thinnest first."""
        rows = [row for row in self.report.linears if row.coverage is not None and row.coverage < 1]
        return sorted(rows, key=lambda row: row.coverage or 0.0)

    @property
    def unseen(self) -> tuple[int, int]:
        """Experts to which no evaluated token was sent, of how many."""
        sent = [tokens for layer in self.report.moe.layers for tokens in layer.evaluated_tokens]
        return sum(not tokens for tokens in sent), len(sent)

    @property
    def roles(self) -> list[str]:
        return sorted({role for row in self.report.layers for role in row.roles})

    @property
    def worst_linears(self) -> list[LinearRow]:
        return sorted(self.quantized, key=lambda row: -(row.weight_error or 0.0))[:8]

    @property
    def worst_expert(self) -> str:
        worst = worst_expert(self.report)
        return f"{worst[0]} ({words.percent(worst[1].value)} of its energy)" if worst else ""

    @property
    def worst_weight(self) -> str:
        worst = worst_weight(self.report)
        return f"{worst[0]} ({words.percent(worst[1])} of its length)" if worst else ""


def html(runs: Sequence[Run]) -> str:
    """The page. Everything that comes from a model, a text or a name is escaped; plots are SVG that `plots` made."""
    page = environment(_printable)
    page.filters.update(number=words.number, percent=words.percent, size=words.size, visible=visible)
    page.globals.update(
        value=words.value, interval=words.interval, bounds=words.bounds, heat=heat, broken_where=broken_where
    )
    views = [
        _View(f"r{i}", run.name, run.report, _plots(f"r{i}", run.report), metrics(run.report)) for i, run in enumerate(runs)
    ]
    pareto = Markup(plots.pareto(runs)) if len(runs) > 1 else ""
    return page.get_template("report.html.j2").render(views=views, pareto=pareto)


def _printable(value: object) -> object:
    """What the page shows of a value: text from a file must not turn the direction of what is around it."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\t".join(shown_lines(part) for part in value.split("\t"))


def _plots(prefix: str, report: Report) -> dict[str, Markup]:
    images: dict[str, str] = {}
    if report.divergence:
        images["distribution"] = plots.distribution(report.divergence, f"{prefix}-distribution")
        images["positions"] = plots.by_position(report.divergence.positions, f"{prefix}-positions")
    if any(row.hidden_error is not None for row in report.layers):
        images["layers"] = plots.layers(report.layers, f"{prefix}-layers")
    experts = report.moe.layers
    if any(value is not None for row in experts for value in row.coverage):
        images["coverage"] = plots.coverage(experts, f"{prefix}-coverage")
    if any(value is not None for row in experts for value in row.output_error):
        images["output_errors"] = plots.output_errors(experts, f"{prefix}-errors")
    if report.allocation:
        measured = report.divergence.kl["mean"].value if report.divergence else None
        images["allocation"] = plots.allocation(report.allocation, measured, f"{prefix}-allocation")
    if report.context:
        images["context"] = plots.by_position(report.context.positions, f"{prefix}-context")
    return {name: Markup(svg) for name, svg in images.items()}


def visible(text: str) -> str:
    """Text with its white space made to be seen where it is all there is, and without control characters."""
    cleaned = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    return cleaned.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") if not cleaned.strip() else cleaned


def heat(error: float | None) -> int:
    """0..100 for the background of a cell: -50 dB is 0, 0 dB (all is error) is 100."""
    return 0 if not error or error <= 0 else round(min(100.0, max(0.0, 100 + 20 * math.log10(error))))
