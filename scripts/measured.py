"""The part of a page that a script writes from bench/results: `--check` only compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
END = "<!-- end -->"


def read(name: str) -> Any:
    """bench/results/NAME.json."""
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())


def write(page: str, lines: Sequence[str]) -> None:
    """Put `lines` into docs/PAGE.md, after the mark that names its script; with --check, exit if they are not there."""
    begin, path = f"<!-- measured: scripts/{page}_doc.py -->", ROOT / "docs" / f"{page}.md"
    text = path.read_text("utf-8")
    before, rest = text.split(begin)
    _, after = rest.split(END)
    wanted = "\n".join([before + begin, "", *lines, "", END + after])
    if "--check" in sys.argv and wanted != text:
        sys.exit(f"docs/{page}.md is not what bench/results say: run python scripts/{page}_doc.py")
    path.write_text(wanted, "utf-8")
