"""Every architecture against transformers' own class, on tiny random weights saved with the released names; then through
the tool chain. Hunyuan-Large has golden data instead (test_model.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantkit
from quantkit.errors import ConfigError
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.forward import forward, head
from quantkit.model.registry import build_spec
from quantkit.model.spec import Attention, Layer, ModelSpec, MoE, Router, Yarn
from quantkit.scheme import Recipe
from quantkit.verify import verify
from tests.architectures import TINY
from tests.conftest import random_weights, write_checkpoint
from tests.test_model import InMemory

transformers = pytest.importorskip("transformers")
IDS = torch.randint(1, 257, (2, 96), generator=torch.Generator().manual_seed(1))
TOLERANCE = 2e-4  # float32 sums in another order; logits here are of the order of 1


@dataclasses.dataclass(frozen=True)
class Theirs:
    """transformers' outputs, and the checkpoint they came from. routers: by layer, the chosen experts, sorted [n, k]."""

    folder: Path
    spec: ModelSpec
    weights: InMemory
    logits: Tensor
    routers: dict[int, Tensor]


def run_theirs(folder: Path) -> tuple[Tensor, dict[int, Tensor]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    routers: dict[int, Tensor] = {}

    def watch(index: int) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
            routers[index] = output[-1].sort(-1).values

        return hook

    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(watch(index))
    with torch.no_grad():
        return model(IDS).logits, routers


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Theirs]:
    made: dict[str, Theirs] = {}

    def make(name: str) -> Theirs:
        if name not in made:
            config, folder = TINY[name], tmp_path_factory.mktemp("theirs") / "model"
            write_checkpoint(folder, config, random_weights(config))
            tensors = {k: v.float() for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
            made[name] = Theirs(folder, build_spec(config, name), InMemory(tensors), *run_theirs(folder))
        return made[name]

    return make


def ours(
    spec: ModelSpec, weights: InMemory, cache: Cache | None = None, ids: Tensor = IDS
) -> tuple[Tensor, dict[int, Tensor]]:
    hidden, routers = torch.empty(0), {}
    for trace in forward(spec, weights, ids, cache):
        hidden = trace.hidden
        if trace.routing is not None:
            routers[trace.index] = trace.routing.experts.sort(-1).values
    return head(spec, weights, hidden), routers


@pytest.mark.parametrize("name", TINY)
def test_matches_transformers(name: str, theirs: Callable[[str], Theirs]) -> None:
    expected = theirs(name)
    logits, routers = ours(expected.spec, expected.weights)
    torch.testing.assert_close(logits, expected.logits, atol=TOLERANCE, rtol=0)
    assert (
        routers.keys()
        == expected.routers.keys()
        == {layer.index for layer in expected.spec.layers if isinstance(layer.mlp, MoE)}
    )
    for index, chosen in routers.items():
        assert torch.equal(chosen, expected.routers[index]), index


@pytest.mark.parametrize("name", TINY)
def test_cached_and_uncached_agree(name: str, theirs: Callable[[str], Theirs]) -> None:
    expected, cache = theirs(name), Cache(KVFormat.FLOAT32)
    parts = [ours(expected.spec, expected.weights, cache, part)[0] for part in IDS.split([80, 1, 14, 1], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected.logits, atol=TOLERANCE, rtol=0)
    assert cache.nbytes() == sum(layer.attention.kv_width for layer in expected.spec.layers) * IDS.numel() * 4


def attention(spec: ModelSpec, **changes: Any) -> ModelSpec:
    def change(a: Attention) -> Attention:
        return dataclasses.replace(a, **{k: v(a) if callable(v) else v for k, v in changes.items()})

    return dataclasses.replace(
        spec, layers=tuple(dataclasses.replace(x, attention=change(x.attention)) for x in spec.layers)
    )


def router(spec: ModelSpec, **changes: Any) -> ModelSpec:
    def change(layer: Layer) -> Layer:
        if not isinstance(layer.mlp, MoE):
            return layer
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, router=of(layer.mlp.router)))

    def of(r: Router) -> Router:
        return dataclasses.replace(r, **changes)

    return dataclasses.replace(spec, layers=tuple(change(x) for x in spec.layers))


def rope(spec: ModelSpec, **changes: Any) -> ModelSpec:
    return dataclasses.replace(spec, rope=dataclasses.replace(spec.rope, **changes))


def swapped(spec: ModelSpec) -> ModelSpec:
    """gate and up of every expert changed for each other, as by taking w1, w2, w3 for gate, down, up of another model."""

    def change(layer: Layer) -> Layer:
        assert isinstance(layer.mlp, MoE)
        experts = tuple(dataclasses.replace(e, gate=e.up, up=e.gate) for e in layer.mlp.experts)
        return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=experts))

    return dataclasses.replace(spec, layers=tuple(change(x) for x in spec.layers))


def yarn(spec: ModelSpec, **changes: float) -> ModelSpec:
    assert isinstance(spec.rope.scaling, Yarn)
    return rope(spec, scaling=dataclasses.replace(spec.rope.scaling, **changes))


MISTAKES: dict[str, tuple[str, Callable[[ModelSpec], ModelSpec]]] = {
    "llama without its scaling": ("llama", lambda s: rope(s, scaling=None)),
    "mixtral, weights not renormalised": ("mixtral", lambda s: router(s, renormalise=False)),
    "mixtral, another base": ("mixtral", lambda s: rope(s, base=10000.0)),
    "mixtral, gate and up changed": ("mixtral", swapped),
    "qwen3, norm after RoPE": ("qwen3_moe", lambda s: attention(s, norm_first=False)),
    "qwen3, weights not renormalised": ("qwen3_moe", lambda s: router(s, renormalise=False)),
    "qwen3, no norms": ("qwen3_moe", lambda s: attention(s, q_norm=None, k_norm=None)),
    "deepseek, any group": ("deepseek_v2", lambda s: router(s, groups=1)),
    "deepseek, no scaling factor": ("deepseek_v2", lambda s: router(s, scale=1.0)),
    "deepseek, renormalised": ("deepseek_v2", lambda s: router(s, renormalise=True)),
    "deepseek, scores of plain RoPE": ("deepseek_v2", lambda s: attention(s, scale=24**-0.5)),
    "deepseek, cos and sin of length 1": ("deepseek_v2", lambda s: yarn(s, mscale=0.707)),
    "deepseek, unscaled frequencies": ("deepseek_v2", lambda s: yarn(s, original_context=10**6)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_check_notices(mistake: str, theirs: Callable[[str], Theirs]) -> None:
    name, change = MISTAKES[mistake]
    expected = theirs(name)
    logits, _ = ours(change(expected.spec), expected.weights)
    assert (logits - expected.logits).abs().max() > 50 * TOLERANCE


def test_deepseek_rope_pairs_neighbours(theirs: Callable[[str], Theirs], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = theirs("deepseek_v2")
    monkeypatch.setattr("quantkit.model.attention.deinterleave", lambda x: x)
    assert (ours(expected.spec, expected.weights)[0] - expected.logits).abs().max() > 50 * TOLERANCE


@pytest.mark.parametrize("name", TINY)
def test_through_the_tool_chain(name: str, theirs: Callable[[str], Theirs], tmp_path: Path) -> None:
    """Quantise, verify against the source, evaluate, generate."""
    model, spec = theirs(name).folder, theirs(name).spec
    recipes = {
        "W4A16": Recipe(group_size=32, samples=16, seq_len=64),
        "W8A16": Recipe(scheme="W8A16", group_size=32),
        "FP8_DYNAMIC": Recipe(scheme="FP8_DYNAMIC"),
    }
    divergence = {}
    for scheme, recipe in recipes.items():
        record = quantkit.quantize(model, tmp_path / scheme, recipe)
        assert record["fallbacks"] == {} and record["linears"].keys() == {ref.key for ref in spec.linears()}
        methods = {outcome["method"] for outcome in record["linears"].values()}
        assert methods == ({"gptq"} if scheme == "W4A16" else {"rtn"})
        assert verify(tmp_path / scheme, model).linears == len(list(spec.linears()))
        divergence[scheme] = quantkit.evaluate(tmp_path / scheme, model, seq_len=32, windows=4)["kl"]["mean"]
    assert 0 < divergence["W8A16"] < divergence["FP8_DYNAMIC"] < divergence["W4A16"] < 0.5
    for scheme in recipes:
        for kernels in ("reference", "auto"):
            loaded, ids = quantkit.load(tmp_path / scheme, kernels=kernels), torch.arange(1, 13).view(2, 6)
            generated = loaded.generate(ids, 8, kv_format=KVFormat.FLOAT32)
            if kernels == "reference":
                assert torch.equal(generated[:, 6:], loaded.logits(generated)[:, 5:-1].argmax(-1))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_gptq_sees_what_flows(name: str, theirs: Callable[[str], Theirs], tmp_path: Path) -> None:
    """Calibration's inputs are the model's own: GPTQ on them loses less than rounding does."""
    model, lost = theirs(name).folder, {}
    for method in ("gptq", "rtn"):
        quantkit.quantize(model, tmp_path / method, Recipe(group_size=32, samples=64, seq_len=64, method=method))
        lost[method] = quantkit.evaluate(tmp_path / method, model, seq_len=64, windows=16)["kl"]["mean"]
    assert lost["gptq"] < 0.9 * lost["rtn"]
