"""Every Triton kernel in Triton's interpreter against quantkit.kernels.reference; test_triton_kernels.py runs this file."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.reference import round_activation
from quantkit.kernels.triton import moe_w4a16, moe_w8a8, w4a16, w8a8
from quantkit.kernels.triton.activation import quantise
from quantkit.kernels.triton.layout import pack4, pack8, stack4, stack8
from quantkit.kernels.triton.routing import sort_by_expert
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import PRESETS, Activation, Kind, Strategy
from tests.kernel_helpers import poison, weight4, weight8

BF16 = torch.bfloat16
W8 = ("FP8", "FP8_DYNAMIC", "FP8_BLOCK", "W8A8")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def close(out: Tensor, same_precision: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The kernel's error is at most `factor` times that of torch's expression in the same precision."""
    assert out.dtype is BF16 and out.shape == exact.shape and bool(out.isfinite().all())
    error, allowed = (out.double() - exact).norm(), (same_precision.double() - exact).norm()
    assert error <= factor * allowed + 1e-9, (error / exact.norm(), allowed / exact.norm())


@pytest.mark.parametrize(
    ("tokens", "rows", "columns", "group", "symmetric"),
    [
        (1, 72, 256, 128, True),
        (3, 40, 256, 64, False),
        (17, 33, 96, 32, True),
        (2, 24, 144, 16, False),
        (5, 64, 72, None, False),  # 56 columns of padding
        (4, 8, 200, None, True),
        (2, 16, 1024, 128, True),  # K is split
        (2, 16, 1152, 128, False),  # K is split unevenly
        (33, 130, 128, 128, True),
    ],
)
def test_w4a16_linear(tokens: int, rows: int, columns: int, group: int | None, symmetric: bool) -> None:
    weight, x = weight4(rows, columns, group, symmetric), torch.randn(tokens, columns).to(BF16)
    exact = x.double() @ weight.dequantize().double().T
    close(w4a16.linear(x, pack4(weight)), F.linear(x, weight.dequantize().to(BF16)), exact)


def test_zero_tokens_and_leading_axes() -> None:
    four, eight = weight4(24, 128, 64, True), weight8(24, 128, PRESETS["W8A8"])
    activation = PRESETS["W8A8"].activation
    assert activation
    for lead in ((0,), (2, 0), (2, 3)):
        x = torch.randn(*lead, 128).to(BF16)
        assert w4a16.linear(x, pack4(four)).shape == (*lead, 24)
        assert w8a8.linear(x, pack8(eight), activation).shape == (*lead, 24)
    x, none = torch.zeros(0, 64, dtype=BF16), torch.zeros(0, 2, dtype=torch.long)
    gate_up, down = stack4([pack4(weight4(128, 64, 64, True))]), stack4([pack4(weight4(64, 64, 64, True))])
    assert moe_w4a16.moe(x, gate_up, down, none, none.float()).shape == (0, 64)


@pytest.mark.parametrize("name", W8)
@pytest.mark.parametrize("tokens", [1, 5])
def test_activation_is_the_references(name: str, tokens: int) -> None:
    activation = PRESETS[name].activation
    assert activation
    x = torch.randn(tokens, 384) * torch.tensor([1e-3, 1.0, 50.0]).repeat_interleave(128)
    x[0, :128] = 0  # a group without a magnitude
    scale = torch.tensor([0.01]).to(BF16) if not activation.dynamic else None
    codes, scales = quantise(x.to(BF16), activation, scale)
    got = (codes.float().unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]).flatten(1)
    assert torch.equal(got, round_activation(x.to(BF16), activation, scale))


@pytest.mark.parametrize("name", W8)
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 40, 128), (19, 150, 256), (3, 33, 80)])
def test_w8a8_linear(name: str, tokens: int, rows: int, columns: int) -> None:
    scheme = PRESETS[name]
    columns = columns if name != "FP8_BLOCK" or columns % 128 == 0 else 384
    weight, x = weight8(rows, columns, scheme), torch.randn(tokens, columns).to(BF16)
    assert scheme.activation
    rounded = round_activation(x, scheme.activation, weight.input_scale)
    exact = rounded.double() @ weight.dequantize().double().T
    close(w8a8.linear(x, pack8(weight), scheme.activation, weight.input_scale), exact.to(BF16), exact)


def expert_sum(
    x: Tensor,
    ups: list[QuantizedTensor],
    downs: list[QuantizedTensor],
    ids: Tensor,
    router: Tensor,
    activation: Activation | None,
) -> Tensor:
    """The definition, in float32 with the activation between the products in bfloat16."""
    out = torch.zeros(x.shape[0], downs[0].shape[0])
    for t in range(x.shape[0]):
        for e, r in zip(ids[t].tolist(), router[t], strict=True):
            row = x[t : t + 1] if activation is None else round_activation(x[t : t + 1], activation, None)
            gate, up = (row.float() @ ups[e].dequantize().T).chunk(2, 1)
            act = (F.silu(gate) * up).to(BF16)
            act = act if activation is None else round_activation(act, activation, None)
            out[t] += r * (act.float() @ downs[e].dequantize().T)[0]
    return out


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "inner", "group", "symmetric"),
    [
        (1, 1, 2, 64, 72, None, True),
        (5, 2, 4, 64, 64, 32, False),
        (20, 2, 3, 128, 64, 64, True),
        (33, 1, 2, 32, 40, None, False),
    ],
)
def test_w4a16_moe(
    tokens: int, top_k: int, experts: int, hidden: int, inner: int, group: int | None, symmetric: bool
) -> None:
    ups = [weight4(2 * inner, hidden, group, symmetric) for _ in range(experts)]
    downs = [weight4(hidden, inner, group, symmetric) for _ in range(experts)]
    x, router = torch.randn(tokens, hidden).to(BF16), torch.rand(tokens, top_k)  # not normalised
    ids = torch.randint(0, experts - 1, (tokens, top_k))  # the last expert gets nothing
    out = moe_w4a16.moe(x, stack4([pack4(w) for w in ups]), stack4([pack4(w) for w in downs]), ids, router)
    exact = expert_sum(x, ups, downs, ids, router, None).double()
    close(out, exact.to(BF16), exact, factor=3.0)  # the activation is rounded to bfloat16 in between


def test_shared_expert_is_one_more_id() -> None:
    ups, downs = [weight4(64, 64, 32, True) for _ in range(3)], [weight4(64, 32, 32, True) for _ in range(3)]
    x, routed, weight = torch.randn(4, 64).to(BF16), torch.randint(0, 2, (4, 1)), torch.rand(4, 1)
    ids, router = torch.cat([routed, torch.full((4, 1), 2)], 1), torch.cat([weight, torch.ones(4, 1)], 1)
    out = moe_w4a16.moe(x, stack4([pack4(w) for w in ups]), stack4([pack4(w) for w in downs]), ids, router)
    exact = expert_sum(x, ups, downs, ids, router, None).double()
    close(out, exact.to(BF16), exact, factor=3.0)


@pytest.mark.parametrize("name", W8[1:])
@pytest.mark.parametrize(("tokens", "top_k", "hidden", "inner"), [(5, 2, 128, 128), (9, 1, 80, 48)])
def test_w8a8_moe(name: str, tokens: int, top_k: int, hidden: int, inner: int) -> None:
    scheme = PRESETS[name]
    hidden, inner = (256, 128) if name == "FP8_BLOCK" else (hidden, inner)
    ups, downs = [weight8(2 * inner, hidden, scheme) for _ in range(3)], [weight8(hidden, inner, scheme) for _ in range(3)]
    x, router, ids = torch.randn(tokens, hidden).to(BF16), torch.rand(tokens, top_k), torch.randint(0, 2, (tokens, top_k))
    assert scheme.activation
    gate_up, down = stack8([pack8(w) for w in ups]), stack8([pack8(w) for w in downs])
    out = moe_w8a8.moe(x, gate_up, down, ids, router, scheme.activation)
    exact = expert_sum(x, ups, downs, ids, router, scheme.activation).double()
    close(out, exact.to(BF16), exact, factor=6.0)  # an activation beside a rounding boundary may take the next code


@pytest.mark.parametrize(("tokens", "top_k", "experts", "block"), [(1, 1, 16, 16), (7, 2, 4, 4), (40, 3, 5, 16)])
def test_sort_by_expert(tokens: int, top_k: int, experts: int, block: int) -> None:
    ids = torch.randint(0, experts, (tokens, top_k))
    slots, owners = sort_by_expert(ids, experts, block)
    live = slots < ids.numel()
    assert torch.equal(slots[live].sort().values, torch.arange(ids.numel(), dtype=torch.int32))
    of_slot = owners.repeat_interleave(block)[live]
    assert torch.equal(of_slot.long(), ids.flatten()[slots[live].long()])


def test_refusals() -> None:
    weight, x = pack4(weight4(16, 128, 64, True)), torch.randn(2, 128).to(BF16)
    with pytest.raises(ValueError, match="not bfloat16"):
        w4a16.linear(x.float(), weight)
    with pytest.raises(ValueError, match="64 features, the weight 128"):
        w4a16.linear(x[:, :64], weight)
    with pytest.raises(ValueError, match="group size 8"):
        pack4(weight4(16, 128, 8, True))
    with pytest.raises(ValueError, match="differ"):
        stack4([weight, pack4(weight4(16, 128, 64, False))])
    with pytest.raises(ValueError, match="not twice as many"):
        moe_w4a16.moe(x, weight, weight, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
    with pytest.raises(ValueError, match="do not fit ids"):
        moe_w4a16.moe(x, weight, weight, torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 2))
    with pytest.raises(ValueError, match="x is torch.float8_e4m3fn, the weight torch.int8"):
        activation = Activation(Kind.FLOAT, Strategy.TOKEN, dynamic=True)
        w8a8.linear(x, pack8(weight8(16, 128, PRESETS["W8A8"])), activation)
