"""An sdist, a wheel made of it, and that wheel in an empty environment: it has what it needs, and quantizes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import quantkit
from tests.helpers.paths import ROOT

BUILT = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "quantkit", "optimum")
CACHES = shutil.ignore_patterns("__pycache__", "*.egg-info", "*.so")


def run(*command: str | Path, cwd: Path) -> str:
    """Outside of the tree, and without what would lead back to it."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**kept, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, tree: Path, folder: Path) -> Path:
    """`sdist` or `wheel` of a tree, as a front end would ask for it."""
    folder.mkdir(exist_ok=True)
    call = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    return folder / run(sys.executable, "-c", call, cwd=tree).splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist alone."""
    root = tmp_path_factory.mktemp("package")
    tree = root / "tree"
    tree.mkdir()
    for name in BUILT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tree / name, **({"ignore": CACHES} if copy is shutil.copytree else {}))
    with tarfile.open(build("sdist", tree, root / "dist")) as packed:
        packed.extractall(root / "unpacked", filter="data")
    (source,) = (root / "unpacked").iterdir()
    return build("wheel", source, root / "dist")


def test_nothing_is_left_out_of_the_wheel(wheel: Path) -> None:
    """Every file of the package: modules, kernels' sources, templates, tasks, py.typed; and its metadata."""
    packed = set(zipfile.ZipFile(wheel).namelist())
    tree = {
        str(path.relative_to(ROOT))
        for name in ("quantkit", "optimum")
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert {name for name in packed if ".dist-info/" not in name} == tree
    assert {Path(name).suffix for name in tree} >= {".py", ".cpp", ".h", ".cu", ".j2", ".yaml", ".typed"}
    assert f"quantkit-{quantkit.__version__}.dist-info/licenses/LICENSE" in packed


def test_the_wheel_quantizes_in_an_empty_environment(wheel: Path, model: Path, tmp_path: Path) -> None:
    """Beside it only what it depends on, from where that is installed here; data-free, on a small random model."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    place = run(python, "-c", "import quantkit; print(quantkit.__file__)", cwd=tmp_path).strip()
    assert Path(place).is_relative_to(site)
    command = home / "bin" / "quantkit"
    assert quantkit.__version__ in run(command, "--version", cwd=tmp_path)
    assert "quantize" in run(command, "--help", cwd=tmp_path)
    said = run(command, "quantize", model, "-o", "OUT", "--method", "rtn", "--group-size", "32", cwd=tmp_path)
    assert "smaller), verified" in said and (tmp_path / "OUT" / "SHA256SUMS").exists()
