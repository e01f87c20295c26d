"""What a part is fitted to, and the Fisher pass, held against plain autograd through a whole small model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.calib.fisher import factor
from quantkit.calib.fit import Ahead, AttentionFit, MLPFit, ReadOnce, batches, looked_at
from quantkit.calib.streams import Place, Stream
from quantkit.calib.tape import Tape
from quantkit.job.fisher import FOLDER, LayerMetrics, fisher, windows_of
from quantkit.model.attention import Positions
from quantkit.model.blocks import rope_tables
from quantkit.model.cache import OneGroup
from quantkit.model.forward import head
from quantkit.model.layer import attention_half, mlp_half
from quantkit.model.registry import build_spec
from quantkit.model.spec import ModelSpec
from quantkit.model.weights import PlainWeights
from tests.conftest import CONFIG, random_weights

CPU = torch.device("cpu")
IDS = torch.randint(0, 257, (6, 24), generator=torch.Generator().manual_seed(1))
Model = tuple[ModelSpec, dict[str, Tensor]]


@pytest.fixture(params=[1, 2], ids=["top-1", "top-2"])
def tensors(request: pytest.FixtureRequest) -> Model:
    """Two pairs of layers that share K and V."""
    config = {**CONFIG, "moe_topk": request.param}
    return build_spec(config, "test"), random_weights(config)


def stream(model: Model, weights: PlainWeights, tmp_path: Path, name: str) -> Stream:
    place = Place(model[0], CPU, tmp_path, name)
    tape = place.tape("hidden", IDS.numel(), model[0].hidden)
    one = Stream(place, (IDS.shape[0], IDS.shape[1]), weights, tape, tape)
    one.embed(IDS)
    return one


def test_each_part_is_off_by_what_was_changed_in_it_and_by_nothing_else(tensors: Model, tmp_path: Path) -> None:
    """The quantized stream is the BF16 one but for one expert's down, which is doubled once it is its turn: before, every
    part fits exactly; its own fit is off by what it adds; that of later parts by that, where they read the same tokens."""
    spec, weights = tensors
    read = ReadOnce(weights.__getitem__)
    plain = PlainWeights(weights.__getitem__)
    own, ahead = stream(tensors, plain, tmp_path, ""), Ahead(stream(tensors, read, tmp_path, "a-"), read)
    with torch.no_grad():
        for layer in spec.layers[:2]:
            ahead.attention(layer)
            part = own.attention(layer)
            fit = AttentionFit(part, ahead)
            error = fit.error(torch.tensor([0, 3]), plain)
            assert error.output.abs().max() < 1e-5 and error.output.shape == (48, spec.hidden)
            assert error.router is not None and abs(float(error.router)) < 1e-4
            part.finish()
            parts = own.mlps(layer)
            ahead.mlps(layer, own)
            extra = torch.zeros(own.rows, spec.hidden)
            for number, mlp in enumerate(parts):
                ahead.add(mlp, read, -1.0)
                down = mlp.mlp.down.weight
                doubled = PlainWeights(lambda key, down=down: weights[key] * (2 if key == down else 1))  # type: ignore[misc]
                used = doubled if number == 2 and layer.index == 1 else plain
                items = torch.arange(len(mlp.rows))
                inner = mlp.weighted(items, plain.mlp(mlp.mlp, mlp.inputs.gather(mlp.rows)))
                off = MLPFit(mlp, ahead).error(items, used).output
                if used is doubled:
                    extra[mlp.rows] = inner
                torch.testing.assert_close(off, extra[mlp.rows], atol=1e-5, rtol=1e-4)
                ahead.add(mlp, used, 1.0)
            difference = ahead.rest.read(0, own.rows) - ahead.stream.target.read(0, own.rows)  # type: ignore[union-attr]
            assert (difference.abs().amax(-1) > 1e-4).sum() == (len(parts[2].rows) if layer.index == 1 else 0)
            for mlp in parts:
                mlp.finish()
            own.close()
            ahead.done()


def test_a_large_part_is_read_from_its_tapes_as_a_small_one_from_memory(
    tensors: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weights = tensors
    read, layer = ReadOnce(weights.__getitem__), spec.layers[0]
    own, ahead = stream(tensors, read, tmp_path, ""), Ahead(stream(tensors, read, tmp_path, "a-"), read)
    with torch.no_grad():
        ahead.attention(layer)
        own.attention(layer).finish()
        parts = own.mlps(layer)
        ahead.mlps(layer, own)
        small = MLPFit(parts[0], ahead)
        monkeypatch.setattr("quantkit.calib.fit._HELD", 0)
        large = MLPFit(parts[0], ahead)
        items = torch.tensor([5, 6, 90, 11])
        assert torch.equal(small.error(items, read).output, large.error(items, read).output)
    assert small.together == 1 < large.together
    drawn, again = batches(large, 4, [0, 7]), batches(large, 4, [0, 7])
    first = [next(drawn) for _ in range(4)]
    assert all(torch.equal(one, next(again)) for one in first)


def test_every_token_is_drawn_once_before_any_comes_again_and_none_that_is_apart(tensors: Model, tmp_path: Path) -> None:
    spec, weights = tensors
    own = stream(tensors, PlainWeights(weights.__getitem__), tmp_path, "")
    ahead = Ahead(own, ReadOnce(weights.__getitem__))
    fit = AttentionFit(own.attention(spec.layers[0]), ahead)
    apart = torch.cat(list(looked_at(fit)))
    assert apart.tolist() == [5] and fit.tokens == 5 * 24
    drawn = batches(fit, 1, [0])
    assert sorted(next(drawn).tolist()) == [0, 1, 2, 3, 4]
    few = batches(fit, 100, [0])
    counts = Counter(item for _ in range(2) for item in next(few).tolist())  # 128 tokens are asked for: all but one window
    assert not set(counts) & set(apart.tolist())


def test_the_fisher_pass_is_one_backward_of_the_whole_model(tensors: Model, tmp_path: Path) -> None:
    """Against autograd in memory, by the same labels; a borrowed K carries gradient to the layer that owns it."""
    spec, weights = tensors
    seen = fisher(spec, IDS, weights.__getitem__, CPU, tmp_path, {"job": "a"}, 3)
    for (layer, half), expected in in_memory(spec, weights, 3).items():
        tape = Tape(tmp_path / FOLDER / f"{half}-{layer}.f32", spec.hidden, spec.hidden)
        torch.testing.assert_close(tape.read(0, spec.hidden), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        lower = seen.factor(layer, half)
        assert lower is not None
        mixed = 0.9 * expected / expected.diagonal().mean() + 0.1 * torch.eye(spec.hidden)
        torch.testing.assert_close(lower @ lower.T, mixed, rtol=1e-3, atol=1e-3)
    assert seen.overflowed == 0
    assert {path.name for path in (tmp_path / FOLDER).glob("*.f32")} == {
        f"{half}-{layer.index}.f32" for layer in spec.layers for half in ("attention", "mlp")
    }


def in_memory(spec: ModelSpec, weights: dict[str, Tensor], seed: int) -> dict[tuple[int, str], Tensor]:
    plain, states = PlainWeights(weights.__getitem__), dict[tuple[int, str], Tensor]()
    at, store = Positions(rope_tables(spec.rope, torch.arange(IDS.shape[1]))), OneGroup()
    h = F.embedding(IDS, weights[spec.embedding]).float().requires_grad_()
    for layer in spec.layers:
        states[layer.index, "attention"] = middle = attention_half(layer, h, plain, at, store)
        h, _ = mlp_half(layer, middle, plain)
        states[layer.index, "mlp"] = h
    for state in states.values():
        state.retain_grad()
    logits = head(spec, plain, h.flatten(0, 1))
    generator = torch.Generator().manual_seed(seed * 1_000_003)  # all of it is one batch
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, labels, reduction="sum").backward()
    gradients = {key: state.grad.flatten(0, 1) for key, state in states.items() if state.grad is not None}
    return {key: gradient.T @ gradient for key, gradient in gradients.items()}


class Killed(Exception):
    pass


def test_a_fisher_pass_that_is_killed_goes_on_and_ends_with_the_same_bytes(tensors: Model, tmp_path: Path) -> None:
    spec, weights = tensors
    whole, parts, reads = tmp_path / "whole", tmp_path / "parts", 0
    for folder in (whole, parts):
        folder.mkdir(mode=0o700)

    def counted(key: str) -> Tensor:
        nonlocal reads
        reads += 1
        return weights[key]

    fisher(spec, IDS, counted, CPU, whole, {"job": "a"}, 0)
    expected, limit = contents(whole), reads // 7
    killed = steps = reads = 0
    while True:
        before = reads

        def until(key: str, stop: int = before + limit) -> Tensor:
            if reads >= stop:
                raise Killed
            return counted(key)

        try:
            fisher(spec, IDS, until, CPU, parts, {"job": "a"}, 0)
            break
        except Killed:
            killed += 1
            now = (parts / FOLDER / "journal").read_bytes().count(b"\n")
            limit, steps = (2 * limit if now == steps else limit), now
        if killed == 2:
            next((parts / FOLDER).glob("boundary-0.f32")).write_bytes(b"damaged")
    assert killed > 2 and contents(parts) == expected


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / FOLDER).glob("*.f32")}


def test_gradients_that_overflow_are_left_out_and_counted(tensors: Model, tmp_path: Path) -> None:
    spec, weights = tensors
    broken = {**weights, spec.layers[0].post_attention_norm: weights[spec.layers[0].post_attention_norm] * torch.inf}
    seen = fisher(spec, IDS, broken.__getitem__, CPU, tmp_path, {"job": "a"}, 0)
    assert seen.overflowed > 0 and isinstance(seen, LayerMetrics)
    assert seen.factor(0, "attention") is None  # says nothing: plain squared error


def test_a_metric_of_nothing_is_none() -> None:
    assert factor(torch.zeros(4, 4)) is None and factor(torch.full((4, 4), torch.nan)) is None
    assert windows_of(IDS, 50).tolist() == IDS[[0, 3]].tolist() and len(windows_of(IDS, 1)) == 1
