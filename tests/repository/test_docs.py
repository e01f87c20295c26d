"""What the documentation says is what its sources say."""

from __future__ import annotations

import statistics
import subprocess
import sys
from types import ModuleType

import pytest

from quantkit.model.spec import Role
from quantkit.recipe import Recipe
from quantkit.scheme import PRESETS
from tests.helpers.paths import ROOT
from tests.helpers.scripts import script


@pytest.mark.parametrize("page", ["allocation", "cpu", "peers", "gpu"])
def test_figures_are_those_of_the_committed_results(page: str) -> None:
    done = subprocess.run([sys.executable, f"scripts/{page}_doc.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def accuracy() -> ModuleType:
    return script("accuracy_table")


def test_tables_show_what_was_measured(accuracy: ModuleType) -> None:
    """The README's of schemes, and that of every run in docs/accuracy.md."""
    assert {page.name for page in accuracy.PAGES} == {"README.md", "accuracy.md"}
    for page in accuracy.PAGES:
        shown = page.read_text("utf-8")
        assert shown == accuracy.written(page, accuracy.read("accuracy")), "run scripts/accuracy_table.py"


def test_bytes_of_the_mix_are_the_plans() -> None:
    """One row of the table, which `python scripts/mix_table.py` writes."""
    mix = script("mix_table")
    assert f"| Hunyuan-A13B | {' | '.join(mix._sizes('hunyuan-a13b'))} |" in mix.PAGE.read_text("utf-8")


def test_the_readme_has_a_row_for_each_scheme(accuracy: ModuleType) -> None:
    rows = {row[0].strip("`") for row in accuracy.SCHEMES if not row[0].startswith("**")}
    assert rows == set(PRESETS)


def test_a_page_has_one_place_for_what_is_measured() -> None:
    between = script("measured").between
    assert between("a BEGIN old END z END", "BEGIN", "END", ["new"]) == "a BEGIN\nnew\nEND z END"
    for page in ("no place", "a BEGIN old", "END then BEGIN", "BEGIN a END BEGIN b END"):
        with pytest.raises(SystemExit, match="the page needs 'BEGIN' once"):
            between(page, "BEGIN", "END", ["new"])


def test_the_recipe_that_is_recommended_loses_least_at_its_size(accuracy: ModuleType) -> None:
    """Of the three that raise attention and shared experts to 8 bits, by the median of seeds; and it is what is shown."""
    runs = accuracy.read("accuracy")["runs"]
    rivals = {name: rows for name, rows in runs.items() if name.startswith("experts W4A16")}
    mean = {name: statistics.median(run["kl_mean"] for run in rows) for name, rows in rivals.items()}
    sizes = {name: rows[0]["output_bytes"] for name, rows in rivals.items()}
    assert len(rivals) == 3 and max(sizes.values()) < 1.005 * min(sizes.values())
    assert min(mean, key=lambda name: mean[name]) == accuracy.RECOMMENDED
    assert mean[accuracy.RECOMMENDED] < 0.6 * mean["experts W4A16 GPTQ, attention and shared FP8_DYNAMIC"]
    for place in ("README.md", "quantkit/cli.py", "examples/demo.py"):
        text = (ROOT / place).read_text("utf-8").replace('", "', " ")
        assert "attention FP8_DYNAMIC" not in text
    settled = Recipe().settled({Role.EXPERTS, Role.SHARED_EXPERTS, Role.ATTENTION})  # what nobody has to name
    assert (settled.scheme, settled.experts, settled.shared_experts, settled.attention) == ("W4A16", None, "W8A16", "W8A16")
    assert "--experts W4A16 --attention W8A16 --shared-experts W8A16" in text  # of the demo, the last of these places
