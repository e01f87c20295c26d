"""The part of a page that a script writes from bench/results: `--check` only compares."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def read(name: str) -> Any:
    """bench/results/NAME.json."""
    return json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text("utf-8"))


def between(text: str, begin: str, end: str, lines: Sequence[str]) -> str:
    """The page `text` with these lines from one mark to the other. Raises SystemExit when it has no one place for them."""
    if text.count(begin) != 1 or (after := text.split(begin)[1]).count(end) < 1:
        sys.exit(f"the page needs '{begin}' once, and '{end}' after it")
    return "\n".join([text.split(begin)[0] + begin, *lines, end + after.partition(end)[2]])


def write(page: str, lines: Sequence[str]) -> None:
    """Put `lines` into docs/PAGE.md, after the mark that names its script; with --check, exit if they are not there."""
    path = ROOT / "docs" / f"{page}.md"
    text = path.read_text("utf-8")
    wanted = between(text, f"<!-- measured: scripts/{page}_doc.py -->", "<!-- end -->", ["", *lines, ""])
    if "--check" in sys.argv and wanted != text:
        sys.exit(f"docs/{page}.md is not what bench/results say: run python scripts/{page}_doc.py")
    path.write_text(wanted, "utf-8")
