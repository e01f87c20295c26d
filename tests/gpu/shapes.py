"""On a GPU only (`make gpu-test`): the shapes of real models, the CUDA kernel beside Triton's, and the bundled model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

import quantkit
from quantkit.kernels.backend import Expert
from quantkit.kernels.cuda import build, decode
from quantkit.kernels.triton import ops, serve
from quantkit.kernels.triton.backend import BACKEND, lacks
from quantkit.kernels.triton.layout import PackedInt, pack
from quantkit.measure.trace import Bf16Products
from quantkit.model.forward import forward, head
from quantkit.recipe import Recipe
from quantkit.scheme import PRESETS, Scheme
from tests.helpers.kernels import ON_GPU, close, layer, poison, product, random_expert, random_weight
from tests.helpers.paths import ROOT

DEMO = ROOT / "examples" / "tiny-hunyuan"


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer."""

    hidden: int
    inner: int
    experts: int
    top_k: int


SHAPES = {
    "hunyuan-large": Shape(6400, 18304, 16, 1),
    "hunyuan-a13b": Shape(4096, 3072, 64, 8),
    "mixtral-8x22b": Shape(6144, 16384, 8, 2),
    "deepseek-v2": Shape(5120, 1536, 160, 6),
}


@pytest.fixture(autouse=True)
def on_a_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def able(scheme: Scheme) -> None:
    if reason := lacks(scheme, torch.device("cuda")):
        pytest.skip(reason)


def expert_of(shape: Shape, scheme: Scheme, index: int) -> Expert:
    """Made anew each time it is asked for: a layer of them and their packed form would fill the memory."""
    torch.manual_seed(index)
    return random_expert(shape.inner, shape.hidden, scheme)


@pytest.fixture(scope="module")
def library() -> build.Library:
    found = build.library()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize("model", SHAPES)
def test_a_layer_of_a_real_model(model: str, name: str) -> None:
    """Few tokens, as many as fill a block, and many; whatever kernel the backend chooses for them."""
    shape, scheme = SHAPES[model], PRESETS[name]
    able(scheme)
    expert: Callable[[int], Expert] = partial(expert_of, shape, scheme)
    experts = BACKEND.experts((expert(e) for e in range(shape.experts)), shape.experts, scheme)
    for tokens in (1, 5, 64, 700):
        torch.manual_seed(tokens)
        x, router = torch.randn(tokens, shape.hidden).bfloat16(), torch.rand(tokens, shape.top_k)
        ids = torch.rand(tokens, shape.experts).topk(shape.top_k).indices
        exact, same = (layer(x, expert, ids, router, scheme, exact) for exact in (True, False))
        close(experts(x, ids, router), same, exact)


@pytest.mark.parametrize("name", ON_GPU)
@pytest.mark.parametrize(("rows", "columns"), [(6400, 6400), (18304, 6400), (6400, 18304), (4096, 3072)])
def test_a_linear_of_a_real_model(rows: int, columns: int, name: str) -> None:
    scheme = PRESETS[name]
    able(scheme)
    weight = random_weight(rows, columns, scheme)
    kernel = BACKEND.linear(weight, scheme)
    for tokens in (1, 16, 17, 100, 1000, 2500):
        x = torch.randn(tokens, columns)
        close(kernel(x), product(x, weight, scheme, False), product(x, weight, scheme, True))


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
@pytest.mark.parametrize("model", SHAPES)
def test_the_cuda_kernel_beside_triton(model: str, name: str, library: build.Library) -> None:
    shape, scheme = SHAPES[model], PRESETS[name]
    expert: Callable[[int], Expert] = partial(expert_of, shape, scheme)
    experts = BACKEND.experts((expert(e) for e in range(shape.experts)), shape.experts, scheme)
    assert isinstance(experts, serve.Experts)
    gate_up, down = experts.gate_up, experts.down
    assert isinstance(gate_up, PackedInt) and isinstance(down, PackedInt)
    for tokens in (1, 3, 16):
        x, router = torch.randn(tokens, shape.hidden).bfloat16(), torch.rand(tokens, shape.top_k)
        ids = torch.rand(tokens, shape.experts).topk(shape.top_k).indices
        exact, same = (layer(x, expert, ids, router, scheme, exact) for exact in (True, False))
        ours, theirs = decode.moe(x, gate_up, down, ids, router, library), ops.moe(x, gate_up, down, ids, router)
        close(ours, same, exact)
        close(theirs, same, exact)


@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
def test_the_cuda_kernel_as_a_linear(tokens: int, library: build.Library) -> None:
    scheme = PRESETS["W4A16"]
    for rows, columns in ((6400, 18304), (18304, 6400), (33, 384)):
        weight, x = random_weight(rows, columns, scheme), torch.randn(tokens, columns)
        packed = pack(weight, scheme)
        assert isinstance(packed, PackedInt)
        close(decode.linear(x, packed, library), product(x, weight, scheme, False), product(x, weight, scheme, True))


def test_a_launch_that_fails_says_so(library: build.Library) -> None:
    with pytest.raises(RuntimeError, match=r"CUDA error \d+"):
        library.run(*[None] * 9, 1, 7, 1, 1, 1, 8, 256, 128, 0, 0, None)


@pytest.mark.parametrize("name", ["W4A16", "FP8_DYNAMIC"])
def test_the_bundled_model_generates(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # no poison: this is the whole program
    torch.set_default_device(None)
    able(PRESETS[name])
    quantkit.quantize(DEMO, tmp_path / "out", Recipe(scheme=name, method="rtn", samples=16))
    fast = quantkit.load(tmp_path / "out", device="cuda")
    slow = quantkit.load(tmp_path / "out", device="cuda", kernels="reference")
    assert {row["kernel"] for row in fast.explain()} == {"triton"}
    ids = torch.randint(1, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    here, there = fast.logits(ids).log_softmax(-1), slow.logits(ids).log_softmax(-1)
    with torch.inference_mode():  # the reference in the kernels' precision: BF16 moves inputs across the steps of FP8
        *_, last = forward(slow.spec, rounded := Bf16Products(slow.weights), ids.cuda())
        same = head(slow.spec, rounded, last.hidden).log_softmax(-1)
    ours, theirs = (float((there.exp() * (there - other)).sum(-1).mean()) for other in (here, same))
    assert ours <= 2 * theirs, f"{ours:.2e} nats, and {theirs:.2e} in BF16 products of torch"
    text = fast.generate(ids, 24)
    assert text.shape == (2, 88) and torch.equal(text[:, :64].cpu(), ids)
    scores = slow.logits(text)[:, 63:-1]
    behind = scores.amax(-1) - scores.gather(-1, text[:, 64:, None])[..., 0]
    assert float(behind.flatten().quantile(0.9)) < 0.2  # what was drawn is, or nearly is, the reference's best
