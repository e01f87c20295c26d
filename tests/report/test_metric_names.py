"""What is known of a metric by its name is known in one table, which names every metric that there is."""

from __future__ import annotations

import re

import pytest

from quantkit.report.gate_names import expected
from quantkit.report.gates import DEFAULT_GATES, EXTREME, parse_gate
from quantkit.report.intervals import QUANTILES
from quantkit.report.metrics import metrics
from quantkit.report.names import METRICS, NEEDS, Unit, of_task, unit_of
from tests.helpers.paths import ROOT
from tests.helpers.reports import made


def test_every_metric_has_its_row() -> None:
    assert expected(True, True, ["piqa"]) == {*METRICS, "tasks.piqa.recovery"}
    assert expected(False, False, []) == {name for name, row in METRICS.items() if not row.needs}
    assert {f"kl.{name}" for name in QUANTILES} | {parse_gate(text).metric for text in DEFAULT_GATES} <= METRICS.keys()
    assert EXTREME in METRICS and metrics(made()).keys() <= METRICS.keys()
    assert {row.needs for row in METRICS.values()} <= {"", *NEEDS} and all(
        row.worse or not row.paired for row in METRICS.values()
    )


def test_units() -> None:
    of = {unit: {name for name in METRICS if unit_of(name) is unit} for unit in Unit}
    assert of[Unit.BYTES] == {"size.bytes"} and of[Unit.NATS] >= {"kl.mean", "kv_cache.added_kl"}
    assert (
        unit_of("change.kl.mean") is Unit.NATS
        and unit_of(of_task("piqa")) is unit_of("change.tasks.a.b.recovery") is Unit.SHARE
    )
    with pytest.raises(KeyError):
        unit_of("kl.meen")


def test_no_other_file_lists_them() -> None:
    """A module that names many metrics keeps a list of its own, which the next one will be missing from. Those that say what
    each is: where they are measured."""
    measured = {"report/names.py", "report/metrics.py", "commands/tables.py", "measure/evaluate.py", "measure/divergence.py"}
    for path in sorted((ROOT / "quantkit").rglob("*.py")):
        named = {name for name in METRICS if re.search(rf'"{re.escape(name)}"', path.read_text())}
        assert len(named) <= 5 or str(path.relative_to(ROOT / "quantkit")) in measured, f"{path} lists {sorted(named)}"


def test_they_are_documented() -> None:
    said = (ROOT / "docs" / "report.md").read_text()
    missing = [name for name in METRICS if not re.search(rf"\b{re.escape(name.partition('.')[2] or name)}\b", said)]
    assert not missing, f"docs/report.md does not name {missing}"
