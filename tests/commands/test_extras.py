"""Without the libraries of an extra: one message that names it, before any work; and all else works."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.extras import LIBRARIES, install
from tests.helpers.commands import refused
from tests.helpers.paths import ROOT

MESSAGES = {"messages": [{"role": "user", "content": "hello"}]}
Without = Callable[[str], None]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Without:
    """without(library): it cannot be imported, as where it is not installed."""
    return lambda library: monkeypatch.setitem(sys.modules, library, None)


@pytest.mark.parametrize("library", LIBRARIES["report"])
def test_a_page_is_refused_before_the_evaluation(
    library: str, pair: tuple[Path, Path], tmp_path: Path, without: Without
) -> None:
    without(library)
    command = ("eval", pair[0], "--baseline", pair[1], "--seq-len", 64, "--windows", 2)
    said = refused(*command, "--save", tmp_path / "saved")
    assert f"needs the library {library}" in said and install("report") in said and not (tmp_path / "saved").exists()
    said = refused("quantize", pair[1], "-o", tmp_path / "new", "--held-out", "stdlib-held-out")
    assert library in said and install("report") in said and not list(tmp_path.iterdir())
    said = refused("report", pair[0], "-o", tmp_path / "page.html")
    assert library in said and install("report") in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["rows.parquet", "wikitext2"])
def test_parquet_is_refused_before_the_work(source: str, model: Path, tmp_path: Path, without: Without) -> None:
    """A text of the hub before it is fetched."""
    without("pyarrow")
    text = source if source == "wikitext2" else tmp_path / source
    (tmp_path / "rows.parquet").write_bytes(b"it is not opened")
    before = sorted(tmp_path.iterdir())
    said = refused("quantize", model, "-o", tmp_path / "out", "--group-size", 32, "--calibration", text)
    assert source in said and "needs the library pyarrow" in said and install("parquet") in said
    assert sorted(tmp_path.iterdir()) == before


def test_conversations_are_refused_before_the_work(model: Path, tmp_path: Path, without: Without) -> None:
    without("jinja2")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "chat.jsonl").write_text(f"{json.dumps(MESSAGES)}\n" * 99)
    options = ("--group-size", 32, "--calibration", tmp_path / "chat.jsonl", "--samples", 2, "--seq-len", 8)
    said = refused("quantize", model, "-o", tmp_path / "out", *options)
    assert "chat.jsonl line " in said and "needs the library jinja2" in said and install("chat") in said
    assert not list(tmp_path.glob("out*"))


def test_all_else_works_without_any_of_them(model: Path, tmp_path: Path) -> None:
    """In a process of its own, where nothing has imported them before."""
    blocked = sorted({name for names in LIBRARIES.values() for name in names})
    script = f"import sys; sys.modules.update(dict.fromkeys({blocked})); from quantkit.cli import main; main()"
    options = ("--method", "rtn", "--group-size", "32", "--quiet")
    command = [sys.executable, "-c", script, "quantize", str(model), "-o", str(tmp_path / "out"), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out" / "SHA256SUMS").is_file(), done.stderr


def test_extras_are_those_of_the_package() -> None:
    """And what no extra holds, and nothing imports at its top, is none of the core."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[\[<>=; ]", line)[0].replace("-", "_") for line in requirements}

    for extra, libraries in LIBRARIES.items():
        assert set(libraries) == names(project["optional-dependencies"][extra])
        assert not set(libraries) & names(project["dependencies"])
    assert ".[report]" in (ROOT / "scripts" / "setup.sh").read_text()  # make demo writes pages


def test_a_target_is_refused_before_the_measurement(model: Path, tmp_path: Path, without: Without) -> None:
    without("scipy")
    said = refused("quantize", model, "-o", tmp_path / "out", "--group-size", 32, "--target-bits", 5)
    assert "needs the library scipy" in said and install("allocate") in said and not list(tmp_path.glob("out*"))
