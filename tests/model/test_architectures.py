"""Every architecture against transformers' own class, on tiny random weights saved with the released names; then through
the tool chain. Hunyuan-Large has golden data instead (test_model.py)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import quantkit
from quantkit.checkpoint.verify import verify
from quantkit.errors import CheckpointError
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.forward import forward, head
from quantkit.model.registry import build_spec
from quantkit.model.spec import Attention, Layer, Linear, ModelSpec, MoE, Router, Yarn
from quantkit.recipe import Recipe
from tests.conftest import random_weights, write_checkpoint
from tests.helpers.architectures import TINY
from tests.helpers.replay import Replayed
from tests.helpers.weights import InMemory

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
        return dataclasses.replace(a, **changes)

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
    monkeypatch.setattr("quantkit.model.mla.deinterleave", lambda x: x)
    assert (ours(expected.spec, expected.weights)[0] - expected.logits).abs().max() > 50 * TOLERANCE


class Recording(InMemory):
    """Notes the input of every linear, [tokens, in] in the order of tokens."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.inputs: dict[str, Tensor] = {}

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        self.inputs[ref.key] = x.reshape(-1, ref.in_features)
        return super().linear(ref, x)


@pytest.mark.parametrize("name", TINY)
def test_replay_equals_forward(name: str, theirs: Callable[[str], Theirs], tmp_path: Path) -> None:
    """Part by part over the tapes: every linear's statistics are those of its input in a plain forward, and the hidden
    states that are left for the next layer are the forward's. K and V are lent to layers that borrow them."""
    spec, tensors = theirs(name).spec, theirs(name).weights.tensors
    ids = torch.randint(1, 257, (6, 96), generator=torch.Generator().manual_seed(2))
    recording, replayed = Recording(tensors), Replayed(spec, tensors, ids, tmp_path)
    expected = {trace.index: trace.hidden.flatten(0, 1) for trace in forward(spec, recording, ids)}
    for layer, hidden in replayed.layers():
        torch.testing.assert_close(hidden, expected[layer.index], atol=1e-4, rtol=1e-4)
    replayed.stream.remove()
    seen = replayed.seen
    assert [path.name for path in tmp_path.iterdir()] == ["hidden"]
    assert seen.keys() == {ref.key for ref in spec.linears()}
    for ref in spec.linears():
        x, stats = recording.inputs.get(ref.key, torch.empty(0, ref.in_features)), seen[ref.key]
        assert stats.tokens == len(x) and len(x) + stats.lent >= min(ref.in_features, ids.numel())
        if not stats.lent and stats.hessian is not None:
            torch.testing.assert_close(
                stats.hessian, x.T @ x, atol=1e-2 * float((x * x).sum(0).max()), rtol=0
            )  # of bfloat16


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(random.__file__).read_text("utf-8"))
    return str(path)


@pytest.mark.parametrize("name", TINY)
def test_through_the_tool_chain(name: str, theirs: Callable[[str], Theirs], text: str, tmp_path: Path) -> None:
    """Quantize, verify against the source, evaluate, generate."""
    model, spec = theirs(name).folder, theirs(name).spec
    recipes = {
        "W4A16": Recipe(scheme="W4A16", group_size=32, samples=16, seq_len=64, calibration=text),
        "W8A16": Recipe(scheme="W8A16", group_size=32),
        "FP8_DYNAMIC": Recipe(scheme="FP8_DYNAMIC"),
    }
    divergence, ids = {}, torch.arange(1, 13).view(2, 6)
    for scheme, recipe in recipes.items():
        record = quantkit.quantize(model, tmp_path / scheme, recipe)
        assert record["fallbacks"] == {} and record["linears"].keys() == {ref.key for ref in spec.linears()}
        assert {o["method"] for o in record["linears"].values()} == ({"gptq"} if scheme == "W4A16" else {"rtn"})
        assert verify(tmp_path / scheme, model).linears == len(list(spec.linears()))
        divergence[scheme] = quantkit.evaluate(tmp_path / scheme, model, text, seq_len=32, windows=4)["kl"]["mean"]
        loaded = quantkit.load(tmp_path / scheme, kernels="reference")
        generated = loaded.generate(ids, 8, kv_format=KVFormat.FLOAT32)
        assert torch.equal(generated[:, 6:], loaded.logits(generated)[:, 5:-1].argmax(-1))
    assert 0 < divergence["W8A16"] < divergence["FP8_DYNAMIC"] < divergence["W4A16"] < 0.5


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_kernels_and_small_caches(name: str, theirs: Callable[[str], Theirs], tmp_path: Path) -> None:
    """Logits stay near the reference's on this machine's kernels, which multiply in BF16, and through BF16 and FP8 caches.

    Bounds: twice what was seen. The median over tokens: one whose expert flips moves far.
    """
    quantkit.quantize(theirs(name).folder, tmp_path / "out", Recipe(scheme="W8A16", group_size=32))
    exact, fast = (quantkit.load(tmp_path / "out", kernels=kernels) for kernels in ("reference", "auto"))
    bf16, fp8 = Cache(KVFormat.BF16), Cache(KVFormat.FP8)
    wanted, pieces = exact.logits(IDS), IDS.split([90, 6], dim=1)
    for logits, bound in [
        (fast.logits(IDS), 0.03),
        (torch.cat([exact.logits(part, bf16) for part in pieces], dim=1), 0.015),
        (torch.cat([exact.logits(part, fp8) for part in pieces], dim=1), 0.2),
    ]:
        error = (logits - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert error.median() < bound


def test_code_beside_a_model_is_never_run(tmp_path: Path, text: str) -> None:
    """Released DeepSeek and Hunyuan configs name Python files: nobody looks into them, and OUT is without."""
    code = "import pathlib; pathlib.Path(__file__).with_name('ran').touch()"
    classes = {"AutoConfig": "configuration_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    config = {**TINY["deepseek_v2"], "auto_map": {**classes, "AutoTokenizer": ["tokenization_own.T", None]}}
    model = write_checkpoint(tmp_path / "model", config, random_weights(config))
    names = [f"{name}_own.py" for name in ("configuration", "modeling", "tokenization")]
    for name in names:
        (model / name).write_text(code)
    quantkit.quantize(
        model, tmp_path / "out", Recipe(scheme="W4A16", group_size=32, samples=4, seq_len=32, calibration=text)
    )
    quantkit.evaluate(tmp_path / "out", model, text, seq_len=32, windows=2)
    quantkit.load(tmp_path / "out").generate(torch.ones(1, 2, dtype=torch.int64), 2)
    assert not list(tmp_path.rglob("ran")) and not any((tmp_path / "out" / name).exists() for name in names)


def without_k(w: dict[str, Tensor]) -> None:
    del w["model.layers.1.self_attn.k_proj.weight"]


def another_q(w: dict[str, Tensor]) -> None:
    w["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(96, 64)


def short_expert(w: dict[str, Tensor]) -> None:
    w["model.layers.1.mlp.experts.3.up_proj.weight"] = torch.zeros(16, 64)


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("llama", without_k, "1 missing.*k_proj"),
        ("deepseek_v2", another_q, "1 unexpected.*q_proj"),
        ("qwen3_moe", short_expert, r"experts.3.up_proj.weight' is F32 \(16, 64\), expected .*\(32, 64\)"),
    ],
)
def test_weights_that_are_not_the_configs(
    name: str, spoil: Callable[[dict[str, Tensor]], None], words: str, tmp_path: Path
) -> None:
    weights = random_weights(TINY[name])
    spoil(weights)
    model = write_checkpoint(tmp_path / "model", TINY[name], weights)
    with pytest.raises(CheckpointError, match=words):
        quantkit.quantize(model, tmp_path / "out", Recipe(scheme="FP8_DYNAMIC"))
    assert not (tmp_path / "out").exists()


def test_linears_that_engines_fuse_read_one_input() -> None:
    layer = build_spec(TINY["deepseek_v2"], "test").layers[1]
    names = [[ref.key.rsplit(".", 1)[-1] for ref in group] for group in layer.same_input()]
    assert names[:4] == [["q_a_proj", "kv_a_proj_with_mqa"], ["q_b_proj"], ["kv_b_proj"], ["o_proj"]]
    assert names[4:] == [["gate_proj", "up_proj"], ["down_proj"]] * 17
