"""The table of docs/engine-results.md is what the script makes of the committed results."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.helpers.scripts import script


@pytest.fixture(scope="module")
def table() -> ModuleType:
    return script("engine_table")


def test_the_page_shows_the_results(table: ModuleType) -> None:
    page = table.PAGE.read_text("utf-8")
    results = table.read("engines")
    assert page == table.written(page, results), "run scripts/engine_table.py"
    assert "not tried" not in table.table(results)


def test_what_works_is_well_below_what_is_damaged(table: ModuleType) -> None:
    """vLLM's limit of 0.01 nats (0.02 where INT4 and FP8 meet), against the same model with two MLPs exchanged."""
    results = table.read("engines")
    cells = [(column, cell) for model in results["cells"]["vllm"].values() for column, cell in model.items()]
    works = [(0.02 if column in table.BESIDE else 0.01, cell) for column, cell in cells if cell["status"] == "works"]
    assert len(works) >= 3 * 6
    assert all(cell["kl"] < limit and cell["damaged"] > max(0.02, 3 * cell["kl"]) for limit, cell in works)
