"""Rules on the real models' specs: what loads over 8 devices; and that the stand-ins of other tests are like them."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.engines.assess import Assessment, assess
from quantkit.engines.held import Deployment
from quantkit.engines.registry import ENGINES
from quantkit.engines.rules import Verdict, view_of
from quantkit.formats import compressed_tensors
from quantkit.model.registry import ARCHITECTURES, build_spec
from quantkit.recipe import Recipe
from tests.helpers.architectures import RELEASED, TINY
from tests.helpers.engine_models import SIZES, seen

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
# True sizes, two layers, few experts: every kind of weight that the whole model has.
SHORT: dict[str, dict[str, Any]] = {
    f"{name}, short": {**config, "num_hidden_layers": 2, **{key: 32 for key in COUNTS if key in config}}
    for name, config in RELEASED.items()
    if "llama" not in name
}


def ask(name: str, engine: str, recipe: dict[str, Any], where: Deployment | None = None, **deployment: Any) -> Assessment:
    config = SHORT.get(name) or RELEASED[name]
    spec = build_spec(config, name)
    schemes = {ref.key: Recipe.of(recipe).scheme_of(ref) for ref in spec.linears()}
    written = compressed_tensors.written(schemes, [moe.router.key for moe in spec.moes()])
    return assess(ENGINES[engine], spec, config, schemes, written, where or Deployment(**deployment))


def refused(found: Assessment) -> set[str]:
    return {finding["rule"] for row in [{"findings": found.model}, *found.rows] for finding in row["findings"] if row}


INT4: dict[str, Any] = {}
FP8_BESIDE = {"attention": "FP8_DYNAMIC", "shared_experts": "FP8_DYNAMIC"}
KEEP_KV_B = {"rules": [{"match": "*.kv_b_proj", "scheme": "BF16"}]}
W8A16_LATE = [{"match": "model.layers.5?.mlp.experts.*", "scheme": "W8A16"}]
# model, engine, recipe, deployment, verdict
OVER_8 = [
    ("hunyuan-a13b", "vllm", INT4, {}, "loads"),
    ("hunyuan-a13b", "vllm", FP8_BESIDE, {"tp": 8}, "nobody looked"),  # transformers' class, cut by guess
    ("hunyuan-a13b", "sglang", INT4, {"tp": 8}, "loads"),
    (
        "hunyuan-a13b",
        "sglang",
        FP8_BESIDE,
        {"tp": 8},
        "does not load",
    ),  # its layers have no names there, and formats are mixed
    ("mixtral-8x22b", "vllm", INT4, {"tp": 8}, "loads"),
    ("mixtral-8x22b", "vllm", {"attention": "FP8_DYNAMIC"}, {"tp": 8}, "loads"),
    ("mixtral-8x22b", "sglang", {"scheme": "FP8_DYNAMIC"}, {"tp": 8}, "loads"),
    ("deepseek-v2", "vllm", INT4, {"tp": 8}, "does not load"),  # 1536 / 8 = 1.5 groups
    ("deepseek-v2", "vllm", INT4, {"tp": 8, "ep": True}, "loads"),
    ("deepseek-v2", "vllm", {"group_size": 64}, {"tp": 8}, "loads"),
    ("deepseek-v2", "vllm", FP8_BESIDE, {"tp": 8, "ep": True}, "loads"),
    ("deepseek-v2", "sglang", INT4, {"tp": 8, "ep": True}, "does not load"),  # a packed kv_b_proj
    ("deepseek-v2", "transformers", INT4, {}, "loads"),
    ("deepseek-v2", "transformers", {"shared_experts": "FP8_DYNAMIC"}, {}, "loads"),  # "experts" too, in a later group
    ("deepseek-v2", "transformers", {"rules": W8A16_LATE}, {}, "loads and is wrong"),
    ("llama-3.1-70b", "vllm", INT4, {"tp": 8}, "loads"),
    ("llama-3.1-405b", "vllm", INT4, {"tp": 16}, "loads"),
    ("llama-3.1-405b", "vllm", INT4, {"tp": 3}, "does not load"),
]


@pytest.mark.parametrize(("name", "engine", "recipe", "deployment", "said"), OVER_8)
def test_over_many_devices(name: str, engine: str, recipe: dict[str, Any], deployment: dict[str, Any], said: str) -> None:
    found = ask(name, engine, recipe, **deployment)
    assert found.verdict.value == said, refused(found)
    failing = [row for row in found.rows if row["verdict"] != "loads"]
    assert said == "loads" or failing or found.model


def test_what_is_proposed_for_hunyuan_large() -> None:
    found = ask("hunyuan-large", "vllm", INT4, tp=8)
    rows = {(row["role"], row["weight"]): row for row in found.rows}
    assert rows["experts", "w2"]["on_device"] == {"rows": [6400], "columns": 2288}
    assert rows["experts", "w2"]["instead"] == ["--ep", "--experts FP8_DYNAMIC", "--experts W8A8", "--tp 1"]
    assert "--group-size 32" in rows["attention", "o_proj"]["instead"]  # 6400 / 8 = 800 = 25 x 32
    assert rows["attention", "q_proj"]["layers"] == list(range(1, 64, 2))
    again = ask("hunyuan-large", "vllm", {"experts": "W4A16", **FP8_BESIDE}, tp=8, ep=True)
    assert all(row["verdict"] == "loads" for row in again.rows)
    assert {finding["rule"] for finding in again.model} == {"vllm.plugin", "vllm.marlin-int8-inputs"}
    assert again.verdict is Verdict.LOADS


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("scheme", ["W8A16", "FP8_DYNAMIC"])
def test_routed_experts_come_first(name: str, scheme: str) -> None:
    """transformers gives all experts the first group with "experts" in a target, DeepSeek's shared_experts included."""
    spec, recipe = build_spec(SHORT[name], name), Recipe(scheme=scheme, experts="W4A16")
    schemes = {ref.key: recipe.scheme_of(ref) for ref in spec.linears()}
    written = compressed_tensors.written(schemes, [moe.router.key for moe in spec.moes()])
    first, *others = written["config_groups"].values()
    assert any(".experts" in target for target in first["targets"]) and len(others) == 1
    found = ask(name, "transformers", {"scheme": scheme, "experts": "W4A16"})
    assert found.verdict is Verdict.LOADS, refused(found)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", SHORT)
def test_advice_is_for_what_then_loads(engine: str, name: str) -> None:
    for scheme in ("W4A16", "W8A8", "FP8_BLOCK"):
        found = ask(name, engine, {"scheme": scheme}, tp=2)
        for words in dict.fromkeys(words for row in found.rows for words in row["instead"]):
            assert not any(finding["verdict"] in ("does not load", "loads and is wrong") for finding in found.model)
            roles = {row["role"] for row in found.rows if words in row["instead"]}
            again = ask(name, engine, *_followed(scheme, words))
            assert all(row["verdict"] == "loads" for row in again.rows if row["role"] in roles), (scheme, words)


def _followed(scheme: str, words: str) -> tuple[dict[str, Any], Deployment]:
    """A recipe and a deployment over two devices, changed as advised."""
    option, _, value = words.replace(" for all", "").removeprefix("--").partition(" ")
    if option in ("ep", "tp"):
        return {"scheme": scheme}, Deployment(tp=int(value) if option == "tp" else 2, ep=option == "ep")
    key = option.replace("-", "_")
    return {"scheme": scheme, key: int(value) if key == "group_size" else value}, Deployment(tp=2)


def test_dense_layers_of_qwen3_moe_need_one_scheme_in_vllm() -> None:
    """Seen with 0.32: "'MergedColumnParallelLinear' object has no attribute 'data'". The released models have none."""
    config = TINY["qwen3_moe"]
    spec = build_spec(config, "dense layers")
    found = {}
    for name, recipe in {"one": Recipe(group_size=32), "mixed": Recipe(scheme="FP8_DYNAMIC", experts="W4A16")}.items():
        schemes = {ref.key: recipe.scheme_of(ref) for ref in spec.linears()}
        written = compressed_tensors.written(schemes, [moe.router.key for moe in spec.moes()])
        found[name] = assess(ENGINES["vllm"], spec, config, schemes, written, Deployment())
    assert found["one"].verdict is Verdict.LOADS
    assert found["mixed"].verdict is Verdict.REFUSED and "vllm.targets" in refused(found["mixed"])


def test_kv_b_proj_can_be_kept_alone() -> None:
    assert not refused(ask("deepseek-v2", "vllm", {"scheme": "FP8_DYNAMIC", **KEEP_KV_B}, tp=8))
    assert refused(ask("deepseek-v2", "vllm", {"scheme": "FP8_DYNAMIC"}, tp=8)) == {"vllm.kv-b-proj"}


TRUE = {"hunyuan": "hunyuan-large", "hunyuan_v1_moe": "hunyuan-a13b", "mixtral": "mixtral-8x22b", "llama": "llama-3.1-70b"}


@pytest.mark.parametrize("kind", [*TRUE, "deepseek_v2"])
def test_the_stand_ins_of_other_tests_are_true(kind: str) -> None:
    """Names and shapes of what an engine holds, in two layers: those of the released model."""
    name = TRUE.get(kind, "deepseek-v2")
    spec = build_spec(RELEASED[name], name)
    schemes = dict.fromkeys(ref.key for ref in spec.linears())
    held = view_of(spec, RELEASED[name], schemes, {}, Deployment(tp=2)).weights
    first = 2 if kind == "deepseek_v2" else 0  # its layer 0 is dense
    real = {(h.layer % 2, h.name, h.parts, h.inputs, h.role) for h in held if h.layer in (first, first + 1)}
    stand_in = {(h.layer, h.name, h.parts, h.inputs, h.role) for h in seen(kind, tp=2).weights}
    shared = {h for h in real if "shared" in h[4].value}
    if kind == "deepseek_v2":  # two shared experts in one
        real, stand_in = real - shared, {h for h in stand_in if "shared" not in h[4].value}
    assert real == stand_in


def test_every_architecture_has_a_stand_in_and_an_answer() -> None:
    assert SIZES.keys() == ARCHITECTURES.keys()
    for engine in ENGINES.values():
        assert engine.architectures.keys() <= ARCHITECTURES.keys()
