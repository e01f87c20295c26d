"""Every metric of a report in one row: what it is counted in, what it takes to be measured, which way is worse. What gates,
comparisons, tables and pages know of a name they know from here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["METRICS", "NEEDS", "Row", "Unit", "of_task", "unit_of"]


class Unit(Enum):
    NATS = "nats"
    SHARE = "share"
    BYTES = "bytes"
    NUMBER = "number"


@dataclass(frozen=True)
class Row:
    """needs: its group (of NEEDS), where only some evaluations measure it. probe: measured on the probe's tokens alone.
    worse: 1 where more of it is worse, -1 where less is, 0 where reports are not compared by it. paired: compared over the
    documents that both scored. summary: shown where few figures stand for the whole."""

    name: str
    unit: Unit = Unit.NUMBER
    needs: str = ""
    probe: bool = False
    worse: int = 0
    paired: bool = False
    summary: bool = False


# What measures the metrics of a group.
NEEDS = {
    "context": "quantkit eval --context N",
    "kv_cache": "quantkit eval --kv-cache fp8",
    "tasks": "quantkit eval --tasks NAME or --suite NAME",
    "change": "quantkit report --against PREVIOUS",
}
_ROWS = (
    Row("kl.mean", Unit.NATS, worse=1, paired=True, summary=True),
    Row("kl.median", Unit.NATS, summary=True),
    Row("kl.p90", Unit.NATS),
    Row("kl.p99", Unit.NATS, worse=1, summary=True),
    Row("kl.p999", Unit.NATS, worse=1, summary=True),
    Row("kl.max", Unit.NATS, summary=True),
    Row("kl.floor", Unit.NATS, probe=True, summary=True),
    Row("kl.excess", Unit.NATS, probe=True, summary=True),
    Row("kl.forced_routing", Unit.NATS, probe=True),
    Row("kl.routing_term", Unit.NATS, probe=True),
    Row("perplexity.baseline", summary=True),
    Row("perplexity.quantized", summary=True),
    Row("perplexity.ratio", worse=1, paired=True, summary=True),
    Row("top1_agreement", Unit.SHARE, worse=-1, paired=True, summary=True),
    Row("router_agreement", Unit.SHARE, worse=-1, paired=True, summary=True),
    Row("flips.right_to_wrong", Unit.SHARE),
    Row("flips.wrong_to_right", Unit.SHARE),
    Row("mlp.output_error.max", worse=1, summary=True),
    Row("weights.error.max", worse=1, summary=True),
    Row("not_finite.tokens"),
    Row("fallbacks.count"),
    Row("fallbacks.share", Unit.SHARE),
    Row("coverage.min"),
    Row("coverage.thin_experts"),
    Row("size.bytes", Unit.BYTES, worse=1),
    Row("size.bits_per_weight"),
    Row("size.reduction"),
    Row("context.perplexity_ratio", needs="context", worse=1, summary=True),
    Row("context.needle_recall", Unit.SHARE, needs="context", worse=-1, summary=True),
    Row("kv_cache.added_kl", Unit.NATS, needs="kv_cache", probe=True, worse=1, summary=True),
)
METRICS: dict[str, Row] = {row.name: row for row in _ROWS}


def of_task(name: str) -> str:
    """The metric of a benchmark; recovery is the only one that gates and comparisons take."""
    return f"tasks.{name}.recovery"


def unit_of(metric: str) -> Unit:
    """Of a metric of METRICS, of a benchmark's, or of the change of one. Raises KeyError for another name."""
    name = metric.removeprefix("change.")
    return Unit.SHARE if name.startswith("tasks.") else METRICS[name].unit
