"""docs/add-a-model.md, done: with one short file and one row a model runs, is calibrated, evaluated and served."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import quantkit
from quantkit.checkpoint.verify import verify
from quantkit.cli import main
from quantkit.engines import transformers as engine
from quantkit.errors import CheckpointError, ConfigError
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.registry import ARCHITECTURES, Architecture, build_spec
from quantkit.recipe import Recipe
from tests.conftest import random_weights, write_checkpoint
from tests.helpers.models import qwen3_dense
from tests.helpers.paths import ROOT

transformers = pytest.importorskip("transformers")
IDS = torch.randint(1, 257, (2, 96), generator=torch.Generator().manual_seed(1))
TOLERANCE = 2e-4  # that of tests/model/test_architectures.py
QWEN3_8B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
TINY = {
    **QWEN3_8B,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rope_theta": 10000.0,
    "vocab_size": 257,
}


@pytest.fixture(scope="module", autouse=True)
def added() -> Iterator[None]:
    """The one row."""
    assert "qwen3" not in ARCHITECTURES, "choose another model: this one is quantkit's own by now"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "qwen3", Architecture(qwen3_dense.build, ("Qwen3ForCausalLM",)))
        yield


@pytest.fixture(scope="module")
def model(added: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3") / "model"
    return write_checkpoint(folder, TINY, random_weights(TINY))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(random.__file__).read_text("utf-8"))
    return str(path)


@pytest.fixture(scope="module")
def out(model: Path, text: str) -> Path:
    """INT4 by GPTQ on calibration text."""
    recipe = Recipe(scheme="W4A16", group_size=32, samples=16, seq_len=64, calibration=text)
    record = quantkit.quantize(model, model.parent / "out", recipe)
    assert record["fallbacks"] == {} and {o["method"] for o in record["linears"].values()} == {"gptq"}
    return model.parent / "out"


def theirs(folder: Path) -> Tensor:
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert type(found).__name__ == "Qwen3ForCausalLM"
    with torch.no_grad():
        logits: Tensor = found(IDS).logits.float()
    return logits


def relative(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def test_it_is_one_short_file_which_the_docs_show() -> None:
    source = Path(qwen3_dense.__file__).read_text("utf-8")
    assert len(source.splitlines()) < 60
    shown = "".join(f"    {line}".rstrip() + "\n" for line in source.splitlines())
    assert shown in (ROOT / "docs" / "add-a-model.md").read_text("utf-8")


def test_it_computes_what_transformers_does(model: Path) -> None:
    ours, expected = quantkit.load(model, kernels="reference"), theirs(model)
    torch.testing.assert_close(ours.logits(IDS), expected, atol=TOLERANCE, rtol=0)
    cache = Cache(KVFormat.FLOAT32)
    parts = [ours.logits(part, cache) for part in IDS.split([80, 1, 15], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=TOLERANCE, rtol=0)


def test_the_check_notices_norms_after_rope(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, right = theirs(model), qwen3_dense.gqa
    monkeypatch.setattr(qwen3_dense, "gqa", lambda c, index, norms, norm_first: right(c, index, norms))
    assert (quantkit.load(model, kernels="reference").logits(IDS) - expected).abs().max() > 50 * TOLERANCE


def test_the_check_notices_norms_that_are_left_out(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = qwen3_dense.gqa
    monkeypatch.setattr(qwen3_dense, "gqa", lambda c, index, norms, norm_first: right(c, index))
    with pytest.raises(CheckpointError, match="k_norm.weight' is unexpected"):
        quantkit.load(model, kernels="reference")


def test_the_released_one_has_its_8_billion_parameters() -> None:
    assert build_spec(QWEN3_8B, "test").parameters == 8_190_735_360


@pytest.mark.parametrize("value", [{"use_sliding_window": True}, {"head_dim": None}, {"attention_bias": True}, {"new": 1}])
def test_what_it_cannot_express_is_refused(value: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"'{next(iter(value))}' is"):
        build_spec({**TINY, **value}, "test")


def test_it_is_calibrated_verified_evaluated_and_generates(model: Path, out: Path, text: str) -> None:
    checked = verify(out, model)
    assert checked.linears == 3 * 7 and not checked.not_checked
    report = quantkit.evaluate(out, model, text, seq_len=32, windows=4)
    assert 0 < report["kl"]["mean"] < 0.5
    loaded = quantkit.load(out, kernels="reference")
    generated = loaded.generate(IDS[:, :6], 8, kv_format=KVFormat.FLOAT32)
    assert torch.equal(generated[:, 6:], loaded.logits(generated)[:, 5:-1].argmax(-1))


def test_transformers_serves_it(model: Path, out: Path) -> None:
    served, ours, base = (theirs(out), *(quantkit.load(x, kernels="reference").logits(IDS) for x in (out, model)))
    assert relative(ours, served) < 0.02 < relative(base, served) / 2


def verdict(model: Path, engine: str) -> tuple[str, list[str]]:
    command = ["plan", str(model), "--group-size", "32", "--engine", engine, "--json"]
    found = json.loads(CliRunner().invoke(main, command).stdout)["engine"]
    return found["verdict"], [finding["rule"] for finding in found["model"]]


def test_engines_are_asked_and_none_is_said_to_run_what_nobody_tried(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "sglang", "transformers"):
        answer, rules = verdict(model, name)
        assert answer == "does not load" and rules[0] == f"{name}.architecture"
    monkeypatch.setitem(engine.ARCHITECTURES, "qwen3", "Qwen3ForCausalLM")  # as the test above tried
    assert verdict(model, "transformers")[0] == "loads"
