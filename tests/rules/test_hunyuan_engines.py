"""Hunyuan-Large outside quantkit: names and routing for vLLM, tested without it (`make engine-test` runs the real one), and
the transformers model against quantkit's reference."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

import quantkit
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.engines import transformers_model, vllm_plugin
from quantkit.engines.hunyuan_config import HunyuanLargeConfig, register_config
from quantkit.engines.transformers_model import CACHE
from quantkit.model.registry import build_spec
from quantkit.recipe import Recipe
from tests.conftest import CONFIG
from tests.helpers.architectures import RELEASED
from tests.helpers.paths import ROOT

IDS = torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(1))
register = transformers_model.register


def mapped(name: str, starts: dict[str, tuple[str, str | int]]) -> tuple[str, str | int | None]:
    """As vLLM's loader applies them: first what is renamed, then what is stacked."""
    for old, new in vllm_plugin.RENAMED.items():
        name = name.replace(old, new)
    for start, (target, part) in starts.items():
        if start in name:
            return name.replace(start, target), part
    return name, None


def test_names_of_every_tensor_in_vllm() -> None:
    spec = build_spec({**CONFIG, "cla_share_factor": 2}, "test")
    starts = vllm_plugin.stacked(spec)
    names = {key: mapped(key, starts) for key in spec.tensors()}
    assert len(set(names.values())) == len(names)  # no two tensors in one place
    layer = "model.layers.{}.".format
    assert names[layer(0) + "self_attn.k_proj.weight"] == (layer(0) + "self_attn.qkv_proj.weight", "k")
    assert names[layer(0) + "self_attn.q_proj.weight"] == (layer(0) + "self_attn.qkv_proj.weight", "q")
    assert names[layer(1) + "self_attn.q_proj.weight"] == (layer(1) + "self_attn.q_proj.weight", None)
    assert names[layer(1) + "mlp.shared_mlp.up_proj.weight"] == (layer(1) + "mlp.shared_mlp.gate_up_proj.weight", 1)
    assert names[layer(3) + "mlp.gate.wg.weight"] == (layer(3) + "mlp.gate.weight", None)
    assert names[layer(3) + "mlp.experts.2.up_proj.weight"] == (layer(3) + "mlp.experts.2.up_proj.weight", None)


def test_names_of_quantized_tensors_in_vllm(model: Path, tmp_path: Path) -> None:
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", method="rtn", group_size=32))
    reader = CheckpointReader(tmp_path / "out")
    starts = vllm_plugin.stacked(build_spec(reader.config, "test"))
    names = [mapped(key, starts) for key in reader.entries]
    assert len(set(names)) == len(names)
    packed = ("model.layers.0.self_attn.qkv_proj.weight_packed", "v")
    assert packed in names and ("model.layers.1.self_attn.q_proj.weight_scale", None) in names


@pytest.mark.parametrize("share", [1, 2, 4])
def test_cache_of_each_layer(share: int) -> None:
    spec = build_spec({**RELEASED["hunyuan-large"], "cla_share_factor": share}, "test")
    targets = [vllm_plugin.kv_target(spec, i, "model.layers") for i in range(64)]
    assert targets.count(None) == 64 // share
    owners = [f"model.layers.{i - i % share}.self_attn.attn" if i % share else None for i in range(64)]
    assert targets == owners


def test_idle_expert_changes_nothing() -> None:
    """top-2 with it, weights renormalised or not, is top-1 without it beside an expert that gives zero."""
    logits = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * 3
    logits[0] = torch.tensor([50.0] + [0.0] * 15)  # nothing is left for the idle one
    logits[1] = 0.0  # all are as good
    weight, chosen = logits.softmax(-1).max(-1)
    weights, experts = vllm_plugin.with_idle_expert(logits).softmax(-1).topk(2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(200))
    assert (experts != chosen[:, None]).sum(-1).eq(1).all()  # two different experts, one of them the chosen one
    torch.testing.assert_close((weights * (experts == chosen[:, None])).sum(-1), weight)
    others = (experts != chosen[:, None]) & (experts != 16)
    assert float((weights * others).max()) == 0.0


def test_registers_with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for vLLM's registry: asked twice, it is told once."""
    told: list[tuple[str, str]] = []

    class Registry:
        @staticmethod
        def get_supported_archs() -> list[str]:
            return ["HunYuanMoEV1ForCausalLM", *(name for name, _ in told)]

        @staticmethod
        def register_model(name: str, where: str) -> None:
            told.append((name, where))

    vllm = ModuleType("vllm")
    vllm.ModelRegistry = Registry  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    vllm_plugin.register()
    vllm_plugin.register()
    assert told == [("HunYuanForCausalLM", "quantkit.engines.vllm_hunyuan:HunYuanForCausalLM")]
    declared = ROOT / "pyproject.toml"
    assert '[project.entry-points."vllm.general_plugins"]\nquantkit = "quantkit.engines.vllm_plugin:register"' in (
        declared.read_text()
    )
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "quantkit"]
    assert not found or found[0].load() is vllm_plugin.register  # an installation from before it was declared has none


def test_config_without_remote_code(model: Path, tmp_path: Path) -> None:
    register_config()
    config = transformers.AutoConfig.from_pretrained(model)
    assert isinstance(config, HunyuanLargeConfig)
    assert config.spec() == build_spec(json.loads((model / "config.json").read_text()), "test")
    config.save_pretrained(tmp_path / "again")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "again").spec() == config.spec()


@pytest.mark.parametrize("released", ["hunyuan-large", "hunyuan-a13b"])
def test_the_two_models_that_are_spelled_hunyuan(released: str, tmp_path: Path) -> None:
    register_config()
    (tmp_path / "config.json").write_text(json.dumps({**RELEASED[released], "model_type": "hunyuan"}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == ("hunyuan" if released == "hunyuan-large" else "hunyuan_v1_moe")
    assert config.hidden_size == RELEASED[released]["hidden_size"]


SWITCHES = [{}, {"use_cla": False}, {"cla_share_factor": 4}, {"moe_topk": 2}, {"use_qk_norm": False}, {"rope_scaling": None}]
SWITCHES += [{"use_mixed_mlp_moe": False}, {"num_experts": 1}, {"tie_word_embeddings": False}]


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_transformers_logits_agree(changes: dict[str, object], make_model: Callable[..., Path]) -> None:
    register()
    folder = make_model(**changes)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(IDS).logits
    torch.testing.assert_close(logits, quantkit.load(folder, kernels="reference").logits(IDS), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A16", "FP8_DYNAMIC", "FP8"])
def test_transformers_loads_quantized(scheme: str, model: Path, tmp_path: Path) -> None:
    register()
    quantkit.quantize(model, tmp_path / "out", Recipe(scheme=scheme, method="rtn", group_size=32, samples=8, seq_len=64))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(IDS).logits
    ours, base = (quantkit.load(path, kernels="reference").logits(IDS) for path in (tmp_path / "out", model))
    torch.testing.assert_close(logits, ours, atol=1e-4, rtol=1e-4)
    assert float((logits - base).norm() / base.norm()) > 1e-3


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_transformers_generates_from_one_cache_for_each_group(name: str, model: Path) -> None:
    """Under the name that transformers 5.24 gave it as under the old one, whichever is installed."""
    register()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        whole = theirs(IDS).logits
        cache = getattr(theirs(IDS[:, :10], use_cache=True), CACHE)
        rest = theirs(IDS[:, 10:], **{name: cache}).logits
        padded, mask = IDS.clone(), torch.ones_like(IDS)
        padded[0, :6], mask[0, :6] = 0, 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        late = theirs(padded, attention_mask=mask, position_ids=positions).logits[0, 6:]
        alone = theirs(IDS[:1, 6:]).logits[0]
    torch.testing.assert_close(rest, whole[:, 10:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(late, alone, atol=1e-4, rtol=1e-4)
    held = [layer for layer in cache.layers if getattr(layer, "is_initialized", False)]
    assert len(held) == 2  # of four layers in two groups
    generated = theirs.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False, pad_token_id=0)
    expected = torch.cat([IDS, whole[:, -1:].argmax(-1)], dim=1)
    torch.testing.assert_close(generated[:, :25], expected)


def test_transformers_generates_the_same_with_and_without_a_cache(model: Path) -> None:
    """With one, each step computes one token: a cache that got lost would show here, or in the tokens."""
    register()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    widths: list[int] = []
    theirs.model.embed_tokens.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    answers = {}
    for use_cache in (True, False):
        how = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "pad_token_id": 0}
        answers[use_cache] = theirs.generate(IDS, attention_mask=mask, **how)
    assert torch.equal(answers[True], answers[False])
    assert widths == [24, *[1] * 7, *range(24, 32)]
    assert torch.equal(answers[True][1:], quantkit.load(model, kernels="reference").generate(IDS[1:], 8))


def test_transformers_swallows_no_state(model: Path) -> None:
    register()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    one, other = transformers.DynamicCache(), transformers.DynamicCache()
    for unknown in ({"past_key_value": one}, {"cache_params": one}, {"mems": IDS}, {"labels": IDS}):
        with pytest.raises(TypeError, match=next(iter(unknown))):
            theirs(IDS, **unknown)
    with pytest.raises(TypeError, match="two were given"):
        theirs(IDS, past_key_values=one, cache=other)
    logits = theirs(IDS, past_key_values=one, cache=one, return_dict=True, output_attentions=False).logits
    assert logits.shape == (*IDS.shape, 257) and one.get_seq_length() == IDS.shape[1]


def test_transformers_refuses_what_is_not_computed(model: Path, tmp_path: Path) -> None:
    register()
    broken = shutil.copytree(model, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))
    with pytest.raises(quantkit.errors.ConfigError, match="hidden_act"):
        transformers.AutoModelForCausalLM.from_pretrained(broken)
