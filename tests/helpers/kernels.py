"""Random quantized weights, what a product of them is by definition, and memory that shows what a kernel failed to write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.backend import Expert
from quantkit.kernels.reference import round_activation
from quantkit.kernels.triton.layout import Packed, Stack, join, pack
from quantkit.qtensor import QuantizedTensor
from quantkit.quant import loops
from quantkit.scheme import PRESETS, Grid, Kind, Scheme

__all__ = ["check_repair", "close", "either_sign", "layer", "poison", "product", "random_expert", "random_weight", "stacked"]

ON_GPU = [name for name in PRESETS if name != "W4AFP8"]  # presets that have a GPU kernel


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixes the seed and fills every torch.empty with NaN (integers: their smallest value)."""
    torch.manual_seed(0)

    def empty(*shape: Any, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        size = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        value = torch.full(size, float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min, device=device)
        return value.to(dtype)

    monkeypatch.setattr(torch, "empty", empty)


def either_sign(scale: Tensor, grid: Grid) -> Tensor:
    """Half of the scales negative, where a grid has such."""
    return torch.where(torch.rand(scale.shape, device=scale.device) < 0.5, -scale, scale) if grid.signed else scale


def random_weight(rows: int, columns: int, scheme: Scheme, input_scale: float = 0.01) -> QuantizedTensor:
    """Random codes over the whole grid, and scales that make its products of order 1."""
    grid = scheme.weight
    shape = grid.scale_shape(rows, columns)
    zero = None if grid.symmetric else torch.randint(-8, 8, shape, dtype=torch.int8)
    if grid.kind is Kind.FLOAT:
        codes = (torch.randn(rows, columns) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    else:
        codes = torch.randint(int(grid.qmin), int(grid.qmax) + 1, (rows, columns), dtype=torch.int8)
    scale = (torch.rand(shape) + 0.5) / (grid.qmax * columns**0.5)
    scale = either_sign(scale, grid)
    static = torch.tensor([input_scale]).bfloat16() if scheme.static else None
    return QuantizedTensor(codes, scale.bfloat16(), zero, grid, static)


def random_expert(inner: int, hidden: int, scheme: Scheme) -> Expert:
    """Its input scales are its own: 1 to 3 times 0.005 for gate and up, 1 to 3 times 0.002 for down."""
    for_x, for_act = (1 + 2 * torch.rand(2)).tolist()
    gate, up = (random_weight(inner, hidden, scheme, 0.005 * for_x) for _ in range(2))
    return Expert(gate, up, random_weight(hidden, inner, scheme, 0.002 * for_act))


def stacked(experts: list[Expert], scheme: Scheme) -> tuple[Packed, Packed]:
    """gate_up and down of a layer, as the backend packs them."""
    gate_up, down = Stack(len(experts)), Stack(len(experts))
    for expert in experts:
        gate_up.add(join(pack(expert.gate, scheme), pack(expert.up, scheme)))
        down.add(pack(expert.down, scheme))
    return gate_up.finish(), down.finish()


def product(x: Tensor, weight: QuantizedTensor, scheme: Scheme, exact: bool) -> Tensor:
    """x [n, in] times a weight in float64, or as torch does it in the kernels' precision: bfloat16 in and out."""
    wide = weight.dequantize()
    if scheme.activation is None:
        return x.double() @ wide.double().T if exact else F.linear(x.bfloat16(), wide.bfloat16())
    out = round_activation(x.float(), scheme.activation, weight.input_scale).double() @ wide.double().T
    return out if exact else out.bfloat16()


def layer(x: Tensor, expert: Callable[[int], Expert], ids: Tensor, router: Tensor, scheme: Scheme, exact: bool) -> Tensor:
    """The experts' weighted sum [n, hidden], with every product as `product` has it."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for e in ids.unique().tolist():
        token, choice = (ids == e).nonzero(as_tuple=True)
        part = expert(e)
        act = F.silu(product(x[token], part.gate, scheme, exact)) * product(x[token], part.up, scheme, exact)
        y = product(act, part.down, scheme, exact).double() * router[token, choice].double()[:, None]
        out.index_add_(0, token, y)
    return out if exact else out.bfloat16()


def close(out: Tensor, same_precision: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The kernel's error is at most `factor` times that of torch's expression in the same precision."""
    assert out.shape == exact.shape and bool(out.isfinite().all())
    error, allowed = (out.double() - exact).norm(), (same_precision.double() - exact).norm()
    assert error <= factor * allowed + 1e-9, (float(error / exact.norm()), float(allowed / exact.norm()))


def check_repair(repair: Callable[..., loops.Block], grid: Grid, columns: int, rows: int) -> None:
    """GPTQ's block of columns is what the specification makes it, bit by bit, on the default device: with steps of both
    signs where the grid has them, and weights far outside of it."""
    weight = torch.randn(columns, rows) * 3
    left = weight + torch.randn(columns, rows)
    factor = torch.triu(torch.randn(columns, columns) * 0.3) + torch.diag(torch.rand(columns) + 1)
    step = either_sign(torch.rand(columns, rows) + 0.2, grid)
    offset = None if grid.symmetric else torch.randint(-8, 8, (columns, rows)).float()
    mine, spec = left.clone(), left.clone()
    codes, *found = repair(mine, weight, factor, step, offset, grid)
    expected, *exact = loops.repair(spec, weight, factor, step, offset, grid)
    assert torch.equal(codes.view(torch.int8), expected.view(torch.int8))
    assert columns * rows < 30 or codes.view(torch.int8).unique().numel() > 3
    for a, b in ((mine, spec), *zip(found, exact, strict=True)):
        assert a.shape == b.shape and torch.equal(a, b)
