"""What holds for everything of a kind, on examples that hypothesis draws: GPTQ, packing, formats, replay, padding."""

from __future__ import annotations

import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from quantkit.calib import streams
from quantkit.dtypes import torch_dtype
from quantkit.errors import ConfigError
from quantkit.formats.packing import pack_rows, unpack_rows
from quantkit.formats.table import FORMATS
from quantkit.model.cache import Cache, KVFormat
from quantkit.model.forward import forward, head
from quantkit.model.registry import build_spec
from quantkit.model.spec import Linear, ModelSpec, Role
from quantkit.model.weights import Weights
from quantkit.qtensor import QuantizedTensor
from quantkit.quant.gptq import gptq
from quantkit.quant.method import Method
from quantkit.quant.rounding import rtn
from quantkit.quant.solve import solve
from quantkit.scheme import FP8_TENSOR, PRESETS, Kind, Scheme, Strategy, fp8_block, scheme_named, weight_only
from quantkit.stats import LinearStats
from tests.conftest import CONFIG, random_weights
from tests.helpers.architectures import TINY
from tests.helpers.replay import Replayed

some = partial(settings, deadline=None, derandomize=True)  # the same examples each time
SEEDS = st.integers(0, 2**31)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


GPTQ_SCHEMES = {
    "W4A16": scheme_named("W4A16", 16),
    "W4A16_ASYM": scheme_named("W4A16_ASYM", 16),
    "W8A16": scheme_named("W8A16", 16),
    "W4A16_CHANNEL": weight_only(4, True, None),
    "W4A16_ASYM_CHANNEL": weight_only(4, False, None),
    "W8A16_CHANNEL": weight_only(8, True, None),
    "FP8_DYNAMIC": PRESETS["FP8_DYNAMIC"],
}


def hessian(size: int, condition: float, kind: str, seed: int) -> Tensor:
    """Positive definite, float32 [size, size], with eigenvalues from 1 down to 10^-condition."""
    g = drawn(seed)
    spectrum = torch.logspace(0, -condition, size)
    if kind == "diagonal":
        return torch.diag(spectrum[torch.randperm(size, generator=g)])
    if kind == "tokens":  # few, of which one feature is far larger than the others
        x = torch.randn(2 * size, size, generator=g)
        x[:, 0] *= 10**condition
        return x.T @ x / len(x)
    basis = torch.linalg.qr(torch.randn(size, size, generator=g)).Q
    made = basis @ torch.diag(spectrum) @ basis.T
    return (made + made.T) / 2


def objective(weight: Tensor, value: Tensor, h: Tensor) -> float:
    """tr((W - Q) H (W - Q)^T)."""
    difference = (weight - value).double()
    return float((difference @ h.double() * difference).sum())


def stats_of(h: Tensor) -> LinearStats:
    return LinearStats(len(h), h.clone(), tokens=len(h), mass=1.0)


@pytest.mark.parametrize("name", GPTQ_SCHEMES)
@given(
    rows=st.sampled_from([1, 1, 2, 3, 5, 7, 33]),
    groups=st.integers(1, 5),
    condition=st.floats(0, 7),
    kind=st.sampled_from(["basis", "diagonal", "tokens"]),
    seed=SEEDS,
)
@example(rows=1, groups=2, condition=0.5, kind="basis", seed=25)  # where repairing loses, with zero points by row
@some(max_examples=30)
def test_gptq_is_never_worse_than_rounding(
    name: str, rows: int, groups: int, condition: float, kind: str, seed: int
) -> None:
    """Under what it minimises, as far as float32 tells."""
    scheme, size = GPTQ_SCHEMES[name], 16 * groups
    assert scheme is not None
    weight, h = torch.randn(rows, size, generator=drawn(seed)) * 0.05, hessian(size, condition, kind, seed)
    ((solved, outcome),) = solve([weight], scheme, Method("gptq"), stats_of(h))
    rounded = objective(weight, rtn(weight, scheme).dequantize(), h)
    assert objective(weight, solved.dequantize(), h) <= rounded * (1 + 1e-4)
    assert (outcome.method == "rtn") == ("rounding loses less" in outcome.fallback)


def test_where_repairing_loses_it_is_not_used() -> None:
    """It is greedy, so that for one row luck decides. Wherever it wins, its codes are used as they are."""
    scheme, kept = weight_only(4, False, None), 0
    for seed in range(60):
        weight, h = torch.randn(1, 32, generator=drawn(seed)), hessian(32, 0.5, "basis", seed)
        ((solved, outcome),) = solve([weight], scheme, Method("gptq"), stats_of(h))
        plain, repaired = rtn(weight, scheme), gptq(weight, h, scheme.weight).quantized
        wins = objective(weight, plain.dequantize(), h) < objective(weight, repaired.dequantize(), h)
        assert (outcome.method, outcome.fallback) == (
            ("rtn", "rounding loses less than GPTQ here") if wins else ("gptq", "")
        )
        assert torch.equal(solved.codes, (plain if wins else repaired).codes)
        kept += wins
    assert 0 < kept < 15


@given(bits=st.integers(1, 9), rows=st.integers(1, 9), columns=st.integers(1, 70), seed=SEEDS)
@some(max_examples=120)
def test_packing_inverts_or_refuses(bits: int, rows: int, columns: int, seed: int) -> None:
    """Signed codes, which lie there as unsigned ones from the least significant end; of widths and counts that do not fill
    words none."""
    low = -(2 ** (bits - 1))
    codes = torch.randint(low, -low, (rows, columns), generator=drawn(seed)).to(torch.int8)
    if bits not in (4, 8) or columns % (32 // bits):
        with pytest.raises(ValueError, match="bits"):
            pack_rows(codes, bits)
        return
    words = pack_rows(codes, bits)
    assert words.dtype is torch.int32 and words.shape == (rows, columns * bits // 32)
    assert torch.equal(unpack_rows(words, bits), codes)
    digits = [[word % 2**32 >> at & 2**bits - 1 for word in row for at in range(0, 32, bits)] for row in words.tolist()]
    assert digits == (codes.int() - low).tolist()
    turned = codes.T.contiguous().T  # as it lies where outputs are packed
    assert torch.equal(pack_rows(turned, bits), words)


def test_widths_that_are_not_packed_are_not_unpacked() -> None:
    for bits in (1, 2, 3, 5, 6, 7):
        with pytest.raises(ValueError, match="4 and 8"):
            unpack_rows(torch.zeros(1, 1, dtype=torch.int32), bits)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    """Everything that a format may meet: presets, and what other tools make."""
    group = draw(st.sampled_from([8, 12, 16, 32, None]))
    made = draw(
        st.one_of(
            st.builds(partial(scheme_named, group_size=group), st.sampled_from(sorted(PRESETS))),
            st.builds(weight_only, st.sampled_from([4, 8]), st.booleans(), st.just(group)),
            st.builds(fp8_block, st.integers(1, 9), st.integers(1, 9)),
            st.just(FP8_TENSOR),
        )
    )
    assert made is not None
    return made.stored(draw(st.sampled_from(["BF16", "F16", "F32"])))


@st.composite
def weights(draw: st.DrawFn) -> tuple[Linear, Scheme, QuantizedTensor]:
    scheme, g = draw(schemes()), drawn(draw(SEEDS))
    grid = scheme.weight
    out = draw(st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 24])))
    size = grid.group_size or draw(st.sampled_from([1, 8]))
    inputs = size * draw(st.integers(1, 5))
    codes = torch.randint(int(max(grid.qmin, -128)), int(min(grid.qmax, 127)) + 1, (out, inputs), generator=g)
    shape = grid.scale_shape(out, inputs)
    zero = None if grid.symmetric else torch.randint(int(grid.qmin), int(grid.qmax) + 1, shape, generator=g).to(torch.int8)
    scale = torch.rand(shape, generator=g) * 0.1 + 0.001
    if draw(st.booleans()):
        scale = 2.0 ** -torch.randint(1, 9, shape, generator=g)  # which every float holds
    if grid.signed:
        scale *= torch.randint(0, 2, shape, generator=g) * 2 - 1
    activation = scheme.activation
    input_scale = None
    if scheme.static and activation is not None:
        input_scale = torch.tensor([0.25]).to(torch_dtype(activation.scale_dtype))
    stored = codes.to(torch.float8_e4m3fn if grid.kind is Kind.FLOAT else torch.int8)
    q = QuantizedTensor(stored, scale.to(torch_dtype(grid.scale_dtype)), zero, grid, input_scale)
    return Linear("layer.up", out, inputs, Role.MLP), scheme, q


def holds(name: str, ref: Linear, scheme: Scheme, q: QuantizedTensor) -> bool:
    """Whether a format can hold a weight exactly, from what is published of it."""
    grid, integers = scheme.weight, scheme.weight.kind is Kind.INT and scheme.activation is None
    word = 32 // grid.bits
    whole_in, whole_out = ref.in_features % word == 0, ref.out_features % word == 0
    half = bool((q.scale.half().double() == q.scale.double()).all())
    if name == "compressed-tensors":
        return not integers or (whole_in and (grid.symmetric or whole_out))
    if name == "awq":
        return integers and grid.bits == 4 and whole_out and half
    if name == "gptq-v2":
        return integers and whole_in and whole_out and half
    if name == "gptq":  # which stores a zero point less one
        return holds("gptq-v2", ref, scheme, q) and (q.zero is None or bool((q.zero > grid.qmin).all()))
    wanted = Strategy.BLOCK if name == "deepseek-fp8" else Strategy.TENSOR
    return grid.kind is Kind.FLOAT and grid.strategy is wanted


@pytest.mark.parametrize("name", FORMATS)
@given(weights())
@some(max_examples=80)
def test_a_format_gives_back_what_it_takes_and_refuses_the_rest(
    name: str, weight: tuple[Linear, Scheme, QuantizedTensor]
) -> None:
    ref, scheme, q = weight
    row = FORMATS[name]
    try:
        target = row.target(scheme)
        tensors = row.encode(ref, target, q)
    except ConfigError as error:
        assert not holds(name, ref, scheme, q), error
        assert (ref.key in error.problem or scheme.name in error.problem) and error.fix
        return
    assert holds(name, ref, scheme, q)
    planned = {plan.name: (torch_dtype(plan.dtype), plan.shape) for plan in row.planned(ref, target)}
    assert {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()} == planned
    back = row.decode(ref, target, tensors)
    assert torch.equal(back.codes.view(torch.int8), q.codes.view(torch.int8))
    assert torch.equal(back.scale.double(), q.scale.double()) and back.grid == target.weight
    no_zero = torch.zeros_like(q.scale, dtype=torch.int8)
    assert torch.equal(no_zero if back.zero is None else back.zero, no_zero if q.zero is None else q.zero)
    assert (back.input_scale is None) == (q.input_scale is None)
    assert back.input_scale is None or back.input_scale.tolist() == [0.25]


class InMemory(Weights):
    """Notes the input of every linear, [tokens, in]."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.inputs = tensors, dict[str, Tensor]()

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        self.inputs[ref.key] = x.reshape(-1, ref.in_features)
        return F.linear(x, self.tensors[ref.weight])

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]


MODELS: dict[str, dict[str, Any]] = {
    "hunyuan": {**CONFIG, "hidden_size": 64},
    **{name: TINY[name] for name in ("llama", "qwen3_moe", "deepseek_v2")},
}


@cache
def model(name: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    return build_spec(MODELS[name], name), {key: t.float() for key, t in random_weights(MODELS[name]).items()}


def replayed(
    spec: ModelSpec, tensors: dict[str, Tensor], ids: Tensor, folder: Path, kv_format: KVFormat | None
) -> tuple[Tensor, dict[str, LinearStats]]:
    """Hidden states after the last layer, and what was gathered on the way."""
    text = Replayed(spec, tensors, ids, folder, kv_format)
    *_, (_, hidden) = text.layers()
    return hidden, text.seen


def relative(a: Tensor, b: Tensor) -> float:
    """Median over tokens of |a - b| / |b|."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


@pytest.mark.parametrize("name", MODELS)
@given(
    windows=st.integers(1, 4),
    length=st.integers(1, 30),
    longest=st.sampled_from([1, 7, 100]),
    batch=st.integers(1, 40),
    kv_format=st.sampled_from([None, *KVFormat]),
    seed=SEEDS,
)
@some(max_examples=9)
def test_replay_equals_forward(
    name: str, windows: int, length: int, longest: int, batch: int, kv_format: KVFormat | None, seed: int
) -> None:
    """Whole windows and windows in pieces, in batches of any size, with K and V kept in any format."""
    spec, tensors = model(name)
    ids, recording = torch.randint(1, 257, (windows, length), generator=drawn(seed)), InMemory(tensors)
    *_, last = forward(spec, recording, ids, None if kv_format is None else Cache(kv_format))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "_LONGEST_WHOLE", longest)
        patch.setattr(streams, "_BATCH_TOKENS", batch)
        hidden, seen = replayed(spec, tensors, ids, Path(folder), kv_format)
    expected = last.hidden.flatten(0, 1)
    exact = kv_format in (None, KVFormat.FLOAT32)
    if exact:
        torch.testing.assert_close(hidden, expected, atol=2e-4, rtol=2e-4)
    else:  # a key that sums in another order may round the other way: far less than all that rounding does
        *_, plain = forward(spec, InMemory(tensors), ids)
        assert relative(hidden, expected) < 0.5 * relative(plain.hidden.flatten(0, 1), expected)
    assert seen.keys() == {ref.key for ref in spec.linears()}
    for ref in spec.linears():
        x, stats = recording.inputs.get(ref.key, torch.empty(0, ref.in_features)), seen[ref.key]
        if (kv_format is not None or length > longest) and len(x) != stats.tokens and ref.key.endswith("kv_b_proj"):
            continue  # with a cache its halves are multiplied instead; of a window in pieces it expands earlier ones again
        assert stats.tokens == len(x)
        if exact and not stats.lent and stats.hessian is not None:
            torch.testing.assert_close(
                stats.hessian, x.T @ x, atol=1e-2 * float((x * x).sum(0).max()), rtol=0
            )  # of bfloat16


@pytest.mark.parametrize("name", MODELS)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=4), cut=st.integers(1, 11), seed=SEEDS)
@some(max_examples=6)
def test_padding_at_the_start_of_a_row_changes_nothing(name: str, lengths: list[int], cut: int, seed: int) -> None:
    """A row that is filled up in front has the logits that it has alone, also when it comes in two pieces."""
    spec, tensors = model(name)
    weights, width = InMemory(tensors), max(lengths)
    rows = [torch.randint(1, 257, (1, n), generator=drawn(seed + n)) for n in lengths]
    ids = torch.cat([F.pad(row, (width - row.shape[1], 0), value=3) for row in rows])
    memory = Cache(padding=torch.tensor([width - n for n in lengths]))
    parts = [[*forward(spec, weights, part, memory)][-1].hidden for part in (ids[:, :cut], ids[:, cut:]) if part.shape[1]]
    together = head(spec, weights, torch.cat(parts, dim=1))
    for i, row in enumerate(rows):
        *_, alone = forward(spec, weights, row)
        torch.testing.assert_close(
            together[i, width - lengths[i] :], head(spec, weights, alone.hidden)[0], atol=2e-4, rtol=0
        )
