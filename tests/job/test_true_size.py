"""Planning models of true size, from headers alone: how many parameters, how much processor time and memory."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.model.registry import build_spec
from tests.conftest import byte_tokenizer
from tests.helpers.architectures import RELEASED, SMALLER
from tests.helpers.sparse import write_sparse

# As stated with the released weights, which are counted to the last one, or in the model's paper or card.
PUBLISHED = {
    "hunyuan-large": 389e9,
    "hunyuan-a13b": 80e9,
    "mixtral-8x22b": 140_620_634_112,
    "deepseek-v2": 235_741_434_880,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mixtral-8x7b": 46_702_792_704,
    "deepseek-v2-lite": 15_706_484_224,
    "qwen3-30b-a3b": 30_532_122_624,
}
EVERY = {**RELEASED, **SMALLER}
PLAN = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
PLAN += "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
PLAN += "print(used.ru_utime + used.ru_stime, used.ru_maxrss, file=sys.stderr)"


FIRST = "hunyuan-large"


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in RELEASED if name != FIRST)]
)
def test_plans_in_seconds(name: str, tmp_path: Path) -> None:
    total = write_sparse(tmp_path / "model", RELEASED[name])
    byte_tokenizer().save(str(tmp_path / "model" / "tokenizer.json"))
    assert sum(f.stat().st_blocks * 512 for f in (tmp_path / "model").iterdir()) < 20e6  # holes take no room
    command = [sys.executable, "-m", "quantkit.cli", "quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", PLAN, *command, "--dry-run", "--json", "--group-size", "32"],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, peak = float(done.stderr.split()[-2]), int(done.stderr.split()[-1]) * 1024
    plan = json.loads(done.stdout)
    exact = isinstance(PUBLISHED[name], int)
    assert plan["parameters"] == PUBLISHED[name] if exact else round(plan["parameters"] / 1e9) * 1e9 == PUBLISHED[name]
    assert plan["source_bytes"] == total and plan["output_bytes"] < total / 2 and plan["calibrated"]
    assert seconds < 10 and peak < 500e6, (seconds, peak)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "hunyuan-large"])
def test_as_many_parameters_as_transformers_class(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = copy.deepcopy(EVERY[name])  # transformers writes into what it is given
    model_class = getattr(transformers, config.pop("architectures")[0])
    del config["model_type"]
    with torch.device("meta"):
        model = model_class(model_class.config_class(**config))
    assert build_spec(EVERY[name], name).parameters == sum(p.numel() for p in model.parameters())
    if isinstance(PUBLISHED[name], int):
        assert build_spec(EVERY[name], name).parameters == PUBLISHED[name]


def test_hunyuan_large_by_hand() -> None:
    h, size, kv, vocab = 6400, 18304, 8 * 80, 129024
    self_layer, cross_layer = 2 * h * h + 2 * h * kv, 2 * h * h
    common = 17 * 3 * h * size + 16 * h + 2 * h + 2 * 80  # 16 experts and a shared one, router, norms, norms of heads
    assert build_spec(RELEASED["hunyuan-large"], "").parameters == (
        vocab * h + h + 32 * (self_layer + cross_layer) + 64 * common
    )
