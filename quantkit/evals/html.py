"""A report as one HTML file that needs nothing else: the template beside this file, filled and escaped by Jinja."""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from quantkit.evals import plots, words
from quantkit.evals.metrics import metrics
from quantkit.evals.schema import Report, Run

__all__ = ["html"]


def html(runs: Sequence[Run]) -> str:
    """The page. Everything that comes from a model, a text or a name is escaped; plots are SVG that `plots` made."""
    environment = Environment(
        loader=PackageLoader("quantkit.evals", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        number=words.number, percent=words.percent, size=words.size, visible=visible
    )
    environment.globals.update(value=words.value, interval=words.interval, heat=heat)
    sections = [(f"r{i}", run.name, run.report, _plots(run.report), metrics(run.report)) for i, run in enumerate(runs)]
    pareto = Markup(plots.pareto(runs)) if len(runs) > 1 else ""
    return environment.get_template("report.html.j2").render(runs=sections, pareto=pareto)
