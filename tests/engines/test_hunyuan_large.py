"""Hunyuan-Large in vLLM through quantkit's plugin: the bundled, trained model, and what its cache holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

import quantkit
from quantkit.recipe import Recipe
from quantkit.scheme import BF16
from tests.engines.conftest import Answer, Vllm
from tests.engines.judge import BUNDLED, LIMIT, PROMPTS, TEXTS, divergence, kernels_like_vllm, logprobs
from tests.engines.models import make_model

NEW = 24


@pytest.fixture(scope="module", params=[BF16, "W4A16", "W8A8"])
def bundled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    scheme: str = request.param
    if scheme == BF16:
        return scheme, BUNDLED
    out = tmp_path_factory.mktemp("bundled") / scheme
    quantkit.quantize(BUNDLED, out, Recipe(scheme=scheme, method="rtn"))
    return scheme, out


def prompts() -> Tensor:
    """int64 [n, time], cut to the shortest."""
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    rows = [tokenizer.encode(text).ids for text in TEXTS]
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


def test_bundled_model(bundled: tuple[str, Path], vllm: Vllm, tmp_path: Path) -> None:
    """Greedy tokens: given the text so far, quantkit chooses the same at 19 of 20 positions at least, and where not, the two
    candidates lie within 0.3 nats of each other. Both compute in bfloat16, in another order: rounding decides near-ties,
    and now and then the expert of a token. (On the machine of the results: BF16 and W4A16 all 72, W8A8 70.)"""
    scheme, folder = bundled
    ids = prompts()
    answer = vllm.serve(folder, ids, tmp_path / "answer", new_tokens=NEW)
    assert answer.error is None, answer.error
    model = quantkit.load(folder, kernels=kernels_like_vllm(scheme))
    chosen = torch.tensor(answer.report["greedy"])
    known = model.logits(torch.cat([ids, chosen], dim=1)).log_softmax(-1)
    of_prompt, of_answer = known[:, : ids.shape[1] - 1], known[:, ids.shape[1] - 1 : -1]
    assert divergence(torch.stack(answer.logprobs), of_prompt) < LIMIT
    gap = of_answer.amax(-1) - of_answer.gather(-1, chosen[..., None])[..., 0]
    assert float((gap > 0).float().mean()) <= 0.05 and float(gap.max()) < 0.3, gap[gap > 0]
    assert len(chosen.unique()) > NEW / 2  # of a text, not of a repeated token


def cache_bytes_per_token(answer: Answer) -> float:
    return float(answer.report["cache_bytes"]) / (answer.report["blocks"] * answer.report["block_size"])


def test_cache_is_half(vllm: Vllm, tmp_path: Path) -> None:
    """Beside Hunyuan-A13B with attention of the same size, which shares nothing: half the bytes a token, and twice the
    blocks."""
    answers = {
        name: vllm.serve(make_model(name, tmp_path / name), PROMPTS, tmp_path / f"{name}-answer")
        for name in ("Hunyuan-Large", "Hunyuan-A13B")
    }
    large, a13b = answers.values()
    assert large.error is None and a13b.error is None
    layers, kv_heads, head_dim = 4, 2, 64
    assert cache_bytes_per_token(a13b) == layers * 2 * kv_heads * head_dim * 2
    assert cache_bytes_per_token(large) == cache_bytes_per_token(a13b) / 2
    assert large.report["blocks"] == 2 * a13b.report["blocks"]
    attention = "model.layers.{}.self_attn.attn".format
    assert large.report["shared"] == {attention(1): attention(0), attention(3): attention(2)}
    address = large.report["cache_of"]
    assert address[attention(1)] == address[attention(0)] != address[attention(2)] == address[attention(3)]
    assert not a13b.report["shared"]


def test_two_devices(vllm: Vllm, tmp_path: Path) -> None:
    """Tensor parallel over two processes. No kernel that vLLM has for a CPU takes a part of the experts whole."""
    folder = make_model("Hunyuan-Large", tmp_path / "model")
    parallel = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    answer = vllm.serve(folder, PROMPTS, tmp_path / "answer", **parallel)
    assert answer.error is None, answer.error
    assert divergence(torch.stack(answer.logprobs), logprobs(folder, "auto")) < LIMIT


@pytest.mark.parametrize(
    "changes", [{}, {"cla_share_factor": 4}, {"use_cla": False}, {"moe_topk": 2}, {"use_qk_norm": False}], ids=str
)
def test_every_switch(changes: dict[str, Any], vllm: Vllm, tmp_path: Path) -> None:
    folder = make_model("Hunyuan-Large", tmp_path / "model", **changes)
    answer = vllm.serve(folder, PROMPTS, tmp_path / "answer")
    assert answer.error is None, answer.error
    assert divergence(torch.stack(answer.logprobs), logprobs(folder, "auto")) < LIMIT


def test_a13b_that_is_spelled_hunyuan(vllm: Vllm, tmp_path: Path) -> None:
    """As its quantized releases are: the plugin must not take it for Hunyuan-Large."""
    folder = make_model("Hunyuan-A13B", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "hunyuan"}))
    answer = vllm.serve(folder, PROMPTS, tmp_path / "answer")
    assert answer.error is None, answer.error
    assert divergence(torch.stack(answer.logprobs), logprobs(folder, "auto")) < LIMIT


def test_unknown_value_is_refused(vllm: Vllm, tmp_path: Path) -> None:
    folder = make_model("Hunyuan-Large", tmp_path / "model")
    broken = shutil.copytree(folder, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    answer = vllm.serve(broken, PROMPTS, tmp_path / "answer")
    assert answer.error and "hidden_act" in answer.error, answer.error
