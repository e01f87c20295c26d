"""The arithmetic of bench/gpu_kernels.py on made-up times, and the tiles that its sweep would try. It runs on a GPU only."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quantkit.kernels.triton import lang, tiles
from quantkit.kernels.triton.tiles import Tile
from tests.helpers.paths import ROOT

BENCH = ROOT / "bench"


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_report")


@pytest.fixture
def tune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not lang.available():
        pytest.skip("Triton is not installed")
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_tune")


def test_rates_and_roofline(report: ModuleType) -> None:
    peaks = report.Peaks(4e12, {"bf16": 8e14, "fp8": 16e14})
    row = report.row([3e-4, 1e-4, 2e-4, 2e-4, 2e-4], moved=4e8, operations=8e9, peaks=peaks, kind="bf16")
    assert (row["median_us"], row["p20_us"], row["p80_us"]) == (200.0, 180.0, 220.0)
    assert row["gb_per_s"] == 2000.0 and row["tflop_per_s"] == 40.0
    assert row["of_bandwidth"] == row["of_roofline"] == 0.5  # 100 us to read it, 10 us to compute it
    busy = report.row([2e-4] * 3, moved=4e7, operations=1.6e11, peaks=peaks, kind="fp8")
    assert busy["of_bandwidth"] == 0.05 and busy["of_roofline"] == 0.5  # 10 us to read, 100 us to compute


def table(report: ModuleType, of_bandwidth: float = 0.8, times: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Rows of every goal's token counts: bf16 in 1200 us, the others as given, else in 300."""
    rows = []
    for tokens in (1, 4, 16, 64, 256, 4096):
        for kernel in ("bf16", "bf16 torch", "W4A16", "W4A16 cuda", "W4A16 triton", "FP8_DYNAMIC"):
            time = (times or {}).get(kernel, 1200.0 if kernel.startswith("bf16") else 300.0)
            place = {"model": "hunyuan-large", "layer": "moe", "tokens": tokens, "kernel": kernel}
            rows.append({**place, "median_us": time, "of_bandwidth": of_bandwidth})
    return report.compare(rows)  # type: ignore[no-any-return]


def test_goals_that_are_met(report: ModuleType) -> None:
    rows = table(report)
    assert {row["of_bf16"] for row in rows if row["kernel"] == "W4A16"} == {4.0}
    assert all(verdict.met for verdict in report.judge(rows))


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"of_bandwidth": 0.7}, "75 %"),
        ({"times": {"W4A16": 700.0}}, "2 times"),
        ({"times": {"W4A16": 1300.0}}, "never slower"),
        ({"times": {"FP8_DYNAMIC": 800.0}}, "1.6 times"),
        ({"times": {"bf16 torch": 500.0}}, "2 times"),  # the faster baseline counts
    ],
)
def test_goals_that_are_missed(report: ModuleType, changes: dict[str, Any], missed: str) -> None:
    verdicts = [v for v in report.judge(table(report, **changes)) if v.met is False]
    assert any(missed in v.goal.text for v in verdicts)
    assert all(str(v).startswith("missed") and v.worst < v.goal.at_least for v in verdicts)


@pytest.mark.parametrize(("gpu", "met"), [("NVIDIA H100 80GB HBM3", False), ("NVIDIA H200", True)])
def test_each_gpu_has_its_own_goal_at_one_token(report: ModuleType, gpu: str, met: bool) -> None:
    (verdict,) = [v for v in report.judge(table(report, of_bandwidth=0.7), gpu) if "at 1 token" in v.goal.text]
    assert verdict.met is met


def test_the_scratch_pays_from_where_it_stays_faster(tune: ModuleType) -> None:
    assert tune.scratch_from([(128, 1.0, 2.0), (256, 2.0, 1.9), (512, 3.0, 3.1), (1024, 6.0, 5.0), (2048, 9.0, 8.0)]) == 1024
    assert tune.scratch_from([(128, 1.0, 2.0), (2048, 8.0, 9.0)]) is None
    assert tune.cuda_up_to([(1, 2.0, 1.0), (4, 2.0, 1.9), (8, 2.0, 2.1), (16, 2.0, 1.0)]) == 4
    assert tune.cuda_up_to([(1, 1.0, 1.0), (4, 2.0, 1.0)]) == 0
    assert tune.cuda_up_to([(0.5, 2.0, 1.0), (1, 1.0, 1.0)]) == 0.5


def test_goals_without_numbers_are_not_met(report: ModuleType) -> None:
    some = [row for row in table(report) if row["tokens"] != 16 and row["kernel"] != "FP8_DYNAMIC"]
    verdicts = {v.goal.text: v for v in report.judge(some)}
    by_words = {words: v for words in ("75 %", "FP8", "256") for text, v in verdicts.items() if words in text}
    assert by_words["75 %"].met is None and by_words["FP8"].met is None and by_words["256"].met is True
    assert str(by_words["FP8"]).startswith("not measured")
    slow = [{**row, "of_bandwidth": 0.1} for row in some]  # missed where it was measured is missed
    assert next(v for v in report.judge(slow) if "75 %" in v.goal.text).met is False


def test_every_kind_and_range_has_candidates_that_fit(tune: ModuleType) -> None:
    assert set(tune.SCHEMES) == set(tiles.TABLE) and [limit for limit, _ in tune.RANGES] == list(tune.CANDIDATES)
    for kind in tiles.TABLE:
        for limit, rows in tune.RANGES:
            assert rows <= limit
            able = [tile for tile in tune.CANDIDATES[limit] if tune.misfit(kind, tile) is None]
            assert len(set(able)) == len(able) >= 2, (kind, limit)
            for tile in able:
                assert all(size & (size - 1) == 0 for size in (tile.bm, tile.bn, tile.warps)) and tile.bm >= 16
    assert "no 16 rows" in tune.misfit("int4", Tile(16, 64, 8, 3))
    assert "registers" in tune.misfit("block8", Tile(128, 128, 8, 3))
    assert "shared" in tune.misfit("int4", Tile(128, 128, 8, 6))


def test_todays_table_is_among_what_is_swept(tune: ModuleType) -> None:
    for kind, rows in tiles.TABLE.items():
        for limit, tile in rows:
            assert tune.misfit(kind, tile) is None, (kind, limit, tile)


def test_the_sweep_prints_a_table_that_can_be_pasted(tune: ModuleType) -> None:
    slow, fast = Tile(16, 64, 4, 4), Tile(16, 128, 4, 3, fill=8)
    none = tune.Found("int4", 12, Tile(16, 16, 4, 3), 0.0, "out of shared memory")
    found = [tune.Found("int4", 12, slow, 2e-4), tune.Found("int4", 12, fast, 1e-4), none]
    assert "fill=8" not in tune.source_of(found)  # of a sweep that was stopped, what was swept whole
    found.append(tune.Found("int4", float("inf"), slow, 1e-4))
    names: dict[str, Any] = {"Tile": Tile, "inf": float("inf")}
    exec(re.sub(r"^TABLE: .*? = ", "TABLE = ", tune.source_of(found), count=1, flags=re.S), names)
    assert names["TABLE"]["int4"] == ((12, fast), (float("inf"), slow))
    assert {kind: rows for kind, rows in names["TABLE"].items() if kind != "int4"} == {
        kind: rows for kind, rows in tiles.TABLE.items() if kind != "int4"
    }
    assert replace(fast, fill=Tile.fill).fill == 4


def test_a_bench_that_is_stopped_keeps_its_rows(tune: ModuleType, report: ModuleType, tmp_path: Path) -> None:
    bench, path = importlib.import_module("gpu_kernels"), tmp_path / "new" / "gpu.json"
    results = bench.Results(path, "a GPU", report.Peaks(4e12, {"bf16": 8e14}))
    for row in table(report):
        results.add({k: v for k, v in row.items() if k != "of_bf16"})
    results.add({"model": "hunyuan-large", "layer": "moe", "tokens": 1, "kernel": "W8A16", "error": "out of memory"})
    found = json.loads(path.read_text())
    assert (
        found["complete"] is False and found["rows"] == table(report) and [r["kernel"] for r in found["failed"]] == ["W8A16"]
    )
    assert all(goal["met"] for goal in found["goals"])
    results.write(complete=True)
    assert json.loads(path.read_text())["complete"] is True


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(BENCH / "gpu_kernels.py")], capture_output=True, text=True)
    assert done.returncode != 0 and "gpu-bench needs an NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr
