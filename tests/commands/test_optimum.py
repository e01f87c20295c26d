"""`optimum-cli quantkit` through optimum's own command line, and its data sets as names of texts."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from quantkit.calib import corpus
from quantkit.calib.documents import read_documents
from tests.helpers.commands import QUICK, accepted, not_quantized, refused


def optimum_cli(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed (quantkit[optimum])")
    code = "from optimum.commands.optimum_cli import main; main()"
    command = [sys.executable, "-c", code, "quantkit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_optimum_runs_our_commands(model: Path, tmp_path: Path) -> None:
    done = optimum_cli(tmp_path, "quantize", model, "-o", tmp_path / "out", *QUICK, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "run.json").read_text())
    accepted("verify", tmp_path / "out", "--source", model)
    failed = optimum_cli(tmp_path, "quantize", model, "-o", tmp_path / "out")
    assert failed.returncode == 2 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    assert "convert" in optimum_cli(tmp_path, "--help").stdout


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A hub that has both data sets; what was asked of it."""
    rows = ["", " = Title = \n", " Some words of it . \n"] * 40
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "wikitext.parquet")
    with gzip.open(tmp_path / "c4.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"document {i} " * 8, "url": ""}) + "\n" for i in range(50))
    asked: list[tuple[str, str]] = []

    def download(repository: str, name: str, *, repo_type: str) -> str:
        assert repo_type == "dataset"
        asked.append((repository, name))
        return str(tmp_path / {"Salesforce/wikitext": "wikitext.parquet", "allenai/c4": "c4.json.gz"}[repository])

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    return asked


def test_data_sets_by_name(hub: list[tuple[str, str]], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(["", " = Title = \n", " Some words of it . \n"] * 40)
    assert list(read_documents("wikitext2")) == list(read_documents("wikitext2-test")) == [text]
    assert list(read_documents("c4")) == [f"document {i} " * 8 for i in range(50)]
    monkeypatch.setattr(corpus, "MAX_DOCUMENTS", 3)
    assert len(read_documents("c4")) == 3
    assert {repository for repository, _ in hub} == {"Salesforce/wikitext", "allenai/c4"}
    accepted(
        *("quantize", model, "-o", tmp_path / "out", "--calibration", "wikitext2", "--group-size", "32"),
        *("--samples", "4", "--seq-len", "64", "--quiet"),
    )


def test_a_hub_that_cannot_be_reached_is_asked_once(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[float | None] = []

    def unreachable(url: str, timeout: float | None = None) -> None:
        asked.append(timeout)
        raise RuntimeError("Name or service not known")  # what the HTTP client raises is no OSError either

    def download(*_: str, **__: str) -> str:
        raise AssertionError("it would try again for half a minute")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    message = not_quantized(model, "--calibration", "wikitext2", "--group-size", "32")
    assert "Name or service not known" in message and "file of your own" in message
    assert len(asked) == 1 and asked[0] is not None and asked[0] <= 10


def test_data_sets_without_the_hub(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    for name, repository in {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4"}.items():
        for message in (
            not_quantized(model, "--calibration", name, "--group-size", "32"),
            refused("eval", model, "--baseline", model, "--text", name),
        ):
            assert f"'{name}'" in message and repository in message and "file of your own" in message
