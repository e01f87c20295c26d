"""Reports on disk: find and read those of runs, decide their gates, write report.json, report.md and report.html."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from quantkit.atomic import disk_errors, write_bytes
from quantkit.checkpoint.contents import contents
from quantkit.errors import ConfigError, OutputError
from quantkit.extras import need
from quantkit.report.compare import against, differences
from quantkit.report.gates import EXIT_CODES, Gate, decide, junit
from quantkit.report.markdown import markdown
from quantkit.report.schema import SCHEMA_VERSION, Comparison, Report, Run

__all__ = [
    *("FOLDER", "ITEMS", "PAGE", "assemble", "check_page", "exit_code", "find_report", "incomparable", "make_folders"),
    *("read_report", "refuse_foreign", "set_aside", "write", "write_junit"),
]

FOLDER = "eval"  # of a checkpoint's folder, where its evaluation lies
NAME, PAGE, SUMMARY = "report.json", "report.html", "report.md"
PREVIOUS = "report.previous.json"
ITEMS = "items.jsonl"  # both answers to every item of a benchmark


def find_report(run: Path) -> Path:
    """The report.json of a RUN: a checkpoint's folder, a folder of reports, or the file itself. Raises ConfigError."""
    for path in (run / FOLDER / NAME, run / NAME, run):
        if path.is_file():
            return path
    raise ConfigError(f"{run} holds no evaluation", f"run 'quantkit eval {run} --baseline MODEL', or give a report.json")


def refuse_foreign(*files: Path) -> None:
    """Raise OutputError for a file that is there and was not written by an evaluation: it is somebody's own."""
    for path in files:
        if os.path.lexists(path) and not _ours(path):
            raise OutputError(
                f"{path} is there and no evaluation of quantkit has written it", "move it, or choose another place"
            )


def _ours(path: Path) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    with open(path, "rb") as file:
        begin = file.read(2048)
    if path.suffix == ".html":
        return b'<meta name="generator" content="quantkit">' in begin
    if path.suffix == ".md":
        return begin.startswith((b"# PASS: ", b"# FAIL: ", b"# UNDECIDED: ", b"# quantkit: comparison"))
    try:
        data = json.loads(path.read_bytes() if path.suffix == ".json" else begin.partition(b"\n")[0] or b"{}")
    except (ValueError, RecursionError):
        return path.suffix == ".jsonl" and begin.startswith(b'{"name": ') and b'"item": ' in begin  # a line beyond 2 KiB
    keys = {"schema_version", "runs"} if path.suffix == ".json" else {"item", "baseline", "quantized"}
    return isinstance(data, dict) and bool(keys & data.keys())


def set_aside(folder: Path) -> None:
    """Make room for a new evaluation: what fails on the way must leave nothing that looks finished. An older report.json
    becomes report.previous.json; the pages and answers that belong to it go. Raises OutputError where a file of one of these
    names is not of an evaluation."""
    refuse_foreign(*(folder / name for name in (NAME, PREVIOUS, PAGE, SUMMARY, ITEMS)))
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / NAME).is_file():
            (folder / NAME).replace(folder / PREVIOUS)
        for name in (PAGE, SUMMARY, ITEMS):
            (folder / name).unlink(missing_ok=True)


def _of_run(run: Path) -> Report:
    """A RUN's report. Raises ConfigError where the checkpoint that it lies in is no longer what was evaluated."""
    path = find_report(run)
    report = read_report(path)
    if path == run / FOLDER / NAME and (run / "config.json").is_file():
        now, then = contents(run).digest, report.provenance.quantized_digest
        if now != then:
            problem = f"{path} was measured on other contents of {run}: {then} then, {now} now"
            raise ConfigError(problem, f"evaluate it again: quantkit eval {run} --baseline {report.provenance.baseline}")
    return report


def incomparable(runs: Sequence[Run]) -> list[str]:
    """What speaks against reading several runs side by side, a line for each run that is unlike the first."""
    lines = []
    for run in runs[1:]:
        if differing := differences(runs[0].report, run.report):
            what = "; ".join(f"{name} {ours} and {theirs}" for name, ours, theirs in differing)
            lines.append(f"{runs[0].name} and {run.name} cannot be compared: {what}")
    return lines


def read_report(path: Path) -> Report:
    """Read a report.json. Raises ConfigError when it is none, or of another schema version."""
    fix = "run 'quantkit eval' again"
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}", fix) from error
    if not isinstance(data, dict) or "divergence" not in data or "schema_version" not in data:
        raise ConfigError(f"{path} is no report.json of one model", fix)
    if data["schema_version"] != SCHEMA_VERSION:
        problem = f"{path} is of schema version {data['schema_version']!r}; this quantkit reads version {SCHEMA_VERSION}"
        raise ConfigError(problem, fix)
    try:
        return Report.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: '{name}': {first['msg']}", fix) from error


def assemble(paths: Sequence[Path], gates: Sequence[Gate] | None, previous: Path | None) -> list[Run]:
    """Each run's report, compared with `previous` if given, with the gates decided anew (None: the default ones)."""
    old = _of_run(previous) if previous else None
    runs = []
    for path in paths:
        report = _of_run(path)
        if old is not None:
            report = against(report, old, str(previous))
        runs.append(Run(name=str(path), report=decide(report, gates)))
    return runs


def exit_code(runs: Sequence[Run]) -> int:
    """0 when all pass, 1 when one fails, else 3."""
    statuses = {run.report.verdict.status for run in runs}
    return EXIT_CODES["fail" if "fail" in statuses else "undecided" if "undecided" in statuses else "pass"]


def make_folders(*folders: Path) -> None:
    for folder in folders:
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)


def check_page(out: Path) -> None:
    """Raises ConfigError for a name that is no page's, and where what draws pages is not installed."""
    if out.suffix != ".html":
        raise ConfigError(f"-o {out} does not end in .html", "give the page's name; .json and .md are written beside it")
    need("report", f"{out}, a page with plots,")


def write(runs: Sequence[Run], out: Path) -> None:
    """OUT.html, and OUT.json and OUT.md beside it. Raises OutputError, and ConfigError as `check_page` does."""
    check_page(out)
    from quantkit.report.html import html  # half a second, and an extra

    make_folders(out.parent)
    data = runs[0].report if len(runs) == 1 else Comparison(runs=list(runs))
    write_bytes(out.with_suffix(".json"), data.model_dump_json(indent=1).encode() + b"\n")
    write_bytes(out.with_suffix(".md"), markdown(runs).encode())
    write_bytes(out, html(runs).encode())


def write_junit(runs: Sequence[Run], path: Path) -> None:
    make_folders(path.parent)
    write_bytes(path, junit([(run.name, run.report) for run in runs]))
