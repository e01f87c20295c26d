"""What a benchmark needs beside a model (a consent, a library, a network, a file of items), and the refusal where it is not
there: before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.errors import ConfigError
from quantkit.tasks.needles import lacking
from quantkit.tasks.suite import Benchmark
from quantkit.tasks.task_data import local_files

if TYPE_CHECKING:
    from quantkit.tasks.tasks import Options

__all__ = ["FILES", "check_code", "check_may_run", "left_out_because"]

FILES = Path(__file__).parent / "task_files"
_PUNKT = "nltk's data punkt_tab, which is not on this machine"


def left_out_because(row: Benchmark, options: Options) -> str:
    """Why a row of a suite is not run here; empty where it is."""
    if row.task is None:
        return "needs a judge model"
    if row.needs == "code" and not options.unsafe_code:
        return "runs generated code: --unsafe-code"
    if options.data_dir and row.needs == "punkt" and not _has_punkt():
        return f"needs {_PUNKT}"
    if missing := lacking(row.needs, options.data_dir is not None):
        return missing[0]
    if options.data_dir and row.needs != "words" and not local_files(options.data_dir, row.name):
        return "no file in --data-dir"
    return ""


def check_may_run(name: str, row: Benchmark | None, options: Options) -> None:
    """Raises ConfigError where a task that was named, a row of a suite or none, lacks what it needs."""
    if row and row.task is None:
        raise ConfigError(f"task '{name}' needs a judge model, and quantkit has none", "leave it out")
    if row and row.needs == "code":
        _needs_flag(name, options)
    if row and row.needs == "punkt" and options.data_dir and not _has_punkt():
        raise ConfigError(f"task '{name}' needs {_PUNKT}", "python -m nltk.downloader punkt_tab, where there is a network")
    if row and (missing := lacking(row.needs, options.data_dir is not None)):
        raise ConfigError(f"task '{name}' {missing[0]}", missing[1])


def _has_punkt() -> bool:
    """Whether nltk's sentence splitter is on this machine. With a network the harness fetches it on its own."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True


def _needs_flag(name: str, options: Options) -> None:
    if not options.unsafe_code:
        raise ConfigError(
            f"task '{name}' runs code that the model wrote, with your rights",
            "leave it out, or add --unsafe-code in a container that holds nothing of value",
        )


def check_code(name: str, running: Sequence[Path], options: Options) -> None:
    """running: the descriptions of a task's members that run code. The harness's own leave that to `code_eval` of Hugging
    Face's evaluate, which asks as well. Raises ConfigError where nobody has consented."""
    if running:
        _needs_flag(name, options)
    if os.environ.get("HF_ALLOW_CODE_EVAL") != "1" and any(path.parent != FILES for path in running):
        raise ConfigError(
            f"task '{name}' has its code run by Hugging Face's code_eval, which wants a consent of its own",
            "set HF_ALLOW_CODE_EVAL=1, in a container that holds nothing of value",
        )
