"""Who may import whom (docs/architecture.md), names that are exported, and sizes that stay readable."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import quantkit

ROOT = Path(quantkit.__file__).parent
# Lower layers never import higher ones. Within a level only the edges listed may exist.
LEVELS = [
    {"errors", "model.spec", "formats.dtypes"},
    {"scheme", "qtensor", "stats", "owned", "quant", "formats.packing", "formats.atomic", "kernels.reference"},
    {"model", "calib", "formats", "kernels"},
    {
        "host",
        "sampling",
        "runtime",
        "text",
        "bench",
        "coverage",
        "published",
        "engines",
        "verify",
        "verify_linears",
        "faithful",
        "bounds",
        "plan",
        "journal",
        "partial",
        "unit",
        "evals",
        "pipeline",
        "conversion",
    },
    {"progress", "command", "task_tables", "options", "cli", "cli_eval"},
]
FORBIDDEN = {
    "formats": {"kernels", "quant", "calib", "model.forward"},
    "kernels": {"formats", "calib", "model"},
    "quant": {"formats", "model", "calib", "kernels"},
    **dict.fromkeys(
        ("verify", "verify_linears", "faithful", "bounds"), {"formats.writer", "calib.walk", "quant", "pipeline"}
    ),
    "coverage": {"formats.writer", "calib", "quant", "pipeline"},
    "engines": {"formats.writer", "calib", "quant", "kernels", "runtime", "plan", "pipeline"},
    "evals": {"quant", "pipeline", "formats.writer"},
}
EXTRAS = {"evals.harness": "lm_eval"}  # modules that subclass what an optional library defines
MODULES = sorted(".".join(p.relative_to(ROOT).with_suffix("").parts) for p in ROOT.rglob("*.py") if p.name != "__init__.py")


def imports(module: str) -> set[str]:
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("quantkit"):
            base = node.module.removeprefix("quantkit").lstrip(".")
            found |= {
                f"{base}.{a.name}".lstrip(".") if f"{base}.{a.name}".lstrip(".") in MODULES else base for a in node.names
            }
    return found - {""}


def within(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


def level(module: str) -> int:
    """The most specific entry decides, so model.spec lies below the rest of model."""
    parts = module.split(".")
    for depth in range(len(parts), 0, -1):
        for number, names in enumerate(LEVELS):
            if ".".join(parts[:depth]) in names:
                return number
    raise AssertionError(f"{module} has no level: add it to LEVELS and to docs/architecture.md")


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module: str) -> None:
    for imported in imports(module):
        assert level(imported) <= level(module), f"{module} imports {imported}, which lies above it"
    for area, banned in FORBIDDEN.items():
        if within(module, {area}):
            assert not {i for i in imports(module) if within(i, banned)}, f"{area} may not import {banned}"


@pytest.mark.parametrize("module", MODULES)
def test_all_is_true(module: str) -> None:
    if module in EXTRAS:
        pytest.importorskip(EXTRAS[module], reason="of an extra that is not installed")
    if module == "engines.vllm_hunyuan":
        pytest.importorskip("vllm", reason="it stands on vLLM's own layers; make engine-test runs it")
    loaded = importlib.import_module(f"quantkit.{module}")
    assert all(hasattr(loaded, name) for name in loaded.__all__)


def test_package_exports() -> None:
    assert all(hasattr(quantkit, name) for name in quantkit.__all__)
    with pytest.raises(AttributeError):
        _ = quantkit.nothing


@pytest.mark.parametrize("module", MODULES)
def test_files_and_functions_stay_small(module: str) -> None:
    text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno and node.end_lineno - node.lineno < 80, f"{module}.{node.name}"
