"""Tables of benchmark tasks, for people: one of what was asked for, one in the layout of a model card."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from quantkit.tasks.suite import SUITES, Benchmark

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
    table = _table(("task", "shots", "metric"), title="tasks")
    shots = {row["name"]: row["shots"] for row in result["task_run"]["benchmarks"]}
    for row in result["tasks"]:
        table.add_row(row["name"], str(shots[row["name"]]), row["metric"], str(row["n"]), *_figures(row))
    table.caption = _caption(result["task_run"])
    return table


def _table(first: tuple[str, ...], title: str) -> Table:
    """Narrow enough for a terminal of 80 to 100 columns."""
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in (*first, "n", "base", "quant", "recovery", "95 % interval", "-/+", "p"):
        table.add_column(name, justify="left" if name in ("task", "metric", "benchmark") else "right")
    return table


def suite_table(result: Result) -> Table:
    """The card's rows in the card's order: its own scores, then what was measured, or why it was not."""
    run = result["task_run"]
    published = any(score is not None for row in SUITES[run["suite"]] for score in (row.pretrained, row.instruct))
    title = f"{run['suite']}, as its model card has it" if published else run["suite"]
    table = _table(("benchmark", "shots", "card", "instruct"), title=title)
    measured = {row["name"]: row for row in result["tasks"]}
    shots = {row["name"]: row["shots"] for row in run["benchmarks"]}
    left_out: list[str] = []
    why = {row["name"]: row["why"] for row in run["left_out"]}
    for row in SUITES[run["suite"]]:
        cells = [row.title, str(shots.get(row.name, row.shots)), *_published(row)]
        if row.name in measured:
            table.add_row(*cells, str(measured[row.name]["n"]), *_figures(measured[row.name]))
        else:
            left_out.append(f"{row.title}: {why[row.name]}")
            table.add_row(*cells, "-")
    table.caption = "\n".join([_caption(run), *left_out])
    return table


def _published(row: Benchmark) -> list[str]:
    return ["-" if score is None else f"{score:.1f}" for score in (row.pretrained, row.instruct)]


def _figures(row: Result) -> list[str]:
    low, high = row["ci95"] or (None, None)
    return [
        f"{row['baseline']:.1%}",
        f"{row['quantized']:.1%}",
        "-" if row["recovery"] is None else f"{row['recovery']:.1%}",
        "-" if low is None else f"{low:.1%}..{high:.1%}",
        f"{row['right_to_wrong']}/{row['wrong_to_right']}",
        f"{row['mcnemar_p']:.3f}",
    ]


def _caption(run: Result) -> str:
    cut = run["truncated"]
    parts = ["-/+: items lost and gained", f"lm-evaluation-harness {run['harness']}"]
    parts += [f"truncated texts: {cut['baseline']} and {cut['quantized']}"]
    parts += [f"at most {run['limit']} items"] if run["limit"] else []
    parts += [f"at most {run['max_new_tokens']} new tokens"] if run["max_new_tokens"] else []
    parts += [f"answers in {run['items']}"] if run["items"] else []
    return "; ".join(parts)
