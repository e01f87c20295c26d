"""The metrics that an evaluation can give, before it is made: a gate that names another is refused at once."""

from __future__ import annotations

from collections.abc import Sequence

from quantkit.errors import ConfigError
from quantkit.report.gates import EXTREME, Gate, meant, no_bound
from quantkit.report.names import METRICS, NEEDS, of_task

__all__ = ["check", "expected"]


def expected(kv_cache: bool, context: bool, tasks: Sequence[str]) -> set[str]:
    """Of an evaluation with --kv-cache, with --context, and of these benchmarks. Some only some models have (with experts,
    made by quantkit): that shows later."""
    groups = {"", *(["kv_cache"] if kv_cache else []), *(["context"] if context else [])}
    return {*(name for name, row in METRICS.items() if row.needs in groups), *map(of_task, tasks)}


def check(gates: Sequence[Gate], available: set[str]) -> None:
    """Raise ConfigError for a gate that no evaluation with these metrics can decide."""
    for gate in gates:
        group = gate.metric.partition(".")[0]
        if gate.metric == EXTREME:
            raise no_bound(gate)
        if group in NEEDS and not any(name.startswith(f"{group}.") for name in available):
            raise ConfigError(f"gate '{gate.text}': this run does not measure {gate.metric}", f"it needs {NEEDS[group]}")
        if gate.metric not in available:
            problem = f"gate '{gate.text}' names no metric that this run measures"
            raise ConfigError(
                problem, f"{meant(gate.metric, available)}it measures {', '.join(sorted(available - {EXTREME}))}"
            )
