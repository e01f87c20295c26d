"""Tests lie in wings that mirror the package's rooms, and what they share lies in tests/helpers, where it can be found."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers.modules import MODULES
from tests.helpers.paths import ROOT

TESTS = ROOT / "tests"
ROOMS = {module.split(".")[0] for module in MODULES}
RULES = "rules"  # of `quantkit.engines`, asked without an engine; tests/engines needs a vLLM of its own
SHARED = {"helpers", "golden"}
APART = {"gpu", "engines"}  # run by commands of their own
FILES = sorted(TESTS.rglob("*.py"))
WINGS = sorted({path.relative_to(TESTS).parts[0] for path in FILES if path.parent != TESTS})


@pytest.mark.parametrize("name", WINGS)
def test_a_wing_is_a_room_or_known(name: str) -> None:
    known = {RULES, "repository", *SHARED, *APART}
    assert name in ROOMS | known, f"tests/{name} mirrors no room of the package"
    if name not in SHARED | APART:
        others = {path.name for path in (TESTS / name).iterdir() if not path.name.startswith(("test_", "__"))}
        assert not others, f"tests/{name}: {others} go to tests/helpers"


def test_no_test_lies_outside_of_a_wing() -> None:
    assert {path.name for path in TESTS.glob("*.py")} == {"__init__.py", "conftest.py"}
    assert not list((TESTS / "helpers").glob("test_*"))


def imported(path: Path) -> set[str]:
    """Every module of tests/ that a file names, as `import x`, `from x import y`, or relative."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("tests.")}


def test_no_file_imports_from_a_test() -> None:
    for path in FILES:
        borrowed = {name for name in imported(path) if any(part.startswith("test_") for part in name.split("."))}
        assert not borrowed, f"{path}: what two tests share goes to tests/helpers: {sorted(borrowed)}"
