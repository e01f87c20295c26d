"""What examples/ shows runs as it is shown: three scripts, one after another, and the notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import quantkit
from quantkit.recipe import Recipe
from tests.helpers.paths import ROOT

FOLDER = ROOT / "examples"
SCRIPTS = ("quantize.py", "evaluate.py", "generate_text.py")


def run(*arguments: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=FOLDER,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER.parent)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("calibrated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_scripts_in_turn(calibrated: bool, tmp_path: Path) -> None:
    """The first takes half a minute of processor time; without it, the others read what was rounded."""
    out = tmp_path / "OUT"
    if calibrated:
        assert "16.8 MB -> 6.4 MB" in run("quantize.py", out)
    else:
        quantkit.quantize(FOLDER / "tiny-hunyuan", out, Recipe(scheme="W8A16", method="rtn"))
    said = run("evaluate.py", out)
    assert said.count(": pass") == 2 and "perplexity: " in said
    assert run("generate_text.py", out, "import os\n").startswith("import os\n")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_short(name: str) -> None:
    assert len((FOLDER / name).read_text("utf-8").splitlines()) < 40


@pytest.mark.slow
def test_the_notebook(tmp_path: Path) -> None:
    """Its cells in one process, as Jupyter would run them; it is committed without outputs."""
    cells = json.loads((FOLDER / "tour.ipynb").read_text("utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    program = tmp_path / "tour.py"
    program.write_text("\n\n".join("".join(cell["source"]) for cell in code), "utf-8")
    said = run(program)
    assert "16.8 MB ->" in said and "mean KL" in said and "def main(" in said
