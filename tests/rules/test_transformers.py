"""transformers' own loader reads what quantkit writes, and computes the same logits.

It has no Hunyuan-Large, so the model is a tiny Hunyuan-A13B (`hunyuan_v1_moe`), saved by transformers itself; then every
other architecture. It decompresses experts at load and does not round their activations, so agreement in FP8 is judged
by that rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.model.forward import forward
from quantkit.recipe import Recipe
from tests.conftest import SMALL, byte_tokenizer, random_weights, write_checkpoint
from tests.helpers.architectures import TINY
from tests.helpers.weights import Emulated

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def a13b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.HunYuanMoEV1Config(
        vocab_size=257,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        moe_topk=2,
        tie_word_embeddings=True,
        initializer_range=0.08,
        rope_parameters={"rope_type": "dynamic", "alpha": 1000.0, "rope_theta": 10000.0, "factor": 1.0},
    )
    folder = tmp_path_factory.mktemp("a13b") / "model"
    transformers.HunYuanMoEV1ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


IDS = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(1))


def theirs(folder: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = model(IDS).logits.float()
    return logits


def emulated(folder: Path) -> Tensor:
    model = quantkit.load(folder, kernels="reference")
    *_, last = forward(model.spec, Emulated(model), IDS)
    return model.head(last.hidden)


def relative(a: Tensor, b: Tensor) -> float:
    """Median over tokens of |a - b| / |b|: a token whose expert flips by rounding does not count."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def test_unquantized_logits_agree(a13b: Path) -> None:
    torch.testing.assert_close(quantkit.load(a13b, kernels="reference").logits(IDS), theirs(a13b), atol=1e-4, rtol=1e-4)


INT4 = {**SMALL, "scheme": "W4A16"}
MIXED = {**SMALL, "scheme": "W4A16", "method": "rtn", "attention": "BF16"}


@pytest.mark.parametrize("fields", [INT4, MIXED, {"scheme": "W8A16", "group_size": 32}], ids=["W4A16", "kept", "W8A16"])
def test_integer_weights_agree(fields: dict[str, Any], a13b: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.quantize(a13b, out, Recipe(**fields))
    logits, ours, base = (
        theirs(out),
        quantkit.load(out, kernels="reference").logits(IDS),
        quantkit.load(a13b, kernels="reference").logits(IDS),
    )
    assert relative(emulated(out), logits) < 0.005  # sums in bfloat16, in another order
    assert relative(ours, logits) < 0.02 < relative(ours, base) or fields["scheme"] == "W8A16"


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "FP8_DYNAMIC"])
def test_every_architecture_agrees(name: str, scheme: str, tmp_path: Path) -> None:
    """As exactly as sums in another order allow, and far nearer than the unquantized model."""
    folder = write_checkpoint(tmp_path / "model", TINY[name], random_weights(TINY[name]))
    quantkit.quantize(folder, tmp_path / "out", Recipe(scheme=scheme, method="rtn", group_size=32))
    logits, base = theirs(tmp_path / "out"), quantkit.load(folder, kernels="reference").logits(IDS)
    distance = relative(emulated(tmp_path / "out"), logits)
    assert distance < (1e-4 if scheme == "FP8_DYNAMIC" else 0.01) and distance < relative(logits, base) / 2


KEPT = {"match": "model.layers.[02].self_attn.*", "scheme": "BF16"}
RULES = [KEPT, {"match": "model.layers.1.self_attn.*", "scheme": "W8A16"}]


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_sets_of_layers_are_read(name: str, tmp_path: Path) -> None:
    """What a recipe's rules make of the config: names such as model.layers.(?:0|2).self_attn.q_proj."""
    config = {**TINY[name], "num_hidden_layers": 4}
    folder = write_checkpoint(tmp_path / "model", config, random_weights(config))
    recipe = {"scheme": "W4A16", "method": "rtn", "group_size": 32, "rules": RULES}
    quantkit.quantize(folder, tmp_path / "out", Recipe.of(recipe))
    assert "(?:0|2)" in (tmp_path / "out" / "config.json").read_text()
    logits, base = theirs(tmp_path / "out"), quantkit.load(folder, kernels="reference").logits(IDS)
    distance = relative(emulated(tmp_path / "out"), logits)
    assert distance < 0.01 and distance < relative(logits, base) / 2


def test_fp8_dynamic_agrees(a13b: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.quantize(a13b, out, Recipe(scheme="FP8_DYNAMIC"))
    logits, ours = theirs(out), quantkit.load(out, kernels="reference").logits(IDS)
    assert relative(emulated(out), logits) < 1e-4
    assert relative(ours, logits) < relative(ours, quantkit.load(a13b, kernels="reference").logits(IDS))


def test_what_was_gptq_agrees(a13b: Path, tmp_path: Path) -> None:
    """Float16 scales, as GPTQ has them, in compressed-tensors: loaded as well as bfloat16 ones (the tolerance above)."""
    quantkit.quantize(a13b, tmp_path / "ours", Recipe(**MIXED))
    quantkit.convert(tmp_path / "ours", tmp_path / "gptq", "gptq")
    quantkit.convert(tmp_path / "gptq", tmp_path / "out", "compressed-tensors")
    assert torch.equal(emulated(tmp_path / "out"), emulated(tmp_path / "ours"))
    assert relative(emulated(tmp_path / "out"), theirs(tmp_path / "out")) < 0.005
