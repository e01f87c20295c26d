"""Tables of benchmark tasks, for people: one of what was asked for, one in the layout of a model card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from quantkit.evals.suite import SUITES, Benchmark

__all__ = ["suite_table", "task_table", "with_tasks"]

Result = dict[str, Any]


def with_tasks(table: Callable[[Result], RenderableType]) -> Callable[[Result], RenderableType]:
    """A result's table, and below it that of its tasks if it has any."""

    def both(result: Result) -> RenderableType:
        if "tasks" not in result:
            return table(result)
        return Group(table(result), suite_table(result) if result["task_run"]["suite"] else task_table(result))

    return both


def task_table(result: Result) -> Table:
    table = Table("task", "shots", "metric", "n", "baseline", "quantized", "recovery", title="tasks")
    table.add_column("95 % interval", justify="right")
    table.add_column("lost, gained", justify="right")
    table.add_column("p", justify="right")
    shots = {row["name"]: row["shots"] for row in result["task_run"]["benchmarks"]}
    for row in result["tasks"]:
        table.add_row(row["name"], str(shots[row["name"]]), row["metric"], str(row["n"]), *_figures(row))
    table.caption = _caption(result["task_run"])
    return table


def suite_table(result: Result) -> Table:
    """The card's rows in the card's order: its own scores, then what was measured, or why it was not."""
    run = result["task_run"]
    table = Table("benchmark", "shots", title=f"{run['suite']}, as its model card has it")
    names = (
        "card, pretrained",
        "card, instruct",
        "n",
        "baseline",
        "quantized",
        "recovery",
        "95 % interval",
        "lost, gained",
        "p",
    )
    for name in names:
        table.add_column(name, justify="right")
    measured = {row["name"]: row for row in result["tasks"]}
    why = {row["name"]: row["why"] for row in run["left_out"]}
    for row in SUITES[run["suite"]]:
        cells = [row.title, str(row.shots), *_published(row)]
        if row.name in measured:
            table.add_row(*cells, str(measured[row.name]["n"]), *_figures(measured[row.name]))
        else:
            table.add_row(*cells, "-", why[row.name])
    table.caption = _caption(run)
    return table


def _published(row: Benchmark) -> list[str]:
    return ["-" if score is None else f"{score:.1f}" for score in (row.pretrained, row.instruct)]


def _figures(row: Result) -> list[str]:
    low, high = row["ci95"] or (None, None)
    return [
        f"{row['baseline']:.1%}",
        f"{row['quantized']:.1%}",
        "-" if row["recovery"] is None else f"{row['recovery']:.1%}",
        "-" if low is None else f"{low:.1%} .. {high:.1%}",
        f"{row['right_to_wrong']}, {row['wrong_to_right']}",
        f"{row['mcnemar_p']:.3f}",
    ]


def _caption(run: Result) -> str:
    cut = run["truncated"]
    parts = [f"lm-evaluation-harness {run['harness']}", f"truncated texts: {cut['baseline']} and {cut['quantized']}"]
    parts += [f"at most {run['limit']} items"] if run["limit"] else []
    parts += [f"at most {run['max_new_tokens']} new tokens"] if run["max_new_tokens"] else []
    parts += [f"answers in {run['items']}"] if run["items"] else []
    return "; ".join(parts)
