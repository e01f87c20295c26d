"""What the documentation says is what its sources say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("page", ["cpu", "peers", "gpu"])
def test_figures_are_those_of_the_committed_results(page: str) -> None:
    done = subprocess.run([sys.executable, f"scripts/{page}_doc.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_documents_that_are_linked_exist() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in page.read_text("utf-8").split("](")[1:]:
            path = target.split(")")[0].split("#")[0]
            assert "://" in path or not path or (page.parent / path).exists(), (page.name, path)
