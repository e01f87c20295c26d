"""Plots as SVG to stand inside a page: text stays text, colours are the page's own variables, so that light and dark both
serve. Nothing in them points elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from quantkit.report.allocation_schema import Allocation
from quantkit.report.metrics import metrics
from quantkit.report.schema import ContextBucket, Divergence, LayerRow, MoeLayer, Run
from quantkit.report.words import number, size

__all__ = ["allocation", "by_position", "coverage", "distribution", "layers", "output_errors", "pareto"]

# Colours that only stand for a variable of the page's style sheet.
_INK, _MUTED, _LINE, _ACCENT, _SECOND, _BAD = "#010203", "#020304", "#030405", "#040506", "#050607", "#060708"
_VARIABLES = {_INK: "ink", _MUTED: "muted", _LINE: "line", _ACCENT: "accent", _SECOND: "second", _BAD: "bad"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quantkit",
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": _INK,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "legend.frameon": False,
    "axes.grid": False,
    "text.parse_math": False,
}
_VECTOR_CELLS = 4096  # a heat map with more is a picture inside the SVG


def _svg(draw: Callable[[Axes], None], name: str, title: str, description: str, height: float = 2.6) -> str:
    """name: of this plot on the page; ids begin with it, so that two plots do not mix."""
    with matplotlib.rc_context(_STYLE):
        canvas = Canvas(figsize=(5.6, height), layout="constrained")
        canvas.patch.set_alpha(0)
        axes = canvas.subplots()
        axes.patch.set_alpha(0)
        draw(axes)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px var(--font)", text)
    text = re.sub(r'id="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var(--{variable})")
    head, rest = text.split(">", 1)
    head = re.sub(r' (width|height|version)="[^"]*"', "", head)
    label = f'role="img" aria-labelledby="{name}-title {name}-desc"'
    about = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    return f"{head} {label}>{about}{rest}"


def _log_scale(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:.2g}")
    axes.yaxis.set_minor_locator(NullLocator())


def distribution(divergence: Divergence, name: str) -> str:
    """Histogram of log10 KL over tokens."""

    def draw(axes: Axes) -> None:
        edges = np.array(divergence.histogram.edges)
        axes.bar(edges[:-1], divergence.histogram.counts, width=np.diff(edges) * 0.92, align="edge", color=_ACCENT)
        axes.set_xlabel("KL of a token, nats (log scale)")
        axes.set_ylabel("tokens")
        top = max(divergence.histogram.counts) or 1
        for i, key in enumerate(("median", "mean", "p99", "p999")):
            at = np.log10(max(divergence.kl[key].value, 1e-7))
            axes.axvline(at, color=_INK, linewidth=0.8, linestyle=(0, (3, 3)))
            axes.text(at + 0.05, top * (1.14 - 0.09 * (i % 2)), {"p999": "p99.9"}.get(key, key), ha="left", va="center")
        used = np.flatnonzero(divergence.histogram.counts)
        low = edges[used[0]] if len(used) else -7
        axes.set_xlim(min(low, -4), max(edges[used[-1] + 1] if len(used) else 0, 0) + 0.6)
        axes.set_ylim(0, top * 1.22)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
        axes.xaxis.set_major_formatter(lambda x, _: f"{10**x:g}")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))

    summary = ", ".join(f"{key} {number(figure.value)}" for key, figure in divergence.kl.items())
    return _svg(draw, name, "Distribution of KL over tokens", f"Histogram on a log scale. In nats: {summary}.")


def by_position(rows: Sequence[ContextBucket], name: str) -> str:
    """Mean KL and what perplexity grows by, by position."""

    def draw(axes: Axes) -> None:
        places = np.arange(len(rows))
        axes.bar(places, [row.kl for row in rows], width=0.7, color=_ACCENT)
        axes.set_xticks(places, [f"{row.start}–{row.stop - 1}" for row in rows], rotation=30 if len(rows) > 6 else 0)
        axes.set_xlabel("position in the window")
        axes.set_ylabel("mean KL, nats")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))

    summary = "; ".join(f"positions {row.start} to {row.stop - 1}: {number(row.kl)}" for row in rows)
    return _svg(draw, name, "Mean KL by position", summary)


def layers(rows: Sequence[LayerRow], name: str) -> str:
    """Accumulated error of the hidden state, layer by layer."""

    def draw(axes: Axes) -> None:
        points = [(row.layer, row.hidden_error) for row in rows if row.hidden_error is not None]
        axes.plot(*zip(*points, strict=True), color=_ACCENT, marker="o", markersize=4, linewidth=1.6)
        if all(error > 0 for _, error in points):
            _log_scale(axes)
        axes.set_xlabel("after layer")
        axes.set_ylabel("error of hidden state")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    summary = "; ".join(f"layer {row.layer}: {number(row.hidden_error)}" for row in rows)
    return _svg(draw, name, "Error of the hidden state after each layer, share of its energy", summary)


def _heat(values: np.ndarray, rows: Sequence[int], label: str, mark: tuple[int, int] | None) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        logs = np.log10(np.maximum(values, 1e-6))
        mesh = axes.pcolormesh(
            logs, cmap="cividis", edgecolors="none", linewidth=0, rasterized=values.size > _VECTOR_CELLS, antialiased=False
        )
        axes.set_ylim(len(rows), 0)
        step = max(1, len(rows) // 12)
        axes.set_yticks(np.arange(0, len(rows), step) + 0.5, [str(row) for row in rows[::step]])
        width = values.shape[1]
        across = max(1, width // 8)
        axes.set_xticks(np.arange(0, width, across) + 0.5, [str(i) for i in range(0, width, across)])
        axes.tick_params(length=0)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.spines[:].set_visible(False)
        if mark:
            axes.add_patch(Rectangle((mark[1], mark[0]), 1, 1, fill=False, edgecolor=_BAD, linewidth=2.5, clip_on=False))
        bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, aspect=18)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(nbins=4)
        bar.formatter = lambda x, _: f"{10**x:.2g}"  # type: ignore[assignment]
        bar.set_label(label)
        bar.update_ticks()

    return draw


def _matrix(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    width = max(len(row) for row in rows)
    return np.array([[np.nan if x is None else x for x in row] + [np.nan] * (width - len(row)) for row in rows], dtype=float)


def coverage(rows: Sequence[MoeLayer], name: str) -> str:
    """Calibration tokens of each expert over its in_features."""
    values = _matrix([row.coverage for row in rows])
    draw = _heat(values, [row.layer for row in rows], "tokens / in_features", None)
    low, high = (number(float(bound)) for bound in (np.nanmin(values), np.nanmax(values)))
    summary = f"From {low} to {high} calibration tokens for each input feature."
    return _svg(draw, name, "Calibration tokens over in_features, by layer and expert", summary, _height(rows))


def output_errors(rows: Sequence[MoeLayer], name: str) -> str:
    """Output error of each expert on what its baseline reads; the worst is framed."""
    values = _matrix([[None if f is None else f.value for f in row.output_error] for row in rows])
    at = np.unravel_index(int(np.nanargmax(values)), values.shape)
    worst = (int(at[0]), int(at[1]))
    draw = _heat(values, [row.layer for row in rows], "output error", worst)
    usual = f"the median is {number(float(np.nanmedian(values)))}"
    summary = f"The largest is {number(float(values[worst]))}, layer {rows[worst[0]].layer}, expert {worst[1]}; {usual}."
    return _svg(draw, name, "Output error by layer and expert, share of energy", summary, _height(rows))


def _height(rows: Sequence[MoeLayer]) -> float:
    return min(7.0, max(2.2, 0.22 * len(rows) + 1.0))


def allocation(chosen: Allocation, measured: float | None, name: str) -> str:
    """The curve of predicted KL against size, what was chosen on it, and the KL measured of that."""

    def draw(axes: Axes) -> None:
        axes.plot(
            [point.output_bytes for point in chosen.curve],
            [point.predicted_kl for point in chosen.curve],
            color=_SECOND,
            marker="o",
            markersize=3,
            linewidth=1.2,
        )
        axes.plot(chosen.output_bytes, chosen.predicted_kl, "o", color=_ACCENT, markersize=6, label="predicted")
        if measured:
            axes.plot(chosen.output_bytes, measured, "x", color=_INK, markersize=7, label="measured")
        axes.legend()
        if all(point.predicted_kl > 0 for point in (*chosen.curve, chosen)):
            _log_scale(axes)
        axes.xaxis.set_major_formatter(lambda x, _: size(x))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel("size of the checkpoint")
        axes.set_ylabel("mean KL, nats")

    summary = "; ".join(f"{size(point.output_bytes)}: {number(point.predicted_kl)} nats" for point in chosen.curve)
    return _svg(draw, name, "Predicted KL against size", f"{summary}. Chosen: {size(chosen.output_bytes)}.", 3.0)


def pareto(runs: Sequence[Run], name: str = "pareto") -> str:
    """Mean KL against size; the runs that no other beats in both are joined."""
    points = []
    for run in runs:
        measured = metrics(run.report)
        if "kl.mean" in measured and measured["kl.mean"].figure.value > 0:
            points.append((measured["size.bytes"].figure.value, measured["kl.mean"].figure, run.name))
    points.sort(key=lambda p: (p[0], p[1].value))
    front = [p for i, p in enumerate(points) if all(p[1].value < q[1].value for q in points[:i])]

    def draw(axes: Axes) -> None:
        axes.plot([p[0] for p in front], [p[1].value for p in front], color=_SECOND, linewidth=1.2, zorder=1)
        for at, kl, label in points:
            if kl.low is not None and kl.high is not None:
                axes.plot([at, at], [kl.low, kl.high], color=_ACCENT, linewidth=1.2)
            axes.plot(at, kl.value, "o", color=_ACCENT, markersize=6)
            short = label if len(label) <= 24 else "…" + label[-23:]
            axes.annotate(short, (at, kl.value), (7, 5), textcoords="offset points", fontsize=9)
        _log_scale(axes)
        axes.margins(x=0.25, y=0.2)
        axes.xaxis.set_major_formatter(lambda x, _: size(x))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel("size of the checkpoint")
        axes.set_ylabel("mean KL, nats (log scale)")

    summary = "; ".join(f"{label}: {size(at)}, {number(kl.value)} nats" for at, kl, label in points)
    return _svg(draw, name, "Mean KL against size", summary, 3.2)
