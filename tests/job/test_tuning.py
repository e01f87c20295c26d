"""`--tune`: gradients of scales against plain autograd, and what becomes of OUT, also after a kill at each of its steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantkit
from quantkit.calib.tape import MemoryTape
from quantkit.calib.tune import TunedWeights, Tuner, tunable
from quantkit.checkpoint.opened import schemes_of
from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.verify import verify
from quantkit.errors import ConfigError
from quantkit.formats.compressed_tensors import FORMAT
from quantkit.job import pipeline
from quantkit.job.partial import WORK, partial_of
from quantkit.model.forward import forward, head
from quantkit.model.registry import build_spec
from quantkit.model.spec import Linear
from quantkit.model.weights import PlainWeights
from quantkit.qtensor import QuantizedTensor
from quantkit.quant.solve import rtn
from quantkit.recipe import Recipe
from quantkit.scheme import PRESETS, scheme_named
from tests.conftest import CONFIG, random_weights, write_checkpoint

IDS = torch.randint(0, 257, (5, 16), generator=torch.Generator().manual_seed(1))
TUNED: dict[str, Any] = {"attention": "W8A16", "shared_experts": "FP8_DYNAMIC", "group_size": 32, "tune": True}
TEXT: dict[str, Any] = {"samples": 40, "seq_len": 64}


def test_what_is_tuned() -> None:
    assert [name for name in PRESETS if tunable(PRESETS[name])] == ["W4A16", "W4A16_ASYM", "W4AFP8", "W8A16", "W8A8"]
    assert not tunable(None)


@pytest.mark.parametrize("topk", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_steps_gradients_are_those_of_the_whole_model_at_once(topk: int) -> None:
    """Through layers that borrow K and V, group by group, codes made anew on the way back."""
    config = {**CONFIG, "moe_topk": topk}
    spec, weights, scheme = build_spec(config, "test"), random_weights(config), scheme_named("W4A16_ASYM", 32)
    assert scheme is not None
    stored = {ref.key: rtn(weights[ref.weight].float(), scheme) for ref in spec.linears()}
    changes = {key: torch.zeros_like(q.scale, dtype=torch.float32) for key, q in stored.items()}
    target = MemoryTape(IDS.numel(), spec.hidden)
    with torch.no_grad():
        *_, last = forward(spec, PlainWeights(weights.__getitem__), IDS)
        target.write(0, last.hidden.flatten(0, 1))
    tuned = TunedWeights(
        weights.__getitem__, lambda ref: stored[ref.key], dict.fromkeys(stored, scheme), changes, keep=False
    )
    apart = torch.tensor([False] * 4 + [True])
    tuner = Tuner(spec, tuned, IDS, target, apart, torch.device("cpu"), 1e-2)
    gradients = tuner.step(torch.tensor([0, 2]))
    assert gradients is not None

    leaves = {key: change.clone().requires_grad_() for key, change in changes.items()}
    soft = {key: _soft(stored[key], leaves[key]) for key in stored}
    plain = _Soft(weights, soft)
    *_, last = forward(spec, plain, IDS[[0, 2]])
    rows = (torch.tensor([0, 2])[:, None] * 16 + torch.arange(16)).flatten()
    p = head(spec, plain, target.values[rows]).log_softmax(-1)
    loss = (p.exp() * (p - head(spec, plain, last.hidden.flatten(0, 1)).log_softmax(-1))).sum(-1).mean()
    loss.backward()
    assert loss.item() == pytest.approx(tuner.divergence(torch.tensor([0, 2])), rel=1e-4)
    for key, leaf in leaves.items():
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        torch.testing.assert_close(gradients.get(key, torch.zeros_like(leaf)), expected, rtol=1e-3, atol=1e-7)
    before = tuner.divergence(torch.arange(4))
    result = tuner.run([torch.arange(4)] * 10)  # the same windows, so that it must fall on them
    assert tuner.divergence(torch.arange(4)) < before and result.steps == 10
    assert result.after <= result.before and max(float(change.abs().max()) for change in result.changes.values()) <= 0.1


def _soft(q: QuantizedTensor, change: Tensor) -> Tensor:
    return (q.dequantize().unflatten(1, (change.shape[1], -1)) * (1 + change)[..., None]).flatten(1)


class _Soft(PlainWeights):
    def __init__(self, weights: dict[str, Tensor], soft: dict[str, Tensor]) -> None:
        super().__init__(weights.__getitem__)
        self.soft = soft

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        return x @ self.soft[ref.key].T if ref.key in self.soft else super().linear(ref, x)


def test_a_gradient_that_overflows_ends_it() -> None:
    spec, weights, scheme = build_spec(CONFIG, "test"), random_weights(CONFIG), scheme_named("W4A16", 32)
    assert scheme is not None
    stored = {ref.key: rtn(weights[ref.weight].float(), scheme) for ref in spec.linears()}
    changes = {key: torch.zeros_like(q.scale, dtype=torch.float32) for key, q in stored.items()}
    target = MemoryTape(IDS.numel(), spec.hidden)
    target.write(0, torch.randn(IDS.numel(), spec.hidden))
    target.values[3] = torch.nan
    tuned = TunedWeights(weights.__getitem__, lambda ref: stored[ref.key], dict.fromkeys(stored, scheme), changes, keep=True)
    apart = torch.tensor([False] * 4 + [True])
    result = Tuner(spec, tuned, IDS, target, apart, torch.device("cpu"), 1e-2).run([torch.tensor([1]), torch.tensor([0])])
    assert result.stopped == "the gradient is not finite at step 2" and result.steps == 2


@pytest.fixture(scope="module", autouse=True)
def small_steps() -> Iterator[None]:
    """Of 256 tokens: so many steps on so little text, and as wide as so few must be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantkit.job.tuning.STEP_TOKENS", 256)
        patch.setattr("quantkit.job.tuning._RATE", 4e-3)
        yield


@pytest.fixture(scope="module")
def outs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, and OUT of it with and without tuning."""
    root = tmp_path_factory.mktemp("tuned")
    model = write_checkpoint(root / "model", CONFIG, random_weights(CONFIG))
    quantkit.quantize(model, root / "tuned", Recipe(**TUNED, **TEXT))
    quantkit.quantize(model, root / "plain", Recipe(**{**TUNED, "tune": False}, **TEXT))
    return model, root / "tuned", root / "plain"


def test_codes_stay_scales_move_and_verify_knows(outs: tuple[Path, Path, Path]) -> None:
    model, tuned, plain = outs
    assert not verify(tuned, model).not_checked
    readers, spec = [CheckpointReader(folder) for folder in (tuned, plain)], build_spec(CONFIG, "test")
    schemes, moved = schemes_of(readers[0]), 0
    stated = json.loads((tuned / "quantkit.json").read_text())["linears"]
    for ref in spec.linears():
        scheme = schemes[ref.key]
        assert scheme is not None
        new, old = (FORMAT.decode(ref, scheme, reader.tensors()) for reader in readers)
        assert torch.equal(new.codes.float(), old.codes.float())
        assert tunable(scheme) or torch.equal(new.scale, old.scale)
        assert stated[ref.key]["method"] == ("tuned" if tunable(scheme) else "rtn")
        moved += int((new.scale != old.scale).sum())
        assert ((new.scale.float() / old.scale.float() - 1).abs() <= 0.1 + 2**-7).all()
    record = json.loads((tuned / "run.json").read_text())["tuning"]
    assert moved and record["kept"] and record["after"] < record["before"]
    assert {path.name for path in tuned.iterdir()} == {path.name for path in plain.iterdir()}


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "step", [pytest.param("tune", marks=pytest.mark.slow), pytest.param("rewrite", marks=pytest.mark.slow), "put_in_place"]
)
def test_killed_at_any_step_of_tuning_it_ends_with_the_same_bytes(
    step: str, outs: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is durable; after one unit; between a unit's journal line and its shards' place."""
    model, tuned, _ = outs
    work, calls = getattr(pipeline, step), 0

    def killed(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (1 if step == "tune" else 2):
            raise Killed
        return work(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pipeline, step, killed)
        quantkit.quantize(model, tmp_path / "out", Recipe(**TUNED, **TEXT))
    assert (partial_of(tmp_path / "out") / WORK / "journal").exists()
    record = quantkit.quantize(model, tmp_path / "out", Recipe(**TUNED, **TEXT))
    assert record["resumed_at_unit"] == 3 and not record["recovered"]
    assert (tmp_path / "out" / "SHA256SUMS").read_bytes() == (tuned / "SHA256SUMS").read_bytes()


def test_text_beside_would_meet_what_is_not_tuned_yet(model: Path, tmp_path: Path) -> None:
    from quantkit.calib.lockstep import Observer

    with pytest.raises(ConfigError, match="before they are tuned"):
        quantkit.quantize(model, tmp_path / "out", Recipe(**TUNED, **TEXT), beside=[Observer()])
