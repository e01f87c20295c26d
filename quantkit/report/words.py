"""Numbers as people read them: units, percentages, intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkit.report.names import Unit, unit_of

if TYPE_CHECKING:
    from quantkit.report.schema import Figure, GateResult

__all__ = ["bounds", "interval", "number", "percent", "size", "value"]


def size(count: float) -> str:
    """Bytes for people: decimal units, as disks and hubs state them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def number(x: float | None) -> str:
    """Three significant digits; whole numbers as they are, unless too long to read; a dash for what was not measured."""
    if x is None:
        return "–"
    if x == int(x) and abs(x) < 1e15:
        return f"{int(x):,}"
    return f"{x:.4f}" if 1 <= abs(x) < 10 else f"{x:,.0f}" if 1000 <= abs(x) < 1e15 else f"{x:.3g}"


def percent(x: float | None) -> str:
    """Two digits after the point; from ten times on, as a multiple."""
    if x is None:
        return "–"
    return f"{number(x)} ×" if abs(x) >= 10 else f"{x:.2%}".replace("%", " %")


def value(metric: str, x: float | None) -> str:
    """A value of the named metric, with its unit."""
    if x is None:
        return "–"
    unit = unit_of(metric)
    if unit is Unit.BYTES:
        return size(x)
    if unit is Unit.SHARE:
        return percent(x)
    return f"{number(x)} nats" if unit is Unit.NATS else number(x)


def bounds(gate: GateResult) -> str:
    """The interval that a gate was decided on, `exact`, or `none`."""
    if gate.measured is None:
        return ""
    return "exact" if gate.exact else interval(gate.metric, gate.measured) or "none"


def interval(metric: str, figure: Figure | None) -> str:
    """`0.0174 to 0.019`, with a unit where `value` has one; empty without an interval."""
    if figure is None or figure.low is None or figure.high is None:
        return ""
    low, high = (value(metric, x).removesuffix(" nats") for x in (figure.low, figure.high))
    return f"{low} to {high}"
