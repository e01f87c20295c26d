"""Learned rounding on one weight: what it begins with, what it may become, and what ends it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.quant.gptq import gptq
from quantkit.quant.learned import Learned, SoftWeight, learn
from quantkit.quant.solve import rtn
from quantkit.scheme import Scheme, scheme_named, weight_only

OUT, IN = 24, 64


def scheme(name: str) -> Scheme:
    found = scheme_named(name, 32)
    assert found is not None
    return found


def data(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight with outliers, inputs to learn from that lie near a plane of few dimensions, and others."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=g) * 0.1
    weight[::3, 5] = 0.7
    x = torch.randn(2500, 8, generator=g) @ torch.randn(8, IN, generator=g) + 0.3 * torch.randn(2500, IN, generator=g)
    return weight, x[:2000], x[2000:]


def start(weight: Tensor, x: Tensor, name: str) -> tuple[QuantizedTensor, Tensor]:
    solved = gptq(weight, x.T @ x / len(x), scheme(name).weight, keep_latent=True)
    assert solved.latent is not None
    return solved.quantized, solved.latent


def fit(weight: Tensor, x: Tensor, apart: Tensor, soft: SoftWeight, steps: int = 100) -> Learned:
    def loss(step: int, values: list[Tensor]) -> Tensor:
        batch = x[step * 100 % len(x) :][:100]
        return (batch @ (values[0] - weight).T).square().mean()

    def held_out(values: list[Tensor]) -> float:
        return float((apart @ (values[0] - weight).T).square().mean())

    return learn([soft], steps, loss, held_out)


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16", "W8A8"])
def test_it_begins_at_the_given_codes_to_the_bit(name: str) -> None:
    """Saturated codes, repaired ones far from their weight, negative scales, zero points, one group a row."""
    weight, x, _ = data()
    for q, latent in (start(weight, x, name), (rtn(weight, scheme(name)), None)):
        soft = SoftWeight(weight, q, latent)
        again = soft.hard()
        assert torch.equal(again.codes, q.codes) and torch.equal(again.scale, q.scale)
        assert torch.equal(soft.value().detach(), q.dequantize()) and soft.flipped(again) == 0
    if name == "W4A16":
        assert (start(weight, x, name)[0].scale < 0).any()


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM"])
def test_what_is_learned_loses_less_on_other_tokens_and_stays_within_its_bounds(name: str) -> None:
    weight, x, apart = data()
    q = rtn(weight, scheme(name))
    learned = fit(weight, x, apart, SoftWeight(weight, q, None))
    (new,) = learned.weights
    assert learned.kept > 0 and learned.after < 0.8 * learned.before and not learned.stopped
    assert learned.before == pytest.approx(float((apart @ (q.dequantize() - weight).T).square().mean()))
    assert learned.after == pytest.approx(float((apart @ (new.dequantize() - weight).T).square().mean()))
    assert new.codes.min() >= q.grid.qmin and new.codes.max() <= q.grid.qmax and new.codes.dtype is torch.int8
    assert (new.codes.int() - q.codes.int()).abs().max() == 1  # an offset is at most half a step
    change = new.scale.float() / q.scale.float() - 1
    assert 0 < change.abs().max() <= 0.3 + 2**-7
    assert new.zero is q.zero


def test_what_gptq_rounded_is_where_it_begins_within_half_a_step_of_the_code() -> None:
    weight, x, _ = data()
    q, latent = start(weight, x, "W4A16_ASYM")
    assert q.zero is not None
    soft = SoftWeight(weight, q, latent)
    u = (soft.u + soft.zero).flatten(1)
    near = (latent.float() - q.codes.float()).abs() < 0.499
    assert 0.9 < near.float().mean() < 1 and torch.equal(u[near], latent.float()[near])
    assert ((u - q.codes.float()).abs()[~near] - 0.499).abs().max() < 1e-3


def test_a_group_of_zeros_stays_so() -> None:
    """Its scale is 1: a code of 1 would be a weight of 1."""
    weight, x, apart = data()
    weight[3, :32] = 0
    q = rtn(weight, scheme("W4A16"))
    learned = fit(weight, x, apart, SoftWeight(weight, q, None))
    assert learned.kept and learned.weights[0].dequantize()[3, :32].count_nonzero() == 0


def test_a_gradient_that_overflows_ends_it_and_costs_nothing_that_was_kept() -> None:
    weight, x, apart = data()
    q, latent = start(weight, x, "W4A16")
    for broken, kept in ((0, 0), (60, 48)):
        soft, seen = SoftWeight(weight, q, latent), list[float]()

        def loss(step: int, values: list[Tensor], broken: int = broken) -> Tensor:
            factor = torch.inf if step == broken else 1.0
            return (x[step * 20 : step * 20 + 20] @ (values[0] - weight).T).square().mean() * factor

        def held_out(values: list[Tensor], seen: list[float] = seen) -> float:
            seen.append(float((apart @ (values[0] - weight).T).square().mean()))
            return seen[-1]

        learned = learn([soft], 100, loss, held_out)
        assert learned.stopped == f"the gradient is not finite at step {broken + 1}" and learned.kept <= kept
        assert learned.after == min(seen) and torch.isfinite(learned.weights[0].scale).all()
        assert (learned.kept == 0) == torch.equal(learned.weights[0].codes, q.codes)


def test_where_learning_only_loses_the_start_is_kept() -> None:
    weight, x, apart = data()
    q, latent = start(weight, x, "W4A16")
    away = learn(
        [SoftWeight(weight, q, latent)],
        30,
        lambda _, values: -(x[:100] @ (values[0] - weight).T).square().mean(),
        lambda values: float((apart @ (values[0] - weight).T).square().mean()),
    )
    assert away.kept == 0 and away.after == away.before and away.weights[0] is q
    lost = learn([SoftWeight(weight, q, latent)], 30, lambda _, values: values[0].sum(), lambda values: float("nan"))
    assert lost.steps == 0 and lost.stopped and lost.weights[0] is q


def test_one_scale_for_a_whole_row() -> None:
    weight, x, apart = data()
    row = weight_only(4, True, None)
    q = rtn(weight, row)
    learned = fit(weight, x, apart, SoftWeight(weight, q, None))
    assert learned.kept and learned.weights[0].scale.shape == (OUT, 1)
