"""`quantkit eval` and `quantkit report`: measure, judge by gates, and write what was found."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from quantkit.choices import KVFormat
from quantkit.commands.command import as_json, command, show
from quantkit.commands.options import bos_option, read_tasks, task_options
from quantkit.errors import shown

if TYPE_CHECKING:
    from quantkit.measure.evaluate import Extent
    from quantkit.measure.run import Evaluation
    from quantkit.report.gates import Gate
    from quantkit.report.schema import Report
    from quantkit.tasks.tasks import Plan

__all__ = ["evaluate", "evaluate_and_write", "held_out_text", "report", "say_verdict"]

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER = click.Path(path_type=Path, file_okay=False)
ROUNDED = [kind.value for kind in KVFormat if kind is not KVFormat.FLOAT32]


def gate_options(function: F) -> F:
    """--gate, --gates and --junit."""
    for option in (
        click.option("--junit", type=FILE, metavar="FILE", help="Write the gates as JUnit XML."),
        click.option("--gates", "gates_file", type=FILE, metavar="FILE", help="A YAML list of gates."),
        click.option("--gate", "gates", multiple=True, metavar="GATE", help="Such as 'kl.mean<0.02'. [default: see docs]"),
    ):
        function = option(function)
    return function


def chosen(gates: tuple[str, ...], file: Path | None) -> list[Gate] | None:
    """The gates asked for; None for the default ones."""
    from quantkit.report.gates import parse_gate, read_gates

    selected = [*(read_gates(file) if file else []), *map(parse_gate, gates)]
    return selected or None


@click.command("eval")
@click.argument("quantized", type=PATH)
@click.option("--baseline", required=True, type=PATH, help="The model it was made from.")
@click.option("--text", default="stdlib-held-out", show_default=True, metavar="FILE|NAME", help="As for --calibration.")
@click.option("--seq-len", default=512, show_default=True, type=click.IntRange(min=2), help="Tokens in a window.")
@click.option("--windows", default=64, show_default=True, type=click.IntRange(min=1), help="At most so many windows.")
@click.option("--cache", type=FOLDER, metavar="FOLDER", help="Keep the baseline's results here, for other candidates.")
@click.option(
    "--kv-cache",
    type=click.Choice([kind.value for kind in KVFormat if kind is not KVFormat.FLOAT32]),
    help="The quantized model keeps K and V so.",
)
@click.option(
    "--context", default=0, type=click.IntRange(min=0), help="Also windows of so many tokens, and needles in them."
)
@click.option("--samples", default=3, show_default=True, type=click.IntRange(min=0), help="Prompts that both continue.")
@bos_option
@click.option("--speed", is_flag=True, help="Also time this machine's kernels on the model's matrices.")
@click.option("--save", type=FOLDER, metavar="FOLDER", help="Where reports go. [default: QUANTIZED/eval]")
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
    passes, 1 when one fails, 3 when this much text cannot decide one; without, it is 1 where logits are not finite.

    \b
    quantkit eval OUT --baseline MODEL --text held_out.jsonl
    quantkit eval OUT --baseline MODEL --tasks gsm8k,piqa --limit 200
    quantkit eval OUT --baseline MODEL --suite hunyuan-large --data-dir ITEMS
    """
    from quantkit.commands.tables import eval_table
    from quantkit.commands.task_tables import with_tasks
    from quantkit.errors import ConfigError
    from quantkit.host import pick_device
    from quantkit.measure.evaluate import Extent, figures
    from quantkit.report.gates import EXIT_CODES

    chosen_gates = chosen(gates, gates_file)
    kv = measured.pop("kv_cache")
    plan = read_tasks(measured, items, str(pick_device(device)), kv)
    extent = Extent(kv_cache=KVFormat(kv) if kv else None, **measured)
    if 0 < extent.context < 64:  # positions are compared in buckets, the first of which are shorter than that
        raise ConfigError(f"--context {extent.context} is no long window", "give 64 or more, or 0 for none")
    report = evaluate_and_write(quantized, baseline, text, device, extent, save, chosen_gates, junit, plan, items)
    parts = {"verdict", "finite", *(("tasks", "task_run") if report.task_run else ())}
    data = report.model_dump(include=parts, mode="json")
    if report.divergence is not None:
        show({**figures(report), **data}, with_tasks(eval_table), as_json)
    elif as_json:  # nothing is finite: there are no figures, and no table of them
        click.echo(json.dumps(data, indent=2))
    judged = chosen_gates is not None or junit is not None
    if judged or report.verdict.status != "pass":
        say_verdict(report)
    if judged or report.finite.tokens:
        sys.exit(EXIT_CODES[report.verdict.status])


def say_verdict(report: Report) -> None:
    from quantkit.commands.tables import console

    status = report.verdict
    console(stderr=True).print(f"{status.status.upper()}: " + "\n".join(status.reasons), soft_wrap=True)


@dataclass(frozen=True)
class Riding:
    """Held-out text that passes through the layers while they are quantized."""

    extent: Extent
    evaluation: Evaluation


def held_out_text(text: str, model: str, add_bos: bool | None = None) -> Riding:
    """What `quantize --held-out` measures: the default, in windows that the model can read. Raises QuantkitError for a text
    that cannot be evaluated: before hours of other work."""
    from quantkit.checkpoint.folder import find_model
    from quantkit.checkpoint.reader import load_json
    from quantkit.extras import need
    from quantkit.measure.evaluate import Extent, evaluation_of, read_text
    from quantkit.model.registry import build_spec

    need("report", "--held-out, which writes a page with plots,")
    folder = find_model(model)
    config, extent = load_json(folder / "config.json"), Extent(add_bos=add_bos)
    limit = config.get("max_position_embeddings")
    if isinstance(limit, int):
        extent = replace(extent, seq_len=min(extent.seq_len, limit))
    data = read_text(folder, config, text, extent).data
    return Riding(extent, evaluation_of(build_spec(config, str(folder / "config.json")), data, folder))


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
    ran: Evaluation | None = None,
) -> Report:
    """Measure, with progress on standard error, judge, and write the three reports (and JUnit XML).

    ran: what looked at the text already, while the model was quantized. plan: benchmark tasks; both answers to each item go
    to `items`, or into the folder of the reports. What can be refused is refused before the work; a gate that cannot be
    decided after it, when the report is written.
    """
    from quantkit.commands.tables import console
    from quantkit.host import pick_device
    from quantkit.measure.evaluate import Extent, measure
    from quantkit.report import report as reports
    from quantkit.report.gate_names import check, expected

    extent, folder, place = extent or Extent(), save or quantized / reports.FOLDER, str(pick_device(device))
    tasks = [one.name for one in plan.chosen] if plan else []
    reports.check_page(folder / reports.PAGE)
    check(gates or [], expected(extent.kv_cache is not None, extent.context > 0, tasks))
    if quantized.is_dir():
        _make_room(folder, extent.cache, items, junit)
    screen = console(stderr=True)
    with screen.status("preparing") as status, _prepared(plan, baseline) as manager:
        report = measure(
            quantized,
            baseline,
            text,
            extent,
            device=place,
            command=_command(quantized, baseline, text, extent, place, plan),
            progress=lambda done, total: status.update(f"evaluating, {done} of {total} layers"),
            warn=lambda line: screen.print(f"warning: {line}", soft_wrap=True),
            ran=ran,
        )
        if plan and report.divergence is not None:
            answers = items or folder / reports.ITEMS
            report = _with_tasks(report, quantized, baseline, plan, manager, answers, status.update)
    return _judged(report, str(quantized), gates, folder / reports.PAGE, junit)


def _make_room(folder: Path, cache: Path | None, *files: Path | None) -> None:
    """A disk that cannot be written is said before the work, not after; and what an earlier evaluation left is put away."""
    from quantkit.report.report import make_folders, set_aside

    outputs = [file for file in files if file]
    make_folders(*([cache] if cache else []), *(file.parent for file in outputs))
    set_aside(folder)
    for file in outputs:
        file.unlink(missing_ok=True)


def _prepared(plan: Plan | None, baseline: str | Path) -> AbstractContextManager[Any]:
    if plan is None:
        return nullcontext()
    from quantkit.tasks.tasks import prepared

    return prepared(plan, baseline)


def _judged(measured: Report, name: str, gates: list[Gate] | None, page: Path, junit: Path | None) -> Report:
    """Decide the gates and write everything. A gate that cannot be decided costs the verdict, not what was measured."""
    from quantkit.commands.tables import console
    from quantkit.errors import ConfigError
    from quantkit.report import report as reports
    from quantkit.report.gates import decide
    from quantkit.report.schema import Run

    try:
        report, refused = decide(measured, gates), None
    except ConfigError as error:
        report, refused = measured, error
    runs = [Run(name=name, report=report)]
    reports.write(runs, page)
    if junit and refused is None:
        reports.write_junit(runs, junit)
    console(stderr=True).print(f"report: {page}", soft_wrap=True)
    if refused is not None:
        raise refused
    return report


def _with_tasks(
    report: Report,
    quantized: Path,
    baseline: str | Path,
    plan: Plan,
    manager: Any,
    items: Path,
    progress: Callable[[str], None],
) -> Report:
    from quantkit.checkpoint.folder import find_model
    from quantkit.errors import NotFiniteError
    from quantkit.measure.evaluate import without_tasks
    from quantkit.report.schema import Task
    from quantkit.report.task_schema import TaskRun
    from quantkit.tasks.tasks import evaluate_tasks

    try:
        result = evaluate_tasks(quantized, baseline, plan, items=items, manager=manager, progress=progress)
    except NotFiniteError as error:
        if error.folder == find_model(str(baseline)):
            raise
        return without_tasks(report, error.problem)
    rows = [Task.model_validate(row) for row in result["tasks"]]
    return report.model_copy(update={"tasks": rows, "task_run": TaskRun.model_validate(result["task_run"])})


def _command(quantized: Path, baseline: str | Path, text: str, extent: Extent, device: str, plan: Plan | None) -> str:
    """The command that measures the same again."""
    words: list[object] = ["quantkit", "eval", quantized, "--baseline", baseline, "--text", text]
    words += ["--seq-len", extent.seq_len, "--windows", extent.windows, "--samples", extent.samples]
    words += ["--kv-cache", extent.kv_cache.value] if extent.kv_cache else []
    words += ["--context", extent.context] if extent.context else []
    words += ["--speed"] if extent.speed else []
    words += [] if extent.add_bos is None else ["--add-bos" if extent.add_bos else "--no-add-bos"]
    words += plan.words() if plan else []
    words += ["--device", device] if device != "cpu" else []
    return shlex.join(map(str, words))


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@click.option("-o", "--out", type=FILE, metavar="FILE.html", help="Write the page, and .json and .md beside it.")
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
    from quantkit.commands.tables import verdict_tables
    from quantkit.report import report as reports

    if out:
        reports.check_page(out)
        reports.refuse_foreign(*(out.with_suffix(suffix) for suffix in (".html", ".json", ".md")))
    reports.make_folders(*(file.parent for file in (out, junit) if file))
    judged = reports.assemble(runs, chosen(gates, gates_file), against)
    for line in reports.incomparable(judged):
        click.echo(f"warning: {shown(line, 1000)}", err=True)
    if out:
        reports.write(judged, out)
    if junit:
        reports.write_junit(judged, junit)
    data = {
        "runs": [
            {"run": run.name, **run.report.model_dump(include={"verdict", "gates", "changes"}, mode="json")}
            for run in judged
        ]
    }
    show(data, verdict_tables, as_json)
    sys.exit(reports.exit_code(judged))
