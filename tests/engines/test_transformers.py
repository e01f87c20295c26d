"""What transformers makes of every scheme, for docs/engine-results.md. `tests/rules/test_transformers.py` holds it to more
where it is said to load; here the judge is that of vLLM's tests, KL(transformers || quantkit), in float32 on both sides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import quantkit
from quantkit.engines.held import Deployment
from quantkit.engines.rules import Verdict
from quantkit.engines.transformers_model import register
from quantkit.model.forward import forward
from quantkit.scheme import BF16
from tests.engines.conftest import Results
from tests.engines.judge import LIMIT, PROMPTS, divergence, logprobs
from tests.engines.models import CASES, MODELS, damaged, make_model, recipe, said
from tests.helpers.paths import ROOT
from tests.helpers.weights import Emulated

# Of constraints.txt; `make engine-test` runs this file with a newer one too.
PINNED = f"transformers=={transformers.__version__}" in (ROOT / "constraints.txt").read_text().splitlines()
ENGINE = "transformers" if PINNED else "newer transformers"
# A module whose experts are one tensor is read through a conversion with departures of its own.
FUSED = [name for name in MODELS if name not in ("Hunyuan-Large", "Llama 3.1")]


def theirs(folder: Path) -> Tensor:
    register()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(PROMPTS).logits
    return logits.float().log_softmax(-1)[:, :-1]


def like_theirs(folder: Path) -> Tensor:
    """quantkit's reference, with the departures that transformers makes in its fused experts and DeepSeek's kv_b_proj."""
    model = quantkit.load(folder, kernels="reference")
    *_, last = forward(model.spec, Emulated(model), PROMPTS)
    return model.head(last.hidden).log_softmax(-1)[:, :-1]


@pytest.mark.parametrize(("name", "column"), CASES)
def test_loads(name: str, column: str, results: Results, tmp_path: Path) -> None:
    """It does what the rules say, and what it loads is right."""
    results.engine(ENGINE, transformers.__version__)
    folder = make_model(name, tmp_path / "model")
    if column != BF16:
        quantkit.quantize(folder, tmp_path / "out", recipe(column))
        folder = tmp_path / "out"
    verdict = said(f"transformers=={transformers.__version__}", name, column, Deployment(hardware="cpu"))
    if verdict is Verdict.REFUSED:
        with pytest.raises(RuntimeError) as error:
            theirs(folder)
        results.refused(ENGINE, name, column, str(error.value))
        return
    assert verdict is Verdict.LOADS
    logits = theirs(folder)
    kl = divergence(logits, logprobs(folder, "reference"))
    wrong = divergence(logits, logprobs(damaged(folder, tmp_path / "damaged"), "reference"))
    results.works(ENGINE, name, column, kl, wrong)
    like = divergence(logits, like_theirs(folder)) if name in FUSED else kl
    assert like < LIMIT and wrong > max(2 * LIMIT, 3 * kl), (like, kl, wrong)
