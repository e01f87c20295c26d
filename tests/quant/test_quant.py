"""The mathematics: grids, rounding to nearest, GPTQ, packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.formats.packing import pack_rows, unpack_rows
from quantkit.kernels.reference import linear, round_activation
from quantkit.qtensor import expand
from quantkit.quant.gptq import DAMPING, NotPositive, gptq
from quantkit.quant.grid import minmax_scale, search_scale
from quantkit.quant.method import Method
from quantkit.quant.solve import rtn, solve
from quantkit.scheme import PRESETS, Activation, Kind, Scheme, Strategy, scheme_named
from quantkit.stats import LinearStats


def correlated(rows: int, features: int, seed: int = 0) -> Tensor:
    """Inputs with a decaying spectrum, as hidden states have: what GPTQ lives on."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(features, features, generator=g)).Q
    return torch.randn(rows, features, generator=g) * torch.logspace(0, -2, features) @ basis


def weight(out: int, inputs: int, seed: int = 1) -> Tensor:
    return torch.randn(out, inputs, generator=torch.Generator().manual_seed(seed)) * 0.05


def small(name: str) -> Scheme:
    scheme = scheme_named(name, 32)
    assert scheme is not None
    return scheme


def stats_of(x: Tensor) -> LinearStats:
    stats = LinearStats.empty(x.shape[1], x.device, with_hessian=True)
    stats.add(x)
    return stats


@pytest.mark.parametrize("name", PRESETS)
def test_rtn_error_is_at_most_half_a_step(name: str) -> None:
    scheme, w = small(name), weight(24, 128)
    q = rtn(w, scheme)
    step = expand(q.scale.float(), scheme.weight, q.shape).expand(q.shape)
    if scheme.weight.kind is Kind.FLOAT:  # e4m3: 3 mantissa bits, subnormal step 2^-9; bf16 scales clip by 2^-8 at most
        bound = torch.maximum(w.abs() * (2**-4 + 2**-8), step * 2**-10)
    else:
        bound = step * 0.5 * (1 + 2**-5) + (step * 0.5 if scheme.weight.symmetric else 0)  # the top code saturates
    assert ((q.dequantize() - w).abs() <= bound + 1e-7).all()


@pytest.mark.parametrize("name", PRESETS)
def test_zero_and_constant_weights(name: str) -> None:
    for w in (torch.zeros(16, 64), torch.full((16, 64), 0.03), -torch.full((16, 64), 0.03)):
        q = rtn(w, small(name))
        assert torch.isfinite(q.scale.float()).all() and (q.scale > 0).all()
        torch.testing.assert_close(q.dequantize(), w, atol=0.03 / 14, rtol=0.08)


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_gptq_loses_less_than_rtn_where_it_counts(name: str) -> None:
    x, w, scheme = correlated(512, 128), weight(64, 128), small(name)
    h = x.T @ x / len(x)

    def loss(q: Tensor) -> float:
        return float(((w - q) @ h * (w - q)).sum())

    assert loss(gptq(w, h, scheme.weight).quantized.dequantize()) < 0.6 * loss(rtn(w, scheme).dequantize())


def test_gptq_on_uncorrelated_input_is_rounding_under_the_searched_scale() -> None:
    w, grid = weight(16, 64), small("W4A16").weight
    solved = gptq(w, torch.eye(64), grid)
    scale, _ = search_scale(w, grid, torch.ones(64))
    assert torch.equal(solved.quantized.scale, scale)
    expected = (w / expand(scale.float(), grid, (16, 64))).round().clamp(-8, 7).to(torch.int8)
    assert torch.equal(solved.quantized.codes, expected)


def test_gptq_rows_are_independent() -> None:
    """Permuting the outputs permutes the result: what makes stacking q, k, v (or gate, up) into one solve exact."""
    x, w, grid = correlated(256, 64), weight(32, 64), small("W4A16").weight
    h, order = x.T @ x / len(x), torch.randperm(32, generator=torch.Generator().manual_seed(3))
    assert torch.equal(gptq(w, h, grid).quantized.codes[order], gptq(w[order], h, grid).quantized.codes)


def test_gptq_dead_features_and_hopeless_hessians() -> None:
    x, w, grid = correlated(256, 64), weight(16, 64), small("W4A16").weight
    x[:, 5] = 0
    assert torch.isfinite(gptq(w, x.T @ x / len(x), grid).quantized.dequantize()).all()
    x[:, 32:] = 0  # a group of which nothing is seen keeps its range
    solved = gptq(w, x.T @ x / len(x), grid).quantized
    assert (solved.dequantize() - w)[:, 32:].norm() <= 1.02 * (rtn(w, small("W4A16")).dequantize() - w)[:, 32:].norm()
    rank_one = torch.ones(64, 64)
    assert gptq(w, rank_one, grid).damping == DAMPING[0]
    for hopeless in (torch.zeros(64, 64), torch.full((64, 64), torch.nan), -torch.eye(64)):
        with pytest.raises(NotPositive):
            gptq(w, hopeless, grid)


def test_solve_records_what_it_fell_back_to() -> None:
    w, scheme = weight(16, 64), small("W4A16")
    ((q, outcome),) = solve([w], scheme, Method("gptq"), LinearStats.empty(64, w.device, with_hessian=True))
    assert (outcome.method, outcome.fallback) == ("rtn", "no calibration token reached this weight")
    assert torch.equal(q.codes, rtn(w, scheme).codes)
    x = correlated(100, 64)
    ((_, good),) = solve([w], scheme, Method("gptq"), stats_of(x))
    assert (good.method, good.fallback, good.coverage) == ("gptq", "", round(100 / 64, 4))
    dequantized = solve([w], scheme, Method("gptq"), stats_of(x))[0][0].dequantize()
    measured = ((x @ (w - dequantized).T).square().sum() / (x @ w.T).square().sum()).item()
    assert good.error == pytest.approx(measured, rel=1e-3)


def test_fused_weights_share_a_tensor_scale_and_input_scale() -> None:
    scheme, x = PRESETS["FP8"], correlated(64, 128) * 7
    gate, up = weight(32, 128), weight(32, 128, seed=2) * 3
    stats = LinearStats.empty(128, x.device, with_hessian=False)
    stats.add(x)
    (a, _), (b, _) = solve([gate, up], scheme, Method("rtn"), stats)
    assert torch.equal(a.scale, b.scale) and a.scale.float() == (up.abs().max() / 448).bfloat16().float()
    assert a.input_scale is not None and b.input_scale is not None and torch.equal(a.input_scale, b.input_scale)
    assert a.input_scale.item() == pytest.approx(x.abs().max().item() / 448, rel=2**-8)


def test_search_never_loses_to_minmax() -> None:
    w, importance = weight(32, 128), torch.rand(128, generator=torch.Generator().manual_seed(0))
    for name in ("W4A16", "W4A16_ASYM", "W8A8"):
        grid = small(name).weight
        losses = []
        for scale, zero in (minmax_scale(w, grid), search_scale(w, grid, importance)):
            step = expand(scale.float(), grid, (32, 128))
            offset = 0 if zero is None else expand(zero.float(), grid, (32, 128))
            codes = ((w / step).round() + offset).clamp(grid.qmin, grid.qmax)
            losses.append(float(((codes - offset) * step - w).square().mul(importance).sum()))
        assert losses[1] <= losses[0]


def slow_pack(row: list[int], bits: int) -> list[int]:
    """Bit by bit, from the format's description."""
    stream = [(code + 2 ** (bits - 1)) >> bit & 1 for code in row for bit in range(bits)]
    words = [sum(bit << i for i, bit in enumerate(stream[at : at + 32])) for at in range(0, len(stream), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(st.sampled_from([4, 8]), st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_packing_bit_by_bit(bits: int, rows: int, words: int, random) -> None:  # type: ignore[no-untyped-def]
    codes = [[random.randrange(-(2 ** (bits - 1)), 2 ** (bits - 1)) for _ in range(words * 32 // bits)] for _ in range(rows)]
    packed = pack_rows(torch.tensor(codes, dtype=torch.int8), bits)
    assert packed.tolist() == [slow_pack(row, bits) for row in codes]
    assert unpack_rows(packed, bits).tolist() == codes


def test_packing_is_the_librarys() -> None:
    from compressed_tensors.compressors.pack_quantized import pack_to_int32

    codes = torch.randint(-8, 8, (16, 64), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pack_rows(codes, 4), pack_to_int32(codes, 4))
    assert torch.equal(pack_rows(codes.T.contiguous(), 4).T, pack_to_int32(codes, 4, packed_dim=0))
    assert pack_rows(torch.arange(-8, 0, dtype=torch.int8).view(1, 8), 4).item() == 0x76543210
    with pytest.raises(ValueError, match="32-bit"):
        pack_rows(codes[:, :12], 4)


def test_presets_are_the_librarys() -> None:
    from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

    for name, scheme in PRESETS.items():
        theirs, inputs = PRESET_SCHEMES[name]["weights"], PRESET_SCHEMES[name].get("input_activations")
        grid = scheme.weight
        mine = (grid.bits, grid.kind.value, grid.symmetric, grid.strategy.value, grid.group_size)
        assert mine == (theirs.num_bits, theirs.type, theirs.symmetric, theirs.strategy, theirs.group_size)
        assert (list(grid.block) if grid.block else None) == theirs.block_structure
        assert (scheme.activation is None) == (inputs is None)
        if scheme.activation and inputs:
            a = scheme.activation
            assert (a.kind.value, a.strategy.value, a.dynamic) == (inputs.type, inputs.strategy, inputs.dynamic)
            assert a.group_size == inputs.group_size


def test_activation_rounding() -> None:
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -448.0, 0.3, 17.0]])
    fp8 = Activation(Kind.FLOAT, Strategy.TOKEN, dynamic=True)
    assert round_activation(x, fp8, None).tolist() == [[0, 0, 0, 0], [1.0, -448.0, 0.3125, 16.0]]
    int8 = Activation(Kind.INT, Strategy.TOKEN, dynamic=True)
    torch.testing.assert_close(round_activation(x * 127 / 448, int8, None)[1], torch.tensor([0.0, -127.0, 0.0, 5.0]))
    static = Activation(Kind.FLOAT, Strategy.TENSOR, dynamic=False)
    assert round_activation(x, static, torch.tensor([0.5]))[1].tolist() == [1.0, -224.0, 0.3125, 17.0 - 1]
    with pytest.raises(ValueError, match="input scale"):
        round_activation(x, static, None)
    grouped = Activation(Kind.FLOAT, Strategy.GROUP, dynamic=True, group_size=2)
    assert round_activation(torch.tensor([[1.0, 448.0, 1e-3, 0.0]]), grouped, None)[0, 2] == pytest.approx(1e-3)


def test_reference_kernel_is_dequantize_then_multiply() -> None:
    x, w = correlated(10, 64), weight(16, 64)
    q = rtn(w, small("W4A16_ASYM"))
    by_hand = (q.codes.float() - q.zero.float().repeat_interleave(32, 1)) * q.scale.float().repeat_interleave(32, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(linear(x, q, None), x @ by_hand.T)
    assert linear(x[:0], q, None).shape == (0, 16)


def test_the_latent_is_what_was_rounded() -> None:
    x, w = correlated(256, 64), weight(16, 64)
    h = x.T @ x / len(x)
    for name in ("W4A16", "W4A16_ASYM"):
        grid = small(name).weight
        plain, kept = gptq(w, h, grid), gptq(w, h, grid, keep_latent=True)
        assert plain.latent is None and kept.latent is not None and kept.latent.dtype is torch.float16
        q = kept.quantized
        assert torch.equal(q.codes, plain.quantized.codes)
        u = kept.latent.float()
        assert ((u.clamp(grid.qmin, grid.qmax) - q.codes.float()).abs() <= 0.5 + 2**-8).all()
        first = int(h.diagonal().argmax())  # nothing has been repaired before the first column
        zero = 0 if q.zero is None else q.zero[:, first // 32].float()
        torch.testing.assert_close(u[:, first], w[:, first] / q.scale[:, first // 32].float() + zero, rtol=2**-10, atol=1e-4)
        moved = u - (
            w / expand(q.scale.float(), grid, q.shape) + (0 if q.zero is None else expand(q.zero.float(), grid, q.shape))
        )
        assert moved.abs().mean() > 0.05


def test_the_search_tries_both_signs_of_symmetric_integers() -> None:
    """A weight whose far end is -8 steps needs a positive scale, its opposite a negative one, and both are then exact."""
    reach = torch.tensor([[-8.0, *([1.0, 7.0, -3.0] * 10), 5.0]]) * 0.25
    for w, sign in ((reach, 1), (-reach, -1)):
        grid = small("W4A16").weight
        scale, _ = search_scale(w, grid, torch.ones(32))
        assert scale.item() * sign > 0
        codes = (w / scale.float()).round()
        assert codes.min() == -8 and codes.max() == 7
    for name in ("W4A16_ASYM", "FP8_DYNAMIC"):  # zero points do the same; floats have no far side
        scale, _ = search_scale(torch.cat([reach, -reach]), small(name).weight, torch.ones(32))
        assert (scale > 0).all()
    assert (rtn(torch.cat([reach, -reach]), small("W4A16")).scale > 0).all()  # min-max, as compressed-tensors' own


def test_signed_scales_lose_less() -> None:
    x, w, grid = correlated(512, 128), weight(64, 128), small("W4A16").weight
    h = x.T @ x / len(x)
    scale = gptq(w, h, grid).quantized.scale
    assert 0.3 < (scale < 0).float().mean() < 0.7
    for narrow, searched in ((abs(scale), scale),):
        losses = [
            ((w / (s := expand(one.float(), grid, (64, 128)))).round().clamp(-8, 7) * s - w).square().mul(h.diagonal()).sum()
            for one in (narrow, searched)
        ]
        assert losses[1] < 0.97 * losses[0]
