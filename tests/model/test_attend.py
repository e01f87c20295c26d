"""Attention over what is kept: the definition's values, and memory that grows with neither heads nor the cache's width."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.model import attend as module
from quantkit.model.attend import attend
from quantkit.model.attention import Positions
from quantkit.model.cache import Cache, Kept, KeptKV, KVFormat
from quantkit.model.mla import Latent
from quantkit.model.registry import build_spec
from quantkit.model.spec import MLA, Linear
from quantkit.model.weights import Weights
from quantkit.recipe import Recipe
from quantkit.run.weights import Kernels
from tests.conftest import random_weights, write_checkpoint
from tests.helpers.architectures import TINY
from tests.helpers.counting import ran

FORMATS = [KVFormat.FLOAT32, KVFormat.BF16, KVFormat.FP8]


def by_definition(q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None = None) -> Tensor:
    """Head by head, position by position, in float64."""
    b, heads, t, d = q.shape
    s, group = k.shape[2], heads // k.shape[1]
    out = torch.zeros(b, t, heads, v.shape[-1], dtype=torch.float64)
    for row in range(b):
        first = 0 if padding is None else int(padding[row])
        for i in range(t):
            last = s - t + i
            seen = slice(min(first, last), last + 1)
            for h in range(heads):
                p = ((k[row, h // group, seen].double() @ q[row, h, i].double()) * d**-0.5).softmax(0)
                out[row, i, h] = p @ v[row, h // group, seen].double()
    return out.flatten(2)


def kept(kv_format: KVFormat, k: Tensor, v: Tensor) -> tuple[Kept, Kept]:
    return Cache(kv_format).append(0, (k, v))


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("padding", [None, [0, 5]], ids=["", "padded"])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (1, 70), (3, 70), (8, 9), (20, 20), (20, 70)])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_is_the_definition(
    kv_format: KVFormat, t: int, s: int, padding: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in blocks of 64 positions and masks of a few rows; dv is not d."""
    monkeypatch.setattr("quantkit.model.cache._BLOCK", 1)
    monkeypatch.setattr(module, "_MASK", 400)
    q, k, v = draw(2, 6, t, 8), draw(2, 2, s, 8, seed=1), draw(2, 2, s, 4, seed=2)
    given = None if padding is None else torch.tensor(padding)
    key, value = kept(kv_format, k, v)
    if padding and s == 1:
        given = None
    expected = by_definition(q, key.decode(), value.decode(), given)
    torch.testing.assert_close(attend(q, key, value, padding=given).double(), expected, atol=2e-6, rtol=0)


def test_every_code_is_decoded() -> None:
    """By shifts, as torch does by its own way."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()].view(1, 1, 1, -1)
    scale = torch.full((1, 1, 1, 1), 0.75).bfloat16()
    assert torch.equal(Kept(codes, scale).decode(), codes.float() * 0.75)
    assert torch.equal(torch.cat([*Kept(codes, scale).blocks()], dim=2), codes.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kv_format", FORMATS)
def test_what_is_not_finite_is_not_hidden(kv_format: KVFormat, bad: float) -> None:
    k = draw(1, 2, 40, 8)
    for spoilt in ((k.index_fill(2, torch.tensor([7]), bad), k), (k, k.index_fill(2, torch.tensor([7]), bad))):
        assert not attend(draw(1, 4, 1, 8), *kept(kv_format, *spoilt)).isfinite().all()


@pytest.mark.parametrize("kv_format", FORMATS)
def test_a_token_decodes_no_cache_and_copies_no_head(kv_format: KVFormat) -> None:
    """16 query heads on 2 keys of 8,192 positions: scores, and blocks of some positions, which all heads share."""
    heads, kv_heads, s, d = 16, 2, 8192, 128
    key, value = kept(kv_format, draw(1, kv_heads, s, d), draw(1, kv_heads, s, d))
    memory = ran(lambda: attend(draw(1, heads, 1, d), key, value))
    whole = kv_heads * s * d * 4
    assert memory.largest <= whole // 8
    passes = {KVFormat.FLOAT32: 0, KVFormat.BF16: 2, KVFormat.FP8: 4}[kv_format]  # each block once for key, once for value
    assert memory.total <= passes * whole + 8 * heads * s * 4
    cache = Cache(kv_format)
    cache.append(0, (draw(1, kv_heads, s, d),) * 2)
    more = draw(1, kv_heads, 1, d)
    assert ran(lambda: cache.append(0, (more, more))).total < 2**16  # nor does keeping one more


@pytest.mark.parametrize(("t", "s"), [(2048, 2048), (1024, 2048)])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("width", [32, 16])
def test_a_prompts_memory_is_not_its_square(t: int, s: int, padded: bool, width: int) -> None:
    """Scores of 16 heads would be 268 MB; the values of MLA are narrower than its keys."""
    q, k, v = draw(1, 16, t, 32), Kept(draw(1, 4, s, 32)), Kept(draw(1, 4, s, width))
    memory = ran(lambda: attend(q, k, v, padding=torch.tensor([3]) if padded else None))
    assert memory.largest <= 2**24 and memory.total <= 2**27


# Latent attention


def latents(s: int) -> tuple[MLA, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Attention of a small DeepSeek-V2, its kv_b, and a query and the latents of s positions."""
    a = build_spec(TINY["deepseek_v2"], "test").layers[0].attention
    assert isinstance(a, MLA)
    q = draw(2, a.heads, 1, a.nope_dim + a.rope_dim)
    weight = draw(a.kv_b.out_features, a.rank, seed=3) * a.rank**-0.5
    return a, weight, q, (draw(2, 1, s, a.rank, seed=1), draw(2, 1, s, a.rope_dim, seed=2))


class OfKVB(Weights):
    """kv_b alone; counts the rows that are projected through it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.calls = weight, list[int]()

    def tensor(self, key: str) -> Tensor:
        raise AssertionError(key)

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        self.calls.append(x.shape[:-1].numel())
        return x @ self.weight.T

    def matrix(self, ref: Linear) -> Tensor:
        return self.weight


def expanded_form(a: MLA, q: Tensor, held: KeptKV, weight: Tensor, padding: Tensor | None) -> Tensor:
    both = (held[0].decode()[:, 0] @ weight.T).unflatten(-1, (a.heads, -1)).transpose(1, 2)
    plain, values = both.split((a.nope_dim, a.v_dim), dim=-1)
    keys = torch.cat((plain, held[1].decode().expand(-1, a.heads, -1, -1)), dim=-1)
    return attend(q, Kept(keys), Kept(values), a.scale, padding)


def core(a: MLA, q: Tensor, held: KeptKV, weights: Weights, padding: Tensor | None = None) -> Tensor:
    return Latent().core(a, q, held, weights, Positions((q, q), padding))


def test_decoding_projects_nothing_through_kv_b() -> None:
    """Its halves meet the new token alone; the values are those of the expanded form."""
    a, weight, q, kv = latents(300)
    for kv_format in FORMATS:
        held = kept(kv_format, *kv)
        for padding in (None, torch.tensor([0, 9])):
            weights = OfKVB(weight)
            expanded, absorbed = expanded_form(a, q, held, weight, padding), core(a, q, held, weights, padding)
            torch.testing.assert_close(absorbed, expanded, atol=1e-5, rtol=1e-4)
            half = core(a, q, held, OfKVB(weight.bfloat16()), padding)
            assert weights.calls == [] and 0 < (half - expanded).norm() / expanded.norm() < 2**-7


def test_a_prompt_goes_through_kv_b_once() -> None:
    a, weight, _, kv = latents(300)
    weights, q = OfKVB(weight), draw(2, a.heads, 300, a.nope_dim + a.rope_dim)
    held = kept(KVFormat.FLOAT32, *kv)
    torch.testing.assert_close(core(a, q, held, weights), expanded_form(a, q, held, weight, None))
    assert weights.calls == [600]


def test_decoding_from_latents_is_flat_but_for_attention() -> None:
    """Memory for 4 times the positions: more by the scores alone, not by keys and values of all heads."""
    sizes = []
    for s in (1000, 4000):
        a, weight, q, kv = latents(s)
        held, weights = kept(KVFormat.FLOAT32, *kv), OfKVB(weight)
        sizes.append(ran(lambda a=a, q=q, held=held, weights=weights: core(a, q, held, weights)).total)  # type: ignore[misc]
    scores, expanded = 3000 * 2 * a.heads * 4, 3000 * 2 * a.heads * (a.nope_dim + a.v_dim) * 4
    assert sizes[1] - sizes[0] <= 8 * scores < expanded


SCHEMES = {"W4A16": {"group_size": 32}, "W8A8": {}, "FP8_DYNAMIC": {}, "FP8": {}, "BF16": {}}


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, config = tmp_path_factory.mktemp("deepseek"), TINY["deepseek_v2"]
    source = write_checkpoint(root / "source", config, random_weights(config))

    def make(scheme: str) -> Path:
        if not (root / scheme).exists():
            fields: dict[str, Any] = {"experts": "W4A16", "scheme": "W8A16", "attention": scheme, "group_size": 32}
            quantkit.quantize(source, root / scheme, Recipe(**fields, method="rtn", samples=2, seq_len=32))
        return root / scheme

    return make


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_decoded_tokens_are_those_of_the_whole(scheme: str, kernels: Kernels, deepseek: Callable[[str], Path]) -> None:
    """Also where kv_b rounds its input: a latent is kept as kv_b reads it. On kernels, which multiply in BF16, within what
    these themselves differ from the reference."""
    model, exact = quantkit.load(deepseek(scheme), kernels=kernels), quantkit.load(deepseek(scheme), kernels="reference")
    ids = torch.randint(1, 257, (2, 40), generator=torch.Generator().manual_seed(5))
    seen: list[str] = []
    plain = model.weights.linear
    model.weights.linear = lambda ref, x: seen.append(ref.key) or plain(ref, x)  # type: ignore[method-assign,func-returns-value]
    whole, cache = model.logits(ids), Cache(KVFormat.FLOAT32)
    model.logits(ids[:, :30], cache)
    assert any("kv_b" in key for key in seen)
    seen.clear()
    parts = [model.logits(part, cache) for part in ids[:, 30:].split(1, dim=1)]
    assert seen and not any("kv_b" in key for key in seen)
    moved = (torch.cat(parts, dim=1) - whole[:, 30:]).norm(dim=-1) / whole[:, 30:].norm(dim=-1)
    noise = (exact.logits(ids) - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert moved.median() < max(1e-5, 2 * float(noise.median()))


def test_a_prompt_gives_the_logits_of_its_last_position(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, asked = quantkit.load(model), []
    plain = loaded.head
    monkeypatch.setattr(loaded, "head", lambda hidden: asked.append(hidden.shape[:-1].numel()) or plain(hidden))
    ids = torch.arange(1, 41).view(2, 20)
    loaded.generate(ids, 3)
    assert asked == [2, 2, 2]
    # Few rows are not rounded to BF16 at the end, as torch's product of many is.
    torch.testing.assert_close(loaded.logits(ids, last=1), loaded.logits(ids)[:, -1:], atol=0.02, rtol=2**-7)
    assert loaded.logits(ids, last=5).shape == (2, 5, 257)
