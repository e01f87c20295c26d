"""A real vLLM on the CPU serves what quantkit writes, and means the same by it.

Both engines give log-probabilities for every position of a few prompts; the judge is KL(vLLM || quantkit), in nats a token.
What quantkit's rules say of a model is what the engine does; what a CPU has no kernel for counts as "needs a GPU".
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.engines.held import Deployment
from quantkit.engines.rules import Verdict
from quantkit.recipe import Recipe
from quantkit.scheme import BF16
from tests.engines.conftest import Results, Vllm
from tests.engines.judge import LIMIT, PROMPTS, divergence, kernels_like_vllm, logprobs
from tests.engines.models import CASES, damaged, make_model, negative_scales, recipe, said

# Inputs of FP8_DYNAMIC linears and of INT4 experts are both rounded there, and those of DeepSeek's kv_b_proj are not.
LIMITS = {"Experts W4A16, rest FP8_DYNAMIC": 0.02}
# What it says where it has no kernel.
NO_KERNEL = (
    "WNA16",
    "Int8 MoE backend",
    "static_scaled_fp8_quant",
    "ScaledMM linear layer",
    "Unsupported FP8 MoE backend",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    return {}


def checkpoint(made: dict[tuple[str, str], Path], root: Path, name: str, column: str) -> Path:
    """The model of that name in that recipe, made once."""
    if (name, BF16) not in made:
        made[name, BF16] = make_model(name, root / "model")
    if (name, column) not in made:
        quantkit.quantize(made[name, BF16], root / "out", recipe(column))
        made[name, column] = root / "out"
    return made[name, column]


@pytest.mark.parametrize(("name", "column"), CASES)
def test_serves(
    name: str, column: str, made: dict[tuple[str, str], Path], vllm: Vllm, results: Results, tmp_path: Path
) -> None:
    """It does what the rules say, and what it serves is right."""
    folder = checkpoint(made, tmp_path, name, column)
    assert column != "W4A16" or negative_scales(folder)
    answer = vllm.serve(folder, PROMPTS, tmp_path / "answer")
    verdicts = [said(f"vllm=={vllm.version}", name, column, Deployment(hardware=h, eager=True)) for h in vllm.kinds]
    happened = Verdict.REFUSED if answer.error else Verdict.LOADS
    if len(verdicts) > 1 and happened not in verdicts and Verdict.UNKNOWN in verdicts:
        pytest.skip(f"zentorch beside AMX: {happened.value}, of which no rule speaks")
    verdict = happened if happened in verdicts else verdicts[0]
    if answer.error:
        assert verdict is Verdict.REFUSED and any(words in answer.error for words in NO_KERNEL), (verdict, answer.error)
        results.needs_gpu("vllm", name, column, answer.error)
        return
    assert verdict is Verdict.LOADS, f"it runs: {verdict}"
    theirs, kernels = torch.stack(answer.logprobs), kernels_like_vllm(column)
    kl = divergence(theirs, logprobs(folder, kernels))
    wrong = divergence(theirs, logprobs(damaged(folder, tmp_path / "damaged"), kernels))
    results.works("vllm", name, column, kl, wrong)
    assert kl < LIMITS.get(column, LIMIT), f"KL {kl:.4f}"
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
