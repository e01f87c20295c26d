"""A real vLLM on the CPU serves what quantkit writes, and means the same by it.

Both engines give log-probabilities for every position of a few prompts; the judge is KL(vLLM || quantkit), in nats a token.
What a CPU cannot run must fail with the message that is known, and counts as "needs a GPU".
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.runtime import Kernels
from quantkit.scheme import BF16, PRESETS, Recipe
from tests.engines.conftest import Results, Vllm
from tests.engines.models import MODELS, damaged, make_model

PROMPTS = torch.randint(1, 257, (4, 96), generator=torch.Generator().manual_seed(1))
LIMIT = 0.01
# Which schemes no kernel of vLLM runs on a CPU, and what it says then. Routed experts in INT4 and INT8 are zentorch's.
ON_GPU_ONLY = {
    "W8A16": "WNA16",
    "FP8": "static_scaled_fp8_quant",
    "FP8_BLOCK": "ScaledMM linear layer",
}
EXPERTS_ON_GPU_ONLY = {**ON_GPU_ONLY, "FP8_DYNAMIC": "Unsupported FP8 MoE backend", "W4A16_ASYM": "WNA16"}


def kernels_like_vllm(scheme: str) -> Kernels:
    """zentorch multiplies INT4 experts by inputs rounded to INT8."""
    return "w4a8" if scheme == "W4A16" else "auto"


def logprobs(folder: Path, kernels: Kernels) -> Tensor:
    return quantkit.load(folder, kernels=kernels).logits(PROMPTS).log_softmax(-1)[:, :-1]


def divergence(p: Tensor, q: Tensor) -> float:
    """Mean KL(p || q) over positions; both log-probabilities [..., vocab]."""
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    return {}


def checkpoint(made: dict[tuple[str, str], Path], root: Path, name: str, scheme: str) -> Path:
    """The model of that name in that scheme, made once."""
    if (name, BF16) not in made:
        made[name, BF16] = make_model(name, root / "model")
    if (name, scheme) not in made:
        quantkit.quantize(made[name, BF16], root / scheme, Recipe(scheme=scheme, method="rtn"))
        made[name, scheme] = root / scheme
    return made[name, scheme]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("scheme", [BF16, *PRESETS])
def test_serves(
    name: str, scheme: str, made: dict[tuple[str, str], Path], vllm: Vllm, results: Results, tmp_path: Path
) -> None:
    folder = checkpoint(made, tmp_path, name, scheme)
    answer = vllm.serve(folder, PROMPTS, tmp_path / "answer")
    message = (ON_GPU_ONLY if name == "Llama 3.1" else EXPERTS_ON_GPU_ONLY).get(scheme)
    if message:
        assert answer.error and message in answer.error, answer.error or "it runs now: claim it"
        results.needs_gpu("vllm", name, scheme, answer.error)
        return
    assert answer.error is None, answer.error
    theirs, kernels = torch.stack(answer.logprobs), kernels_like_vllm(scheme)
    kl = divergence(theirs, logprobs(folder, kernels))
    wrong = divergence(theirs, logprobs(damaged(folder, tmp_path / "damaged"), kernels))
    results.works("vllm", name, scheme, kl, wrong)
    assert kl < LIMIT, f"KL {kl:.4f}"
    assert wrong > max(2 * LIMIT, 3 * kl), f"two MLPs that change places give no more than {wrong:.4f}: this shows nothing"


def test_sets_of_layers_are_read(vllm: Vllm, tmp_path: Path) -> None:
    """Rules of a recipe: names in the config such as model.layers.(?:0|2).self_attn.q_proj."""
    model = make_model("Llama 3.1", tmp_path / "model")
    rules = [
        {"match": "model.layers.[02].self_attn.*", "scheme": "BF16"},
        {"match": "model.layers.[01].*", "scheme": "W8A8"},
    ]
    quantkit.quantize(model, tmp_path / "out", Recipe.of({"scheme": "W4A16", "method": "rtn", "rules": rules}))
    assert "(?:0|2)" in (tmp_path / "out" / "config.json").read_text()
    answer = vllm.serve(tmp_path / "out", PROMPTS, tmp_path / "answer")
    assert answer.error is None, answer.error
    assert divergence(torch.stack(answer.logprobs), logprobs(tmp_path / "out", "w4a8")) < LIMIT
