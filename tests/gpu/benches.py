"""What bench/gpu_kernels.py times, each called once on a tiny model: in the interpreter and on a GPU."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from quantkit.kernels.triton import tiles
from tests.helpers.kernels import ON_GPU, close, poison
from tests.helpers.paths import ROOT

BENCH = ROOT / "bench"


def test_every_run_computes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    runs = importlib.import_module("gpu_runs")
    monkeypatch.setattr(runs, "DEVICE", device)
    tiny = runs.Model(hidden=256, inner=256, experts=2, top_k=1)
    for make, kernels in ((runs.linears, 10), (runs.layers, 11)):
        seen = list(make(tiny, (2,), tuple(ON_GPU), None))
        assert len({run.kernel for run in seen}) == kernels
        for run in seen:
            out = run.call()
            assert out.shape == (run.tokens, 256) and bool(out.isfinite().all()), run.kernel
            assert run.moved > 0 and run.operations > 0
        dense, four = (next(run for run in seen if run.kernel == name) for name in ("bf16", "W4A16"))
        assert 3.5 < dense.moved / four.moved < 4  # INT4 with a scale per 128


@pytest.mark.parametrize(("tokens", "top_k", "inner"), [(3, 2, 64), (1, 1, 1280)])  # the second splits K
def test_the_fused_baseline_is_the_layer(
    tokens: int, top_k: int, inner: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    runs, dense = importlib.import_module("gpu_runs"), importlib.import_module("gpu_dense")
    poison(monkeypatch)
    gate_up, down = torch.randn(3, 2 * inner, 64).bfloat16() / 8, torch.randn(3, 64, inner).bfloat16() / inner**0.5
    x, ids, router = torch.randn(tokens, 64).bfloat16(), torch.rand(tokens, 3).topk(top_k).indices, torch.rand(tokens, top_k)
    exact = torch.zeros(tokens, 64, dtype=torch.float64)
    for token, choice in ((t, c) for t in range(tokens) for c in range(top_k)):
        gate, up = (gate_up[ids[token, choice]].double() @ x[token].double()).chunk(2)
        act = torch.nn.functional.silu(gate) * up
        exact[token] += router[token, choice] * (down[ids[token, choice]].double() @ act)
    close(dense.moe(x, ids, router, gate_up, down), runs.dense_moe(x, ids, router, gate_up, down), exact)


def test_the_whole_command(device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`--quick`, then `--tune --apply`, on a tiny model and a clock that stands still: every row is in its file, and the
    table of tiles that was swept is the one that is written."""
    monkeypatch.syspath_prepend(str(BENCH))
    runs, tune, bench, keep = (importlib.import_module(f"gpu_{name}") for name in ("runs", "tune", "kernels", "keep"))
    for module in (runs, tune, bench):
        monkeypatch.setattr(module, "DEVICE", device)
    for module in (tune, bench):
        monkeypatch.setattr(module, "measure", lambda call, rounds, waits=False: ([float(call().shape[0])] * rounds, 0.0))
    monkeypatch.setattr(bench, "peaks", lambda rounds: bench.gpu_report.Peaks(4e12, {"bf16": 8e14, "fp8": 16e14}))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(bench.build, "library", lambda: "not built")
    monkeypatch.setitem(runs.MODELS, "hunyuan-large", runs.Model(128, 128, 2, 1))
    few = {16: tune.CANDIDATES[16][:2], float("inf"): tune.CANDIDATES[float("inf")][:1]}
    monkeypatch.setattr(tune, "RANGES", ((16, 1), (float("inf"), 2)))
    monkeypatch.setattr(tune, "CANDIDATES", few)
    monkeypatch.setattr(tune, "CROSSING", (3, 4))
    path, table = tmp_path / "out" / "goals.json", tmp_path / "tiles.py"
    done = CliRunner().invoke(bench.main, ["--quick", "--tokens", "1", "--tokens", "4", "--out", str(path)])
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    kernels = ["bf16", "bf16 torch", "W4A16", "W4A16 triton", "W4A16 scratch", "FP8_DYNAMIC"]
    assert found["complete"] and [r["kernel"] for r in found["rows"]] == [name for name in kernels for _ in (1, 4)]
    shutil.copy(keep.TILES, table)
    monkeypatch.setattr(bench, "TILES", table)
    done = CliRunner().invoke(bench.main, ["--tune", "--apply", "--kind", "int4", "--out", str(tmp_path / "tune.json")])
    assert done.exit_code == 0, done.output
    swept = json.loads((tmp_path / "tune.json").read_text())
    assert len(swept["tried"]) == 3 and len(swept["crossover"]) == 2 and swept["table"] in table.read_text()


def test_the_sweep_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    runs, tune = importlib.import_module("gpu_runs"), importlib.import_module("gpu_tune")
    monkeypatch.setattr(tune, "DEVICE", device)
    monkeypatch.setattr(runs, "DEVICE", device)
    monkeypatch.setitem(runs.MODELS, "hunyuan-large", runs.Model(128, 128, 1, 1))
    monkeypatch.setattr(tune, "RANGES", ((16, 1),))
    monkeypatch.setattr(tune, "measure", lambda call, rounds, waits=False: ([float(call().shape[0])] * rounds, 0.0))
    found = list(tune.sweep("int4", 2))
    assert [one.tile for one in found] == list(tune.CANDIDATES[16]) and {one.seconds for one in found} == {1.0}
    assert "TABLE" in tune.source_of(found) and len(tiles.TABLE) == 4
