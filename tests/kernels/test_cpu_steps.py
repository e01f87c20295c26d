"""Halves of a layer in one call: `model.layer`'s values, on every cache, with padding, borrowed K and V, and odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import quantkit
from quantkit.kernels.backend import QuantLinear
from quantkit.kernels.cpu import backend, build, steps
from quantkit.kernels.cpu.linear import gather, matmul, plain
from quantkit.model.attend import FEW
from quantkit.model.attention import Positions
from quantkit.model.cache import Cache, KVFormat, KVStore
from quantkit.model.layer import attention_half
from quantkit.model.spec import GQA, MLP, Layer, Linear, Role
from quantkit.model.weights import PlainWeights, Weights
from quantkit.recipe import Recipe
from quantkit.run.fused import FusedHalves
from quantkit.run.weights import KernelWeights
from tests.conftest import CONFIG, random_weights, write_checkpoint
from tests.helpers.architectures import TINY

LIBRARY = build.load()
pytestmark = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no CPU kernels: {LIBRARY}")
FORMATS = [KVFormat.FLOAT32, KVFormat.BF16, KVFormat.FP8]
HIDDEN = 40
# heads, key heads, width of a head: alone, groups that are no multiple of four, widths that fill no register.
SHAPES = [(1, 1, 4), (6, 2, 20), (10, 2, 80), (3, 3, 64), (9, 3, 128)]


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a step leaves unwritten shows."""
    torch.manual_seed(0)
    empty = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **how: empty(x, **how).fill_(float("nan")))


class OnRows(Weights):
    """BF16 weights on the library's rows, each linear alone; with `fused`, in the steps that it has."""

    def __init__(self, tensors: dict[str, Tensor], fused: bool) -> None:
        self.tensors, found = tensors, backend.AVX512.steps(torch.device("cpu"))
        assert not isinstance(found, str)
        self.plain = found.plain
        self.halves = FusedHalves(found if fused else "asked for", self)

    def few(self, ref: Linear) -> QuantLinear:
        return self.plain(self.tensors[ref.weight])

    def has_few(self, ref: Linear) -> bool:
        return True

    def together(self, parts: tuple[MLP, ...]) -> None:
        return None

    def has_together(self, parts: tuple[MLP, ...]) -> bool:
        return False

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        return self.few(ref)(x)

    def attention_half(self, layer: Layer, h: Tensor, at: Positions, store: KVStore) -> Tensor | None:
        return self.halves.attention_half(layer, h, at, store)


def layer_of(shape: tuple[int, int, int], norms: str, borrows: bool = False) -> tuple[Layer, dict[str, Tensor]]:
    heads, kv_heads, d = shape

    def linear(key: str, out: int, inputs: int) -> Linear:
        return Linear(key, out, inputs, Role.ATTENTION)

    k, v = (None if borrows else linear(key, kv_heads * d, HIDDEN) for key in "kv")
    q, o = linear("q", heads * d, HIDDEN), linear("o", HIDDEN, heads * d)
    names = ("q_norm", "k_norm") if norms else (None, None)
    a = GQA(q, k, v, o, *names, heads, kv_heads, d, 0 if borrows else 1, norms == "before")
    mlp = MLP(*(linear(key, HIDDEN, HIDDEN) for key in ("gate", "up", "down")))
    layer = Layer(1, 1e-5, "norm", "norm", a, mlp)
    shapes = {**layer.kept(), **{ref.weight: (ref.out_features, ref.in_features) for ref in layer.linears()}}
    return layer, {
        key: (torch.randn(s) * s[-1] ** -0.5 if len(s) > 1 else torch.rand(s) + 0.5).bfloat16() for key, s in shapes.items()
    }


def half(
    layer: Layer, weights: Weights, h: Tensor, how: KVFormat, past: int, padding: Tensor | None
) -> tuple[Tensor, Cache]:
    """One half over a cache that holds `past` positions of both groups, with NaN where nothing is held."""
    a, (batch, time, _) = layer.attention, h.shape
    assert isinstance(a, GQA)
    cache, generator = Cache(how, padding), torch.Generator().manual_seed(1)
    for owner in (0, 1):
        before = past + time if owner == 0 and a.k is None else past
        kv = torch.randn(2, batch, a.kv_heads, before, a.head_dim, generator=generator)
        if before:
            cache.append(owner, (kv[0], kv[1]))
            for part in (part for buffer in cache.groups[owner] for part in buffer.parts):
                part[:, :, before:] = float("nan")
    angles = torch.rand(batch if padding is not None else 1, 1, time, a.head_dim, generator=generator)
    tables = (angles.cos(), angles.sin()) if padding is not None else (angles.cos()[0, 0], angles.sin()[0, 0])
    to = h.dtype if h.dtype is torch.float64 else torch.float32
    return attention_half(layer, h, weights, Positions((tables[0].to(to), tables[1].to(to)), padding), cache), cache


def check(
    layer: Layer, tensors: dict[str, Tensor], h: Tensor, how: KVFormat, past: int, padding: Tensor | None = None
) -> None:
    exact, _ = half(layer, PlainWeights(lambda key: tensors[key].float()), h, how, past, padding)
    apart, _ = half(layer, OnRows(tensors, fused=False), h, how, past, padding)
    weights = OnRows(tensors, fused=True)
    fused, cache = half(layer, weights, h, how, past, padding)
    assert not isinstance(weights.halves.attention(layer), str)
    added = exact - h
    errors = [float((got - exact).norm() / added.norm()) for got in (fused, apart)]
    assert fused.shape == h.shape and errors[0] <= 2 * errors[1] + 1e-6, errors
    assert isinstance(layer.attention, GQA)
    if layer.attention.k is not None:
        assert cache.groups[1][0].length == past + h.shape[1] and all(
            buffer.view().decode().isfinite().all() for buffer in cache.groups[1]
        )


@pytest.mark.parametrize("norms", ["", "before", "after"])
@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_is_the_layers(shape: tuple[int, int, int], how: KVFormat, norms: str) -> None:
    layer, tensors = layer_of(shape, norms)
    for batch, time, past in ((1, 1, 0), (1, 1, 5), (2, 1, 300), (1, 3, 255), (3, FEW, 700)):
        check(layer, tensors, torch.randn(batch, time, HIDDEN), how, past)


@pytest.mark.parametrize("how", FORMATS)
def test_attention_with_padding_and_of_another_layers_keys(how: KVFormat) -> None:
    for norms in ("", "before", "after"):
        layer, tensors = layer_of((6, 2, 20), norms)
        check(layer, tensors, torch.randn(3, 1, HIDDEN), how, 290, torch.tensor([0, 270, 12]))
        check(layer, tensors, torch.randn(2, 4, HIDDEN), how, 0, torch.tensor([2, 0]))
        layer, tensors = layer_of((6, 2, 20), norms, borrows=True)
        check(layer, tensors, torch.randn(2, 1, HIDDEN), how, 40)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", FORMATS)
def test_what_is_not_finite_is_not_hidden(how: KVFormat, bad: float) -> None:
    layer, tensors = layer_of((6, 2, 20), "")
    h = torch.randn(2, 1, HIDDEN)
    h[1, 0, 3] = bad
    out, _ = half(layer, OnRows(tensors, fused=True), h, how, 20, None)
    assert out[0].isfinite().all() and not out[1].isfinite().all()


def test_positions_are_kept_as_torch_keeps_them() -> None:
    """The same codes and scales, but for what the last bits of a product turn."""
    layer, tensors = layer_of((4, 2, 36), "")
    h = torch.randn(2, 5, HIDDEN) * torch.logspace(-2, 2, 5)[:, None]
    for how in FORMATS:
        held = [half(layer, OnRows(tensors, fused), h, how, 3, None)[1].groups[1] for fused in (False, True)]
        for apart, fused in zip(*held, strict=True):
            difference = (apart.view().decode() - fused.view().decode()).abs()
            step = {KVFormat.FLOAT32: 2**-20, KVFormat.BF16: 2**-7, KVFormat.FP8: 2**-3}[how]
            largest = apart.view().decode().abs().amax(-1, keepdim=True)
            assert (difference <= step * largest).all() and (difference > 2**-20 * largest).float().mean() < 0.02


@pytest.mark.parametrize("rows", [1, 3, 16, 37, 200])
@pytest.mark.parametrize("inputs", [1, 7, 32, 100, 576])
def test_rows_as_they_are_stored(rows: int, inputs: int) -> None:
    weight = torch.randn(rows, inputs).bfloat16()
    for tokens in (0, 1, 2, 4, 7, 33):
        x = torch.randn(tokens, inputs).bfloat16()
        y = matmul(x, gather([plain(weight)]), torch.full((tokens, rows), float("nan")))
        wanted = F.linear(x.double(), weight.double())
        allowed = 2 * (F.linear(x, weight).double() - wanted).abs().max() if tokens else 0
        assert not tokens or (y - wanted).abs().max() <= allowed
    for bad in (weight.float(), weight[:0], weight[0]):
        with pytest.raises(ValueError, match="bfloat16"):
            plain(bad)


def test_threads_do_not_change_the_result() -> None:
    layer, tensors = layer_of((9, 3, 64), "after")
    h = torch.randn(2, 2, HIDDEN)
    single, _ = half(layer, OnRows(tensors, fused=True), h, KVFormat.BF16, 600, None)
    try:
        torch.set_num_threads(3)
        assert torch.equal(half(layer, OnRows(tensors, fused=True), h, KVFormat.BF16, 600, None)[0], single)
    finally:
        torch.set_num_threads(1)


# Whole models

RECIPES: dict[str, dict[str, Any]] = {
    "INT4": {"scheme": "W4A16", "group_size": 32},
    "FP8": {"scheme": "FP8_DYNAMIC"},
    "mixed": {"experts": "W4A16", "scheme": "W8A16", "group_size": 32},
    "attention kept": {"scheme": "W4A16", "attention": "BF16", "group_size": 32},
}


MODELS = [
    *(("hunyuan", recipe) for recipe in RECIPES),
    *(("mixtral", "mixed"), ("qwen3_moe", "INT4"), ("llama", "FP8"), ("llama tied, transformers 5", "attention kept")),
]


@pytest.mark.parametrize(("name", "recipe"), MODELS)
def test_a_model_decodes_as_it_does_in_single_calls(
    name: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG if name == "hunyuan" else TINY[name]
    source = write_checkpoint(tmp_path / "model", config, random_weights(config))
    quantkit.quantize(source, tmp_path / "out", Recipe(**RECIPES[recipe], method="rtn", samples=2, seq_len=32))
    model, exact = quantkit.load(tmp_path / "out"), quantkit.load(tmp_path / "out", kernels="reference")
    assert isinstance(model.weights, KernelWeights)
    ids, called = torch.randint(1, 257, (2, 24)), {"attention": 0, "mlp": 0}

    def counted(kind: type, what: str) -> None:
        call: Callable[..., Any] = kind.__call__  # type: ignore[operator]

        def count(*given: Any) -> Any:
            called[what] += 1
            return call(*given)

        monkeypatch.setattr(kind, "__call__", count)

    counted(steps.AttentionHalf, "attention")
    counted(steps.MlpHalf, "mlp")

    def decoded(loaded: quantkit.Model) -> Tensor:
        cache = Cache(KVFormat.FLOAT32)
        return torch.cat([loaded.logits(part, cache)[:, -1:] for part in ids.split([17, 1, 1, 3, 1, 1], dim=1)], dim=1)[
            :, 1:
        ]

    fused, layers = decoded(model), len(model.spec.layers)
    assert called == {"attention": 5 * layers, "mlp": 5 * layers}
    assert {row["kernel"] for row in model.explain_decoding()} == {"cpu-avx512"}
    model.weights.halves = FusedHalves("asked for", model.weights)
    assert {(row["kernel"], row["why"]) for row in model.explain_decoding()} == {("single calls", "asked for")}
    apart, right = decoded(model), decoded(exact)
    assert called["mlp"] == 5 * layers
    errors = [(got - right).norm(dim=-1) / right.norm(dim=-1) for got in (fused, apart)]
    # A router near a tie may turn on last bits, and then so does the rest of a token.
    assert errors[0].median() <= 2 * errors[1].median() + 1e-3
