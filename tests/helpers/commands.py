"""The command line in this process: what it says, and with which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from quantkit.cli import main

QUICK = ("--method", "rtn", "--group-size", "32")


def refused(*arguments: object) -> str:
    """Run a command that must refuse: the message."""
    result = CliRunner().invoke(main, [*map(str, arguments)])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert lines[0].startswith("error: ") and lines[-1].startswith("Fix: "), result.stderr
    assert sum(line.startswith(("error: ", "Fix: ")) for line in lines) == 2 and "Traceback" not in result.stderr
    assert result.stdout == ""
    return result.stderr


def not_quantized(model: Path, *options: object) -> str:
    """The message of a refused quantize, which must leave no OUT."""
    out = model.parent / "out"
    message = refused("quantize", model, "-o", out, "--quiet", *options)
    assert not out.exists()
    return message


def accepted(*arguments: object) -> None:
    result = CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr


def run(*arguments: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)
