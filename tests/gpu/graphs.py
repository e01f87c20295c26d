"""An expert layer captured in a CUDA graph and replayed with another routing: nothing of a launch depends on what ids are.

In the interpreter there are no graphs: there the layer reads the same static tensors twice, which is what a replay does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from quantkit.kernels.triton import lang
from quantkit.kernels.triton.attention import by_torch, decode_attention
from quantkit.kernels.triton.backend import BACKEND
from quantkit.scheme import PRESETS
from tests.helpers.kernels import close, layer, random_expert

INNER, HIDDEN, EXPERTS, TOKENS = 128, 128, 6, 4


@pytest.fixture(autouse=True)
def seeded(device: torch.device) -> Iterator[None]:
    torch.manual_seed(0)
    yield


def captured(function: Callable[[], object]) -> Callable[[], object]:
    """What replays the launches of `function`."""
    function()  # compiles, and takes memory
    if lang.simulated():
        return function
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@pytest.mark.parametrize("name", ["W4A16", "FP8_DYNAMIC"])
def test_experts_are_replayed_with_another_routing(name: str) -> None:
    scheme = PRESETS[name]
    parts = [random_expert(INNER, HIDDEN, scheme) for _ in range(EXPERTS)]
    experts = BACKEND.experts(parts, EXPERTS, scheme)
    x, ids = torch.empty(TOKENS, HIDDEN).bfloat16(), torch.zeros(TOKENS, 2, dtype=torch.int64)
    weights, out = torch.empty(TOKENS, 2), torch.empty(TOKENS, HIDDEN).bfloat16()
    for tensor in (x, weights):
        tensor.normal_()
    replay = captured(lambda: out.copy_(experts(x, ids, weights)))
    for choice in ([[0, 1]] * TOKENS, [[5, 2], [3, 3], [1, 0], [2, 4]]):
        x.normal_()
        weights.uniform_()
        ids.copy_(torch.tensor(choice))
        out.fill_(float("nan"))
        replay()
        exact, torchs = (layer(x, parts.__getitem__, ids, weights, scheme, exact=exact) for exact in (True, False))
        close(out, torchs, exact)


def test_attention_is_replayed_at_another_length() -> None:
    q, key, value = torch.randn(1, 4, 32), [torch.randn(1, 2, 512, 32)], [torch.randn(1, 2, 512, 32)]
    length, out = torch.tensor([1], dtype=torch.int32), torch.empty(1, 4, 32)
    replay = captured(lambda: out.copy_(decode_attention(q, key, value, length, 0.2)))
    for held in (512, 1, 257, 300):
        length.fill_(held)
        out.fill_(float("nan"))
        replay()
        exact = by_torch(q.double(), key, value, held, 0.2)
        assert (out - exact).abs().max() <= 1e-5
