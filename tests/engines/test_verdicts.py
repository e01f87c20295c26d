"""What quantkit's rules say beside what vLLM does, where a scheme alone does not decide: caches, processes, formats,
damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantkit
from quantkit.checkpoint.reader import INDEX
from quantkit.engines.assess import assess
from quantkit.engines.held import Deployment
from quantkit.engines.registry import engine_named
from quantkit.engines.replay import replay
from quantkit.engines.rules import Verdict
from quantkit.model.registry import build_spec
from quantkit.recipe import Recipe
from tests.engines.conftest import Vllm
from tests.engines.judge import LIMIT, PROMPTS, divergence, logprobs
from tests.engines.models import make_model

FP8_CACHE = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "tensor"}
PROCESSES = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def kept(folder: Path, **deployment: Any) -> Verdict:
    """What the rules say of an unquantized model."""
    config = json.loads((folder / "config.json").read_text())
    spec = build_spec(config, str(folder))
    schemes = {ref.key: None for ref in spec.linears()}
    return assess(engine_named("vllm==0.32"), spec, config, schemes, {}, Deployment(**deployment)).verdict


def test_rotary_of_latent_attention_without_yarn(vllm: Vllm, tmp_path: Path) -> None:
    """Not compiled it is wrong and says nothing; without vLLM's own operators it is right."""
    folder = make_model("DeepSeek-V2", tmp_path / "model", rope_scaling=None)
    answers = {
        name: vllm.serve(folder, PROMPTS, tmp_path / name, **options)
        for name, options in {"eager": {}, "native": {"compilation_config": {"custom_ops": ["none"]}}}.items()
    }
    expected = logprobs(folder, "auto")
    found = {name: divergence(torch.stack(answer.logprobs), expected) for name, answer in answers.items()}
    assert found["native"] < LIMIT and found["eager"] > 5 * LIMIT, found
    assert kept(folder, hardware=vllm.hardware, eager=True) is Verdict.WRONG
    assert kept(folder, hardware=vllm.hardware) is Verdict.LOADS


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    # model, changes of its config, vLLM's options, those of the deployment, words of the error
    "heads of 80, FP8 cache": (
        "Llama 3.1",
        {"head_dim": 80},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache": "fp8"},
        "divisible by 32",
    ),
    "latent, FP8 cache": ("DeepSeek-V2", {}, {"kv_cache_dtype": "fp8"}, {"kv_cache": "fp8"}, "KV cache"),
    "no rope_scaling": ("Hunyuan-Large", {"rope_scaling": None}, {}, {}, "bfloat16"),
    "spread experts": ("Mixtral", {}, {**PROCESSES, "enable_expert_parallel": True}, {"tp": 2, "ep": True}, ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, vllm: Vllm, tmp_path: Path) -> None:
    name, changes, options, deployment, words = REFUSED[case]
    folder = make_model(name, tmp_path / "model", **changes)
    answer = vllm.serve(folder, PROMPTS, tmp_path / "answer", **options)
    assert answer.error and words in answer.error, answer.error
    assert Verdict.REFUSED in [kept(folder, hardware=kind, eager=True, **deployment) for kind in vllm.kinds]


def changed(folder: Path, out: Path, config: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(folder, out)
    data = json.loads((out / "config.json").read_text())
    config(data["quantization_config"])
    (out / "config.json").write_text(json.dumps(data))
    return out


@pytest.mark.parametrize("name", ["Hunyuan-Large", "Llama 3.1"])
def test_a_scheme_for_the_cache(name: str, vllm: Vllm, tmp_path: Path) -> None:
    quantkit.quantize(make_model(name, tmp_path / "model"), tmp_path / "out", Recipe(method="rtn", scheme="W8A8"))
    folder = changed(tmp_path / "out", tmp_path / "kv", lambda q: q.update(kv_cache_scheme=FP8_CACHE))
    said = replay(folder, engine_named("vllm==0.32"), Deployment(hardware=vllm.hardware, eager=True))["verdict"]
    answer = vllm.serve(folder, PROMPTS, tmp_path / "answer")
    if name == "Hunyuan-Large":
        assert said == "does not load" and answer.error and "belong to one layer" in answer.error
    else:
        assert said == "loads" and divergence(torch.stack(answer.logprobs), logprobs(tmp_path / "out", "auto")) < LIMIT


@pytest.mark.parametrize(
    ("name", "scheme", "form"),
    [
        ("Llama 3.1", "W4A16", "gptq"),
        ("Llama 3.1", "W4A16", "gptq-v2"),
        ("Llama 3.1", "W4A16_ASYM", "awq"),
        ("Mixtral", "W4A16", "gptq"),
    ],
)
def test_other_formats(name: str, scheme: str, form: str, vllm: Vllm, tmp_path: Path) -> None:
    quantkit.quantize(make_model(name, tmp_path / "model"), tmp_path / "ours", Recipe(method="rtn", scheme=scheme))
    quantkit.convert(tmp_path / "ours", tmp_path / "out", form)
    answer = vllm.serve(tmp_path / "out", PROMPTS, tmp_path / "answer")
    said = replay(tmp_path / "out", engine_named("vllm==0.32"), Deployment(hardware=vllm.hardware, eager=True))["verdict"]
    assert answer.error is None and said in ("loads", "nobody looked"), (answer.error, said)
    kernels = "w4a8" if name == "Mixtral" else "auto"
    assert divergence(torch.stack(answer.logprobs), logprobs(tmp_path / "out", kernels)) < LIMIT


O_PROJ, EXPERT = "model.layers.0.self_attn.o_proj", "model.layers.1.block_sparse_moe.experts.1.w2"
DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "a linear is missing": lambda t: t.pop(f"{O_PROJ}.weight_packed"),
    "an expert is missing": lambda t: [t.pop(key) for key in [*t] if key.startswith(EXPERT)],
    "too much": lambda t: t.update({f"{O_PROJ}.weight_zero_point": torch.zeros(32, 2, dtype=torch.int32)}),
    "shape": lambda t: t.update({f"{O_PROJ}.weight_scale": t[f"{O_PROJ}.weight_scale"][:1].contiguous()}),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage(case: str, vllm: Vllm, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantkit.quantize(make_model("Mixtral", tmp_path / "model"), out, Recipe(scheme="W4A16", method="rtn"))
    expected = logprobs(out, "w4a8")
    tensors = {key: tensor for shard in out.glob("*.safetensors") for key, tensor in load_file(shard).items()}
    for file in (*out.glob("*.safetensors"), out / INDEX):
        file.unlink()
    DAMAGE[case](tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    answer = vllm.serve(out, PROMPTS, tmp_path / "answer")
    said = replay(out, engine_named("vllm==0.32"), Deployment(hardware=vllm.hardware, eager=True))["verdict"]
    if answer.error:
        assert said == "does not load", answer.error
    else:
        assert said == "loads and is wrong" and not divergence(torch.stack(answer.logprobs), expected) < LIMIT
