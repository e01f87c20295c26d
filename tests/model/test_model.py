"""The reference model against outputs of Hunyuan-Large's released code, and against the mistakes that are easy to make.

Golden data and its tolerance: tests/golden/hunyuan-large, float32. Rounding noise moves logits by at most 2.4e-5; the
smallest of the mistakes below by 3.9.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quantkit.errors import ConfigError
from quantkit.model import blocks
from quantkit.model.attention import Positions, split_heads
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.forward import forward, head
from quantkit.model.gqa import GroupedQuery
from quantkit.model.registry import build_spec
from quantkit.model.spec import GQA, Layer, ModelSpec, MoE
from quantkit.model.weights import Weights
from tests.conftest import CONFIG, random_weights
from tests.helpers.paths import ROOT
from tests.helpers.weights import InMemory

GOLDEN = ROOT / "tests" / "golden" / "hunyuan-large"
TOLERANCE = 1e-4


def golden(top_k: int) -> tuple[ModelSpec, InMemory, dict[str, Tensor]]:
    config = json.loads((GOLDEN / "config.json").read_text())
    spec = build_spec({**config, "moe_topk": top_k}, "golden")
    expected = load_file(GOLDEN / ("golden.safetensors" if top_k == 1 else "golden-topk2.safetensors"))
    return spec, InMemory(load_file(GOLDEN / "model.safetensors")), expected


def check_against_golden(spec: ModelSpec, weights: InMemory, expected: dict[str, Tensor]) -> None:
    ids = expected["input_ids"]
    hidden = torch.empty(0)
    for trace in forward(spec, weights, ids):
        hidden, prefix = trace.hidden, f"layers.{trace.index}"
        assert trace.routing is not None
        k = trace.routing.experts.shape[1]
        assert torch.equal(trace.routing.experts.view(*ids.shape, k), expected[f"{prefix}.selected_experts"]), prefix
        torch.testing.assert_close(
            trace.routing.weights.view(*ids.shape, k), expected[f"{prefix}.applied_weights"], atol=TOLERANCE, rtol=0
        )
        torch.testing.assert_close(hidden, expected[f"{prefix}.hidden"], atol=TOLERANCE, rtol=0)
    logits = head(spec, weights, hidden)
    torch.testing.assert_close(logits, expected["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("top_k", [1, 2])
def test_matches_the_released_code(top_k: int) -> None:
    check_against_golden(*golden(top_k))


def renormalised_top1(monkeypatch: pytest.MonkeyPatch, spec: ModelSpec) -> ModelSpec:
    def layer(original: object) -> object:
        assert isinstance(original, Layer) and isinstance(original.mlp, MoE)
        router = dataclasses.replace(original.mlp.router, renormalise=True)
        return dataclasses.replace(original, mlp=dataclasses.replace(original.mlp, router=router))

    return dataclasses.replace(spec, layers=tuple(layer(x) for x in spec.layers))  # type: ignore[misc]


def with_attention(spec: ModelSpec, change: Callable[[GQA], GQA]) -> ModelSpec:
    def layer(original: Layer) -> Layer:
        assert isinstance(original.attention, GQA)
        return dataclasses.replace(original, attention=change(original.attention))

    return dataclasses.replace(spec, layers=tuple(layer(x) for x in spec.layers))


def norm_before_rope(monkeypatch: pytest.MonkeyPatch, spec: ModelSpec) -> ModelSpec:
    return with_attention(spec, lambda a: dataclasses.replace(a, norm_first=True))


def leader_key_norm(monkeypatch: pytest.MonkeyPatch, spec: ModelSpec) -> ModelSpec:
    def of_leader(a: GQA) -> GQA:
        return dataclasses.replace(a, k_norm=f"model.layers.{a.kv_from}.self_attn.key_layernorm.weight")

    return with_attention(spec, of_leader)


def no_key_norm_on_cross_layers(monkeypatch: pytest.MonkeyPatch, spec: ModelSpec) -> ModelSpec:
    original = GroupedQuery.query

    def without(self: GroupedQuery, a: GQA, x: Tensor, weights: Weights, at: Positions, eps: float) -> Tensor:
        if a.k is not None:
            return original(self, a, x, weights, at, eps)
        q = blocks.apply_rope(split_heads(weights.linear(a.q, x), a.head_dim), *at.tables)
        return blocks.rms_norm(q, weights.tensor(str(a.q_norm)), eps)

    monkeypatch.setattr(GroupedQuery, "query", without)
    return spec


@pytest.mark.parametrize("mistake", [renormalised_top1, norm_before_rope, leader_key_norm, no_key_norm_on_cross_layers])
def test_golden_check_notices(
    mistake: Callable[[pytest.MonkeyPatch, ModelSpec], ModelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weights, expected = golden(1)
    with pytest.raises(AssertionError):
        check_against_golden(mistake(monkeypatch, spec), weights, expected)


def last_hidden(spec: ModelSpec, weights: InMemory, ids: Tensor, cache: Cache | None = None) -> Tensor:
    *_, last = forward(spec, weights, ids, cache)
    return last.hidden


@pytest.mark.parametrize("steps", [[48], [47, 1], [10, 1, 1, 20, 16], [1] * 48])
def test_cached_and_uncached_agree(steps: list[int]) -> None:
    spec, weights, expected = golden(1)
    ids, cache = expected["input_ids"], Cache()
    parts = [head(spec, weights, last_hidden(spec, weights, part, cache)) for part in ids.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected["logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("kv_format", "bound"), [(KVFormat.BF16, 0.05), (KVFormat.FP8, 0.5)])
def test_smaller_cache_formats(kv_format: KVFormat, bound: float) -> None:
    """One prompt in pieces through a BF16 or FP8 cache: logits (of the order of 10 here) move by the format's rounding."""
    spec, weights, expected = golden(1)
    cache = Cache(kv_format)
    parts = [last_hidden(spec, weights, part, cache) for part in expected["input_ids"].split([20, 27, 1], dim=1)]
    moved = (head(spec, weights, torch.cat(parts, dim=1)) - expected["logits"]).square().mean().sqrt()
    assert 1e-5 < moved < bound


def test_cache_grows_in_place_and_scales_follow_tokens() -> None:
    cache, generator = Cache(KVFormat.FP8), torch.Generator().manual_seed(0)
    whole = torch.randn(1, 2, 300, 16, generator=generator) * torch.logspace(-3, 3, 300)[:, None]
    for part in whole.split([1, 63, 1, 200, 35], dim=2):
        key, _ = cache.append(0, (part, part))
    assert key.shape == whole.shape and cache.length == 300
    error = (key.decode() - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert error.max() < 2**-4  # E4M3's relative step, whatever the size of the token
    assert torch.equal(cache.append(0, (torch.zeros(1, 2, 1, 16),) * 2)[0].decode()[:, :, -1], torch.zeros(1, 2, 16))


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize(("kv_format", "token_bytes"), [("float32", 32 * 4), ("bf16", 32 * 2), ("fp8", 32 + 2)])
def test_cache_holds_one_key_and_value_per_group(share: int, kv_format: str, token_bytes: int) -> None:
    config = {**CONFIG, "cla_share_factor": share}
    spec = build_spec(config, "test")
    weights = InMemory({key: value.float() for key, value in random_weights(config).items()})
    cache, ids = Cache(KVFormat(kv_format)), torch.arange(30).view(2, 15)
    last_hidden(spec, weights, ids, cache)
    kv_heads, groups = 2, 4 // share
    assert cache.nbytes() == groups * 2 * ids.numel() * kv_heads * token_bytes
    assert sorted(cache.groups) == list(range(0, 4, share))


def test_hunyuan_large_as_released() -> None:
    """Parameter count and cache bytes of the real model, from its config alone (no weights)."""
    config = {**CONFIG, "hidden_size": 6400, "intermediate_size": 18304, "num_hidden_layers": 64, "vocab_size": 129024}
    spec = build_spec({**config, "num_attention_heads": 80, "num_key_value_heads": 8, "num_experts": 16}, "real")
    shapes = spec.tensors()
    assert len(shapes) == 3778
    assert round(sum(torch.Size(s).numel() for s in shapes.values()) / 1e9, 2) == 388.70
    a = spec.layers[0].attention
    assert len(spec.groups()) * a.kv_width * 2 == 81_920  # bytes of BF16 cache per token


def test_untied_head_and_no_token_dropped() -> None:
    config = {**CONFIG, "tie_word_embeddings": False, "moe_topk": 2}
    spec = build_spec(config, "test")
    tensors = {key: value.float() for key, value in random_weights(config).items()}
    for layer in spec.layers:  # a router that sends every token to the same two experts
        assert isinstance(layer.mlp, MoE)
        tensors[layer.mlp.router.weight] = torch.zeros_like(tensors[layer.mlp.router.weight])
    ids = torch.randint(0, 257, (1, 40), generator=torch.Generator().manual_seed(0))
    whole = last_hidden(spec, InMemory(tensors), ids)
    single = last_hidden(spec, InMemory(tensors), ids[:, :1])
    torch.testing.assert_close(whole[:, :1], single, atol=1e-5, rtol=1e-5)
    assert head(spec, InMemory(tensors), whole).shape == (1, 40, 257)
    assert spec.head == "lm_head.weight" and spec.head in tensors


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("rope_scaling", {"type": "yarn", "alpha": 1.0}),
        ("moe_topk", [1, 2]),
    ],
)
def test_unknown_values_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field.split("_")[0]):
        build_spec({**CONFIG, field: value}, "config.json")
