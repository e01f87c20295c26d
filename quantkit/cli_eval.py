"""`quantkit eval` and `quantkit report`: measure, judge by gates, and write what was found."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantkit.command import as_json, command, show
from quantkit.options import read_tasks, task_options

if TYPE_CHECKING:
    from quantkit.evals.evaluate import Extent
    from quantkit.evals.gates import Gate
    from quantkit.evals.schema import Report
    from quantkit.evals.tasks import Plan

__all__ = ["check_text", "evaluate", "evaluate_and_write", "report"]

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def gate_options(function: F) -> F:
    """--gate, --gates and --junit."""
    for option in (
        click.option("--junit", type=PATH, metavar="FILE", help="Write the gates as JUnit XML."),
        click.option("--gates", "gates_file", type=PATH, metavar="FILE", help="A YAML list of gates."),
        click.option("--gate", "gates", multiple=True, metavar="GATE", help="Such as 'kl.mean<0.02'. [default: see docs]"),
    ):
        function = option(function)
    return function


def chosen(gates: tuple[str, ...], file: Path | None) -> list[Gate] | None:
    """The gates asked for; None for the default ones."""
    from quantkit.evals.gates import parse_gate, read_gates

    found = [*(read_gates(file) if file else []), *map(parse_gate, gates)]
    return found or None


@click.command("eval")
@click.argument("quantized", type=PATH)
@click.option("--baseline", required=True, type=PATH, help="The model it was made from.")
@click.option("--text", default="stdlib-held-out", show_default=True, metavar="FILE|NAME", help="As for --calibration.")
@click.option("--seq-len", default=512, show_default=True, type=click.IntRange(min=2), help="Tokens in a window.")
@click.option("--windows", default=64, show_default=True, type=click.IntRange(min=1), help="At most so many windows.")
@click.option("--cache", type=PATH, metavar="FOLDER", help="Keep the baseline's results here, for other candidates.")
@click.option("--kv-cache", type=click.Choice(["bf16", "fp8"]), help="The quantised model keeps K and V so.")
@click.option(
    "--context", default=0, type=click.IntRange(min=0), help="Also windows of so many tokens, and needles in them."
)
@click.option("--samples", default=3, show_default=True, type=click.IntRange(min=0), help="Prompts that both continue.")
@click.option("--speed", is_flag=True, help="Also time this machine's kernels on the model's matrices.")
@click.option("--save", type=PATH, metavar="FOLDER", help="Where reports go. [default: QUANTIZED/eval]")
@task_options
@click.option("--device", default="cpu", show_default=True)
@gate_options
@as_json
@command
def evaluate(
    quantized: Path,
    baseline: Path,
    text: str,
    save: Path | None,
    items: Path | None,
    device: str,
    gates: tuple[str, ...],
    gates_file: Path | None,
    junit: Path | None,
    as_json: bool,
    **measured: Any,
) -> None:
    """Measure how far QUANTIZED has moved from its baseline on text that neither has seen.

    Writes report.html, report.json and report.md. With --gate, --gates or --junit the exit code is 0 when every gate
    passes, 1 when one fails, 3 when this much text cannot decide one.

    \b
    quantkit eval OUT --baseline MODEL --text held_out.jsonl
    quantkit eval OUT --baseline MODEL --tasks gsm8k,piqa --limit 200
    quantkit eval OUT --baseline MODEL --suite hunyuan-large --data-dir ITEMS
    """
    from quantkit.evals.evaluate import Extent, figures
    from quantkit.evals.gates import EXIT_CODES
    from quantkit.host import pick_device
    from quantkit.model.cache import KVFormat
    from quantkit.progress import console, eval_table
    from quantkit.task_tables import with_tasks

    wanted = chosen(gates, gates_file)
    kv = measured.pop("kv_cache")
    plan = read_tasks(measured, str(pick_device(device)), kv)
    extent = Extent(kv_cache=KVFormat(kv) if kv else None, **measured)
    found = evaluate_and_write(quantized, baseline, text, device, extent, save, wanted, junit, plan, items)
    if found.divergence is not None:
        tasks = found.model_dump(include={"tasks", "task_run"}, mode="json") if plan else {}
        show({**figures(found), **tasks}, with_tasks(eval_table), as_json)
    status, judged = found.verdict, wanted is not None or junit is not None
    if judged or status.status != "pass":
        console(stderr=True).print(f"{status.status.upper()}: " + "\n".join(status.reasons), soft_wrap=True)
    if judged or found.divergence is None:
        sys.exit(EXIT_CODES[status.status])


def check_text(text: str, model: str) -> None:
    """Raise QuantkitError for a text that an evaluation could not read: before hours of other work."""
    from quantkit.calib.tokens import documents
    from quantkit.formats.folder import find_model

    documents(text, find_model(model))


def evaluate_and_write(
    quantized: Path,
    baseline: str | Path,
    text: str,
    device: str,
    extent: Extent | None = None,
    save: Path | None = None,
    gates: list[Gate] | None = None,
    junit: Path | None = None,
    plan: Plan | None = None,
    items: Path | None = None,
) -> Report:
    """Measure, with progress on standard error, judge, and write the three reports (and JUnit XML).

    plan: benchmark tasks; both answers to each item go to `items`, or into the folder of the reports.
    """
    from quantkit.evals import report as reports
    from quantkit.evals.evaluate import Extent, measure
    from quantkit.evals.gates import decide
    from quantkit.evals.schema import Run
    from quantkit.formats.atomic import disk_errors
    from quantkit.host import pick_device
    from quantkit.progress import console

    extent, folder, place = extent or Extent(), save or quantized / reports.FOLDER, str(pick_device(device))
    if quantized.is_dir():  # a disk that cannot be written is said before the work, not after
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    screen = console(stderr=True)
    with screen.status("evaluating") as status:
        found = measure(
            quantized,
            baseline,
            text,
            extent,
            device=place,
            command=_command(quantized, baseline, text, extent, place, plan),
            progress=lambda done, total: status.update(f"evaluating, {done} of {total} windows"),
        )
        if plan and found.divergence is not None:
            found = _with_tasks(found, quantized, baseline, plan, items or folder / "items.jsonl", status.update)
    runs = [Run(name=str(quantized), report=decide(found, gates))]
    reports.write(runs, folder / "report.html")
    if junit:
        reports.write_junit(runs, junit)
    screen.print(f"report: {folder / 'report.html'}", soft_wrap=True)
    return runs[0].report


def _with_tasks(
    found: Report, quantized: Path, baseline: str | Path, plan: Plan, items: Path, progress: Callable[[str], None]
) -> Report:
    from quantkit.evals.schema import Task
    from quantkit.evals.task_schema import TaskRun
    from quantkit.evals.tasks import evaluate_tasks

    result = evaluate_tasks(quantized, baseline, plan, items=items, progress=progress)
    rows = [Task.model_validate(row) for row in result["tasks"]]
    return found.model_copy(update={"tasks": rows, "task_run": TaskRun.model_validate(result["task_run"])})


def _command(quantized: Path, baseline: str | Path, text: str, extent: Extent, device: str, plan: Plan | None) -> str:
    """The command that measures the same again."""
    words: list[object] = ["quantkit", "eval", quantized, "--baseline", baseline, "--text", text]
    words += ["--seq-len", extent.seq_len, "--windows", extent.windows]
    words += ["--kv-cache", extent.kv_cache.value] if extent.kv_cache else []
    words += ["--context", extent.context] if extent.context else []
    words += plan.words() if plan else []
    words += ["--device", device] if device != "cpu" else []
    return shlex.join(map(str, words))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("-o", "--out", type=PATH, metavar="FILE.html", help="Write the page, and .json and .md beside it.")
@click.option("--against", type=PATH, metavar="RUN", help="An earlier report of the same model on the same text.")
@gate_options
@as_json
@command
def report(
    runs: tuple[Path, ...],
    out: Path | None,
    against: Path | None,
    gates: tuple[str, ...],
    gates_file: Path | None,
    junit: Path | None,
    as_json: bool,
) -> None:
    """Judge evaluations by gates and write reports of them. RUN: a folder that `eval` wrote into, or a report.json.

    Exit code: 0 when every gate passes, 1 when one fails, 3 when the data cannot decide one, 2 for bad input.

    \b
    quantkit report OUT --gate 'kl.mean<0.02' --gate 'perplexity.ratio<=1.01' --junit gates.xml
    quantkit report OUT-INT4 OUT-FP8 -o report.html
    """
    from quantkit.evals import report as reports
    from quantkit.progress import verdict_tables

    found = reports.assemble(runs, chosen(gates, gates_file), against)
    if out:
        reports.write(found, out)
    if junit:
        reports.write_junit(found, junit)
    data = {
        "runs": [
            {"run": run.name, **run.report.model_dump(include={"verdict", "gates", "changes"}, mode="json")} for run in found
        ]
    }
    show(data, verdict_tables, as_json)
    sys.exit(reports.exit_code(found))
