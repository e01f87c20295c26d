"""The wrappers' own launches compiled for Hopper, with a driver that is not there: their arguments bind, types and
alignment are what a GPU would see, and nothing runs."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from quantkit.kernels.triton import activation, lang, ops, routing, w8a8, weight_only
from quantkit.kernels.triton.layout import PackedInt, pack
from quantkit.scheme import PRESETS
from tests.helpers.kernels import random_expert, random_weight, stacked
from tests.helpers.paths import ROOT

BENCH = ROOT / "bench"
KERNELS = {
    "product": (weight_only, "kernel"),
    "widen": (weight_only, "widen_kernel"),
    "product8": (w8a8, "kernel"),
    "quantize": (activation, "quantize_kernel"),
    "sort": (routing, "sort_kernel"),
}


class Hopper:
    """As much of Triton's driver as compiling asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """(kernel, what it compiled to) of each launch."""
    if not lang.available() or lang.simulated():
        pytest.skip("Triton is not installed, or its interpreter is on")
    from triton.runtime import driver

    found: list[tuple[str, Any]] = []

    class Compiles:
        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(*given: Any, **named: Any) -> None:
                found.append((self.name, self.kernel.run(*given, grid=grid, warmup=True, **named)))

            return launch

    for name, (module, attribute) in KERNELS.items():
        monkeypatch.setattr(module, attribute, Compiles(name, getattr(module, attribute)))
        for called, answer in (("on_device", None), ("machine", (132, 227 * 1024))):
            monkeypatch.setattr(module, called, lambda *_, answer=answer: answer, raising=False)
    monkeypatch.setattr(driver, "_active", Hopper())
    return found


def test_one_token_is_not_sorted_and_its_output_not_summed(
    launched: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launches are all that one token of a top-1 layer takes."""
    scheme = PRESETS["W4A16"]
    gate_up, down = stacked([random_expert(128, 256, scheme) for _ in range(2)], scheme)
    monkeypatch.setattr(routing, "simulated", lambda: True)  # as a GPU's ids would go
    summed: list[Any] = []
    real = torch.Tensor.sum
    monkeypatch.setattr(torch.Tensor, "sum", lambda *a, **k: (summed.append(a), real(*a, **k))[1])
    ops.moe(torch.randn(1, 256).bfloat16(), gate_up, down, torch.tensor([[1]]), torch.rand(1, 1))
    assert [kernel for kernel, _ in launched] == ["product"] * 2 and not summed
    ops.moe(torch.randn(2, 256).bfloat16(), gate_up, down, torch.tensor([[1], [0]]), torch.rand(2, 1))
    assert [kernel for kernel, _ in launched] == ["product"] * 2 + ["sort", "product", "product"]


def test_the_fused_baseline_compiles(launched: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    dense = importlib.import_module("gpu_dense")
    monkeypatch.setattr(dense, "dense_kernel", type(weight_only.kernel)("dense", dense.dense_kernel))
    monkeypatch.setattr(dense, "machine", lambda _: (132, 227 * 1024))
    x, gate_up, down = (
        torch.randn(3, 128).bfloat16(),
        torch.randn(2, 256, 128).bfloat16(),
        torch.randn(2, 128, 128).bfloat16(),
    )
    for tile in dense.TABLE:
        monkeypatch.setattr(dense, "TABLE", ((float("inf"), tile[1]),))
        dense.moe(x, torch.tensor([[0], [1], [1]]), torch.rand(3, 1), gate_up, down)
    built = [found for kernel, found in launched if kernel == "dense"]
    assert len(built) == 8
    for each in built:
        assert ".local" not in each.asm["ptx"] and "wgmma.mma_async" in each.asm["ptx"] and "cp.async" in each.asm["ptx"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("W4A16", ["product"] * 3), ("FP8", ["quantize", "product8"] * 3), ("FP8_BLOCK", ["quantize", "product8"] * 3)],
)
def test_launches_bind_and_compile(name: str, expected: list[str], launched: list[tuple[str, Any]]) -> None:
    scheme = PRESETS[name]
    gate_up, down = stacked([random_expert(128, 256, scheme) for _ in range(2)], scheme)
    ops.moe(torch.randn(3, 256), gate_up, down, torch.tensor([[0], [1], [1]]), torch.rand(3, 1))
    ops.linear(torch.randn(1, 256).bfloat16(), pack(random_weight(64, 256, scheme), scheme))
    assert [kernel for kernel, _ in launched] == expected
    for kernel, built in launched:
        ptx = built.asm["ptx"]
        assert ".local" not in ptx and (kernel == "quantize" or "wgmma.mma_async" in ptx)
        assert "cp.async" in ptx or kernel == "quantize"


def test_helpers_bind_and_compile(launched: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = pack(random_weight(40, 256, PRESETS["W8A16"]), PRESETS["W8A16"])
    assert isinstance(weight, PackedInt)
    ops.linear_by_scratch(torch.zeros(1, 256), weight)
    monkeypatch.setattr(routing, "simulated", lambda: True)  # as a GPU's ids would go
    routing.group(torch.tensor([[0, 1], [1, 4]]), 5, 16)
    assert [kernel for kernel, _ in launched] == ["widen", "sort"]
