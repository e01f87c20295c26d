"""One vLLM worker for all tests of this folder (`make engine-test`), and its answers, kept for docs/engine-results.md."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.paths import ROOT

RESULTS = ROOT / "bench" / "results" / "engines.json"
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
}


def environment() -> Path:
    """The virtual environment that has vLLM."""
    folder = Path(os.environ.get("QUANTKIT_VLLM", ROOT / ".vllm"))
    if not (folder / "bin" / "python").exists():
        pytest.fail(f"{folder} has no python: run 'make engine-test', or set QUANTKIT_VLLM to an environment with vLLM")
    return folder


@dataclass
class Answer:
    """What vLLM made of a model: an error, or log-probabilities of each prompt and the rest of vllm_worker's report."""

    error: str | None
    logprobs: list[Tensor] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)


class Vllm:
    def __init__(self, python: Path) -> None:
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("vllm_worker.py")],
            env=os.environ | SETTINGS,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version, self.platform = self._answer("ready").split()

    @property
    def hardware(self) -> str:
        """As `--hardware` names it."""
        if self.platform.startswith("Zen"):
            return "zen"
        return "amx" if torch.cpu._is_amx_tile_supported() else "cpu"

    @property
    def kinds(self) -> tuple[str, ...]:
        """`hardware`, and what it is besides: zentorch beside AMX takes kernels of both, of which no rule speaks."""
        return ("zen", "amx") if self.hardware == "zen" and torch.cpu._is_amx_tile_supported() else (self.hardware,)

    def _answer(self, start: str) -> str:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(start):
                return line.removeprefix(start).strip()
        raise RuntimeError("vLLM's process ended; run tests/engines/vllm_worker.py by hand to see why")

    def serve(self, model: Path, prompts: Tensor, out: Path, new_tokens: int = 1, **options: Any) -> Answer:
        """prompts: int64 [n, time]. out: start of the names of the files that it leaves."""
        assert self.process.stdin
        out.with_suffix(".json").unlink(missing_ok=True)
        job = {
            "model": str(model),
            "prompts": prompts.tolist(),
            "new_tokens": new_tokens,
            "out": str(out),
            "options": options,
        }
        print(json.dumps(job), file=self.process.stdin, flush=True)
        self._answer("done")
        if not (path := out.with_suffix(".json")).exists():
            return Answer("the process died")
        report = json.loads(path.read_text())
        if "error" in report:
            return Answer(report["error"])
        arrays = np.load(out.with_suffix(".npz"))
        return Answer(None, [torch.from_numpy(arrays[str(i)]) for i in range(len(prompts))], report)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Results:
    """Cells of docs/engine-results.md: engine -> model -> scheme. What this run did not test keeps its value."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"versions": {}, "cells": {}}

    def engine(self, name: str, version: str) -> None:
        self.kept["versions"][name] = version

    def works(self, engine: str, model: str, scheme: str, kl: float, damaged: float) -> None:
        """damaged: the KL to the same model with two MLPs exchanged."""
        self._set(engine, model, scheme, {"status": "works", "kl": round(kl, 6), "damaged": round(damaged, 4)})

    def needs_gpu(self, engine: str, model: str, scheme: str, why: str) -> None:
        self._set(engine, model, scheme, {"status": "needs a GPU", "why": why.splitlines()[0]})

    def refused(self, engine: str, model: str, scheme: str, why: str) -> None:
        self._set(engine, model, scheme, {"status": "refused", "why": why.splitlines()[0]})

    def _set(self, engine: str, model: str, scheme: str, cell: dict[str, Any]) -> None:
        self.kept["cells"].setdefault(engine, {}).setdefault(model, {})[scheme] = cell

    def write(self) -> None:
        RESULTS.write_text(json.dumps(self.kept, indent=1, sort_keys=True) + "\n")


@pytest.fixture(scope="session")
def results() -> Iterator[Results]:
    kept = Results()
    yield kept
    kept.write()


@pytest.fixture(scope="session")
def vllm(results: Results) -> Iterator[Vllm]:
    engine = Vllm(environment() / "bin" / "python")
    results.engine("vllm", f"{engine.version} on the CPU ({engine.platform})")
    yield engine
    engine.stop()
