"""What bench/gpu_kernels.py times, each called once on a tiny model: in the interpreter and on a GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from quantkit.kernels.triton import tiles
from quantkit.scheme import PRESETS

BENCH = Path(__file__).resolve().parents[2] / "bench"


def test_every_run_computes(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    runs = importlib.import_module("gpu_runs")
    monkeypatch.setattr(runs, "DEVICE", device)
    tiny = runs.Model(hidden=256, inner=256, experts=2, top_k=1)
    for make, kernels in ((runs.linears, 10), (runs.layers, 10)):
        seen = list(make(tiny, (2,), tuple(PRESETS), None))
        assert len({run.kernel for run in seen}) == kernels
        for run in seen:
            out = run.call()
            assert out.shape == (run.tokens, 256) and bool(out.isfinite().all()), run.kernel
            assert run.moved > 0 and run.operations > 0
        dense, four = (next(run for run in seen if run.kernel == name) for name in ("bf16", "W4A16"))
        assert 3.5 < dense.moved / four.moved < 4  # INT4 with a scale per 128


def test_the_sweep_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    runs, tune = importlib.import_module("gpu_runs"), importlib.import_module("gpu_tune")
    monkeypatch.setattr(tune, "DEVICE", device)
    monkeypatch.setattr(runs, "DEVICE", device)
    monkeypatch.setitem(runs.MODELS, "hunyuan-large", runs.Model(128, 128, 1, 1))
    monkeypatch.setattr(tune, "RANGES", ((12, 1),))
    monkeypatch.setattr(tune, "measure", lambda call, rounds, waits=False: ([float(call().shape[0])] * rounds, 0.0))
    found = list(tune.sweep("int4", 2))
    assert [one.tile for one in found] == list(tune.CANDIDATES[12]) and {one.seconds for one in found} == {1.0}
    assert "TABLE" in tune.source_of(found) and len(tiles.TABLE) == 4
