"""Who may import whom (docs/architecture.md), names that are exported, and sizes that stay readable."""

from __future__ import annotations

import ast
import importlib
import os
import re
from pathlib import Path

import pytest

import quantkit
from tests.helpers import modules
from tests.helpers.modules import MODULES, PACKAGE, imports, within
from tests.helpers.scripts import script

# What each room may import beside itself; docs/architecture.md shows the same table. A module of the root is a room.
VOCABULARY = {"errors", "choices", "dtypes", "model.spec", "scheme", "qtensor", "stats", "owned", "atomic", "host", "extras"}
BELOW_CHECKPOINT = {*VOCABULARY, "model", "formats"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "choices": set(),
    "dtypes": set(),
    "model.spec": set(),
    "owned": {"errors"},
    "atomic": {"errors", "owned"},
    "host": {"errors"},
    "extras": {"errors"},
    "scheme": {"errors"},
    "qtensor": {"dtypes", "scheme"},
    "stats": set(),
    "kernels.build_cache": {"owned", "atomic"},
    "kernels.cpu.build": {"kernels.build_cache"},
    "rowwise": {"dtypes", "scheme", "qtensor", "kernels.cpu.build"},
    "quant.method": {"choices"},
    "recipe": {"errors", "choices", "scheme", "model.spec", "quant.method"},
    "quant": {"qtensor", "scheme", "stats", "rowwise", "quant.method"},
    "model": {"errors", "choices", "model.spec"},
    "formats": {"errors", "choices", "dtypes", "model.spec", "model", "qtensor", "scheme"},
    "kernels.reference": {"qtensor", "scheme"},
    "kernels": {
        "errors",
        "owned",
        "atomic",
        "qtensor",
        "scheme",
        "kernels.reference",
        "kernels.build_cache",
        "kernels.cpu.build",
    },
    "checkpoint": {*BELOW_CHECKPOINT, "rowwise"},
    "calib": {*VOCABULARY, "model", "checkpoint", "kernels.reference"},
    "run": {*BELOW_CHECKPOINT, "checkpoint", "calib", "kernels", "kernels.reference"},
    "engines": {*BELOW_CHECKPOINT, "checkpoint"},
    "job": {
        *BELOW_CHECKPOINT,
        "checkpoint",
        "calib",
        "recipe",
        "quant",
        "quant.method",
        "kernels",
        "kernels.reference",
        "kernels.cpu.build",
    },
    "report": {"errors", "extras", "atomic", "checkpoint"},
    "measure": {*BELOW_CHECKPOINT, "checkpoint", "calib", "recipe", "run", "report"},
    "allocate": {
        *BELOW_CHECKPOINT,
        *("checkpoint", "calib", "recipe", "quant.method", "engines", "job", "measure", "report"),
    },
    "tasks": {*BELOW_CHECKPOINT, "checkpoint", "calib", "run", "measure", "report"},
    "commands": {
        "errors",
        "choices",
        "extras",
        "host",
        "model",
        "recipe",
        "checkpoint",
        "engines",
        "job",
        "measure",
        "report",
        "allocate",
        "tasks",
    },
    "cli": {"errors", "choices", "model", "checkpoint", "engines", "run", "job", "commands"},
}
# Within what a room may import, what these modules may not: who judges is independent of who writes.
JUDGES = (
    "checkpoint.inspect",
    "checkpoint.verify",
    "checkpoint.verify_linears",
    "checkpoint.faithful",
    "checkpoint.bounds",
    "checkpoint.coverage",
)
FORBIDDEN = {**dict.fromkeys((*JUDGES, "engines", "measure"), {"checkpoint.writer"})}
EXTRAS = {"tasks.harness": "lm_eval"}  # modules that subclass what an optional library defines


def room(module: str) -> str:
    """The most specific entry decides, so model.spec lies below the rest of model."""
    inside = [name for name in ROOMS if within(module, name)]
    assert inside, f"{module} is in no room: add it to ROOMS and to docs/architecture.md"
    return max(inside, key=len)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    own = room(module)
    for imported in imports(module):
        assert room(imported) in {own, *ROOMS[own]}, f"{module} imports {imported}, which {own} may not"
        for judge, banned in FORBIDDEN.items():
            assert not (within(module, judge) and imported in banned), f"{module} may not import {imported}"


def test_rooms_have_no_circle() -> None:
    done: set[str] = set()
    while rest := [name for name in ROOMS if name not in done]:
        free = [name for name in rest if ROOMS[name] <= done]
        assert free, f"a circle among {rest}"
        done.update(free)


def rooms_table() -> list[str]:
    rows = ["", "| room | may import |", "|---|---|"]
    for name, allowed in ROOMS.items():
        words = ["the vocabulary"] if allowed >= VOCABULARY else []
        below = words + [f"`{other}`" for other in ROOMS if other in allowed - (VOCABULARY if words else set())]
        rows.append(f"| `{name}` | {', '.join(below) or 'nothing'} |")
    vocabulary = ", ".join(f"`{name}`" for name in ROOMS if name in VOCABULARY)
    return [*rows, "", f"The vocabulary: {vocabulary}.", ""]


def test_the_page_shows_the_rooms() -> None:
    """Written anew where it is asked for: QUANTKIT_WRITE=1."""
    page = PACKAGE.parent / "docs" / "architecture.md"
    text = page.read_text("utf-8")
    expected = script("measured").between(text, "<!-- rooms -->", "<!-- end of rooms -->", rooms_table())
    if os.environ.get("QUANTKIT_WRITE"):
        page.write_text(expected, "utf-8")
    assert text == expected, "run this test once with QUANTKIT_WRITE=1"


def test_imports_of_every_kind_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "from . import errors",
        "from .job import plan",
        "import quantkit.host",
        "def f():",
        "    from quantkit.run import model",
    ]
    (tmp_path / "cli.py").write_text("\n".join([*lines, "    import_module('quantkit.scheme')"]))
    monkeypatch.setattr(modules, "PACKAGE", tmp_path)
    assert imports("cli") == {"errors", "job.plan", "host", "run.model", "scheme"}


@pytest.mark.parametrize("module", MODULES)
def test_all_is_true(module: str) -> None:
    if module in EXTRAS:
        pytest.importorskip(EXTRAS[module], reason="of an extra that is not installed")
    if module == "engines.vllm_hunyuan":
        pytest.importorskip("vllm", reason="it stands on vLLM's own layers; make engine-test runs it")
    loaded = importlib.import_module(f"quantkit.{module}")
    assert all(hasattr(loaded, name) for name in loaded.__all__)


def test_modules_that_are_named_are_there() -> None:
    """In a string, such as for a process that is started or a file that is looked for beside a module."""
    others = {"quantkit.json", "quantkit.gates"}  # a file of an OUT, a class of JUnit's
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.fullmatch(r"quantkit(\.\w+)+(:\w+)?", text) and text not in others:
                name = PACKAGE.parent / text.partition(":")[0].replace(".", "/")
                assert name.is_dir() or name.with_suffix(".py").is_file(), f"{path} names {text}"


def test_package_exports() -> None:
    assert all(hasattr(quantkit, name) for name in quantkit.__all__)
    with pytest.raises(AttributeError):
        _ = quantkit.nothing


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_small(module: str) -> None:
    text = (PACKAGE / (module.replace(".", "/") + ".py")).read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno and node.end_lineno - node.lineno < 80, f"{module}.{node.name}"
