"""scripts/gpu_check.sh with stand-ins for the GPU's Python and tools, and what becomes of the folder that it fills."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import requires
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from quantkit.kernels.triton import tiles
from quantkit.kernels.triton.tiles import Tile
from tests.helpers.paths import ROOT

PYTHON = f"""#!{sys.executable}
import json, os, pathlib, sys, time
arguments = " ".join(sys.argv[1:])
with open(os.environ["CALLED"], "a") as log:
    log.write(arguments + "\\n")
breaks, hangs = os.environ.get("BREAKS", "no such"), os.environ.get("HANGS", "no such")
if "--out" in sys.argv:
    to = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    to.write_text(json.dumps({{"stands in": to.stem}}))
if hangs in arguments:
    time.sleep(60)
print("1 failed" if breaks in arguments else "9 passed")
sys.exit(breaks in arguments)
"""


@pytest.fixture
def check(tmp_path: Path) -> Any:
    """Runs the script with other names in its environment -> (exit status, what it said, what it called, its folder)."""
    for name, text in (
        ("python", PYTHON),
        ("nvidia-smi", "#!/bin/sh\necho NVIDIA H100\n"),
        ("ncu", "#!/bin/sh\necho Duration 9\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**env: str) -> tuple[int, str, list[str], Path]:
        given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "GPU_PYTHON": str(tmp_path / "python")}
        given |= {"OUT": str(tmp_path / "out"), "CALLED": str(tmp_path / "called"), **env}
        done = subprocess.run(["bash", "scripts/gpu_check.sh"], cwd=ROOT, env=given, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, (tmp_path / "called").read_text().splitlines(), tmp_path / "out"

    return run


def test_everything_in_order(check: Any) -> None:
    status, said, called, out = check()
    assert status == 0 and "all tests passed" in said, said
    stages = re.findall(r"== +\d+ s: (\w+)", said)
    assert stages == ["smoke", "correctness", "goals", "counters", "tiles", "goals", "end"]
    assert {path.name for path in out.iterdir()} == {
        *("check.log", "tests.log", "goals.json", "counters.txt", "tune.json", "tuned.json")
    }
    assert (out / "check.log").read_text().strip() in said
    tests = [line for line in called if "pytest" in line]
    for name in (
        path.name for path in (ROOT / "tests" / "gpu").glob("*.py") if "__" not in path.name and path.name != "conftest.py"
    ):
        assert sum(f"tests/gpu/{name}" in line for line in tests) == 1, name
    assert [line.count("--apply") for line in called if "--tune" in line] == [0, 1]  # nothing is changed while tests run
    for name in re.findall(r"(?:tests|bench)/[\w/]+\.py", " ".join(called)):
        assert (ROOT / name).is_file(), name


def test_a_failed_smoke_ends_it(check: Any) -> None:
    status, said, called, out = check(BREAKS="smoke.py")
    assert status == 2 and "nothing else is tried" in said and len([line for line in called if "pip" not in line]) == 1
    assert [path.name for path in out.iterdir()] == ["check.log"]


def test_failed_tests_are_told_and_the_goals_measured_nevertheless(check: Any) -> None:
    status, said, _, out = check(BREAKS="shapes.py")
    assert status == 1 and "tests failed" in said and (out / "tuned.json").is_file()
    assert "1 failed" in (out / "tests.log").read_text() and "9 passed" in (out / "tests.log").read_text()


def test_what_hangs_is_stopped_at_the_limit(check: Any) -> None:
    begin = time.monotonic()
    status, said, _, out = check(HANGS="goals.json", LIMIT="4")
    assert time.monotonic() - begin < 30 and "counters" not in said and "end" in said
    assert status == 0 and json.loads((out / "goals.json").read_text()) == {"stands in": "goals"}


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu_keep")


def written(folder: Path, name: str, **content: Any) -> None:
    whole = {"gpu": "NVIDIA H100 80GB HBM3", "complete": True, "rows": [{"kernel": "bf16"}], "failed": []}
    (folder / f"{name}.json").write_text(json.dumps({**whole, **content}))


def test_results_and_table_are_kept(keep: ModuleType, tmp_path: Path) -> None:
    table = (
        'TABLE: dict[str, tuple[tuple[float, Tile], ...]] = {\n    "int4": (\n        (inf, Tile(16, 64, 4, 9)),\n    ),\n}'
    )
    copy, out, results = tmp_path / "tiles.py", tmp_path / "out", tmp_path / "results"
    out.mkdir(), results.mkdir()
    copy.write_text(keep.TILES.read_text())
    before = copy.read_text()
    written(out, "goals", rows=[{"kernel": "W4A16", "median_us": 2.0}])
    (out / "tuned.json").write_text('{"gpu": "NVIDIA H')  # stopped while it wrote
    keep.keep(out, results, copy)
    kept = json.loads((results / "gpu_nvidia-h100-80gb-hbm3.json").read_text())
    assert kept["rows"] == [{"kernel": "W4A16", "median_us": 2.0}] and kept["tuned"] is False and copy.read_text() == before
    written(out, "tuned", rows=[{"kernel": "W4A16", "median_us": 1.0}])
    (out / "tune.json").write_text(json.dumps({"table": table, "sizes": {"SCRATCH_FROM": 768, "CUDA_UP_TO": 0.5}}))
    keep.keep(out, results, copy)
    kept = json.loads((results / "gpu_nvidia-h100-80gb-hbm3.json").read_text())
    assert kept["rows"][0]["median_us"] == 1.0 and kept["tuned"] is True
    names: dict[str, Any] = {"__name__": tiles.__name__}
    exec(compile(copy.read_text(), "tiles.py", "exec", dont_inherit=True), names)
    assert names["TABLE"]["int4"][0][1].stages == Tile(16, 64, 4, 9).stages and (
        names["SCRATCH_FROM"],
        names["CUDA_UP_TO"],
    ) == (768, 0.5)


def test_an_empty_folder_is_refused(keep: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"goals.json has no measurements: check.log"):
        keep.keep(tmp_path, tmp_path, tmp_path / "tiles.py")
    with pytest.raises(ValueError, match="no TABLE"):
        (tmp_path / "other.py").write_text("x = 1\n")
        keep.apply("TABLE", {}, tmp_path / "other.py")


def test_wheels_are_what_the_tests_import_beyond_the_machine() -> None:
    """The machine has torch, Triton, transformers and pytest with what they need; `make gpu-wheels` brings the rest."""
    there = {"torch", "triton", "numpy", "tokenizers", "safetensors", "pyyaml", "tqdm", "setuptools"}
    there |= {"pytest", "pluggy", "iniconfig", "pygments", "click", "rich"}
    code = """
import sys
sys.path[:0] = ["bench"]
import tests.conftest, tests.gpu.kernels, tests.gpu.model, tests.gpu.shapes, gpu_kernels, quantkit
from importlib.metadata import packages_distributions
quantkit.quantize, quantkit.load
names = packages_distributions()
print(*{name for module in list(sys.modules) for name in names.get(module.split(".")[0], [])})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    brought = re.search(r"^WHEELS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert brought
    imported = {name.lower().replace("_", "-") for name in done.stdout.split()} - {"quantkit"}
    later = {
        "compressed-tensors",
        *(name.split(">")[0] for name in requires("compressed-tensors") or () if "extra" not in name),
    }
    imported |= later - {"transformers", "psutil"}  # a checkpoint is written with it
    assert imported - there == {name.replace("_", "-") for name in brought[1].split()}
