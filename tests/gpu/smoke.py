"""One launch of each kind of kernel, and the versions they ran with: what fails here makes every other figure worthless."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from quantkit.kernels.cuda import build, decode
from quantkit.kernels.triton import lang, ops, routing
from quantkit.kernels.triton.backend import lacks
from quantkit.kernels.triton.layout import PackedInt, pack
from quantkit.scheme import PRESETS
from tests.helpers.kernels import ON_GPU, close, layer, poison, product, random_expert, random_weight, stacked


@pytest.fixture(autouse=True)
def poisoned(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def test_versions() -> None:
    import numpy
    import transformers
    import triton

    names = ("torch", torch), ("triton", triton), ("numpy", numpy), ("transformers", transformers)
    print("\nPython", sys.version.split()[0], *(f"{name} {module.__version__}" for name, module in names))
    if not lang.simulated():
        properties = torch.cuda.get_device_properties(0)
        print(properties.name, torch.cuda.get_device_capability(), f"{properties.multi_processor_count} processors")
        assert hasattr(F, "grouped_mm"), "the benches compare with torch's grouped product"


@pytest.mark.parametrize("name", ON_GPU)
def test_a_linear_and_a_layer(name: str, device: torch.device) -> None:
    scheme = PRESETS[name]
    if reason := lacks(scheme, device):
        pytest.skip(reason)
    weight, x = random_weight(40, 256, scheme), torch.randn(3, 256).bfloat16()
    close(ops.linear(x, pack(weight, scheme)), product(x, weight, scheme, False), product(x, weight, scheme, True))
    parts = [random_expert(128, 128, scheme) for _ in range(2)]
    x, ids, router = torch.randn(3, 128).bfloat16(), torch.tensor([[0], [1], [1]]), torch.rand(3, 1)
    exact, same = (layer(x, parts.__getitem__, ids, router, scheme, exact) for exact in (True, False))
    close(ops.moe(x, *stacked(parts, scheme), ids, router), same, exact)


def test_slots_are_sorted() -> None:
    slots, owners = routing.sort_by_expert(torch.tensor([[1, 0], [1, 2]]), 3, 2)
    assert slots.tolist()[:6] == [1, 4, 0, 2, 3, 4] and owners.tolist() == [0, 1, 2, -1]


def test_the_cuda_kernel(device: torch.device) -> None:
    if device.type != "cuda":
        return  # tests/kernels/test_cuda_decode.py runs its source on the CPU
    library = build.library()
    assert not isinstance(library, str), library
    scheme = PRESETS["W4A16"]
    weight, x = random_weight(64, 256, scheme), torch.randn(3, 256).bfloat16()
    packed = pack(weight, scheme)
    assert isinstance(packed, PackedInt)
    close(decode.linear(x, packed, library), product(x, weight, scheme, False), product(x, weight, scheme, True))
