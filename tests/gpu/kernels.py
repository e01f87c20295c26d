"""Every Triton kernel on small shapes against its definition: in Triton's interpreter
(tests/kernels/test_triton_kernels.py runs this file) and, the same, on a GPU (`make gpu-test`)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from quantkit.kernels.backend import QuantExperts
from quantkit.kernels.reference import round_activation
from quantkit.kernels.triton import ops, repair, routing, serve, weight_only
from quantkit.kernels.triton.activation import quantize
from quantkit.kernels.triton.backend import BACKEND
from quantkit.kernels.triton.layout import PackedInt, Stack, join, pack
from quantkit.kernels.triton.tiles import TABLE, Tile
from quantkit.quant import gptq
from quantkit.quant.loops import PLAIN
from quantkit.scheme import PRESETS, Grid, Kind, Scheme, Strategy, scheme_named
from tests.helpers.kernels import ON_GPU, check_repair, close, layer, poison, product, random_expert, random_weight, stacked

BF16 = torch.bfloat16
ROUNDED = [name for name in ON_GPU if PRESETS[name].activation]
CHANNEL = {bits: Scheme(f"channel{bits}", Grid(Kind.INT, bits, Strategy.CHANNEL)) for bits in (4, 8)}
SMALL = Tile(16, 16, 4, 3)


@pytest.fixture(autouse=True)
def poisoned(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    poison(monkeypatch)
    yield


def named(name: str, group: int | None) -> Scheme:
    """A preset with that group size; channel scales where there is none."""
    return scheme_named(name, group) or PRESETS[name] if group else CHANNEL[8 if name == "W8A16" else 4]


@pytest.mark.parametrize(
    ("name", "tokens", "rows", "columns", "group"),
    [
        ("W4A16", 1, 72, 256, 128),
        ("W4A16_ASYM", 3, 40, 256, 64),
        ("W4A16", 17, 33, 96, 32),
        ("W4A16_ASYM", 2, 24, 144, 16),
        ("W4A16_ASYM", 2, 24, 192, 96),  # runs of 32, groups of three
        ("W4A16", 5, 64, 72, None),  # padding to 256 columns
        ("W4A16", 3, 24, 512, 256),
        ("W4A16", 2, 16, 2048, 128),  # K is split
        ("W4A16_ASYM", 2, 16, 2304, 128),  # K is split unevenly
        ("W4A16", 33, 130, 128, 128),
        ("W8A16", 1, 40, 256, 128),
        ("W8A16", 3, 24, 192, 64),
        ("W8A16", 18, 33, 96, 32),
        ("W8A16", 2, 24, 48, 16),
        ("W8A16", 4, 8, 200, None),
        ("W8A16", 2, 16, 1152, 128),
        *(
            (name, tokens, rows, columns, 128)
            for name in ROUNDED
            for tokens, rows, columns in [(1, 40, 128), (19, 150, 256)]
        ),
        *((name, 3, 33, 80 if name != "FP8_BLOCK" else 384, 128) for name in ROUNDED),
        *((name, 2, 16, 1152, 128) for name in ROUNDED),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_linear(name: str, tokens: int, rows: int, columns: int, group: int | None, dtype: torch.dtype) -> None:
    scheme = named(name, group)
    weight, x = random_weight(rows, columns, scheme), torch.randn(tokens, columns, dtype=dtype)
    out = ops.linear(x, pack(weight, scheme))
    assert out.dtype is dtype
    close(out, product(x, weight, scheme, False), product(x, weight, scheme, True))


@pytest.mark.parametrize("kind", TABLE)
def test_every_tile_of_the_table(kind: str) -> None:
    scheme = {"int4": PRESETS["W4A16"], "int8": PRESETS["W8A16"], "row8": PRESETS["W8A8"], "block8": PRESETS["FP8_BLOCK"]}[
        kind
    ]
    weight, x = random_weight(140, 256, scheme), torch.randn(20, 256, dtype=BF16)
    exact, same = product(x, weight, scheme, True), product(x, weight, scheme, False)
    for _, tile in TABLE[kind]:
        close(ops.linear(x, pack(weight, scheme), tile), same, exact)


@pytest.mark.parametrize("name", ON_GPU)
def test_zero_tokens_and_leading_axes(name: str) -> None:
    scheme = PRESETS[name]
    packed = pack(random_weight(24, 128, scheme), scheme)
    for lead in ((0,), (2, 0), (2, 3)):
        assert ops.linear(torch.randn(*lead, 128), packed).shape == (*lead, 24)
    gate_up, down = stacked([random_expert(128, 128, scheme)], scheme)
    x, none = torch.zeros(0, 128, dtype=BF16), torch.zeros(0, 2, dtype=torch.long)
    out = ops.moe(x, gate_up, down, none, none.float())
    assert out.shape == (0, 128) and out.dtype is BF16


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("tokens", [1, 5])
def test_activation_is_the_references(name: str, tokens: int) -> None:
    activation = PRESETS[name].activation
    assert activation
    x = torch.randn(tokens, 384) * torch.tensor([1e-3, 1.0, 50.0]).repeat_interleave(128)
    x[0, :128] = 0  # a group without a magnitude
    given = None if activation.dynamic else torch.rand(2 * tokens) * 0.1 + 0.01
    codes, scales = quantize(x.to(BF16), activation, given, 1 if activation.dynamic else 2)
    got = (codes.float().unflatten(1, (scales.shape[1], -1)) * scales[:, :, None]).flatten(1)
    if given is None:
        assert torch.equal(got, round_activation(x.to(BF16), activation, None))
    else:  # two rows of codes for each token
        rows = [round_activation(x[i // 2].to(BF16), activation, given[i : i + 1]) for i in range(2 * tokens)]
        assert torch.equal(got, torch.stack(rows))


def check_layer(
    scheme: Scheme, tokens: int, top_k: int, experts: int, hidden: int, inner: int, dtype: torch.dtype = BF16
) -> None:
    """Both ways of the layer against the definition; weights are not normalised and the last expert gets nothing."""
    parts = [random_expert(inner, hidden, scheme) for _ in range(experts)]
    x, router = torch.randn(tokens, hidden, dtype=dtype), torch.rand(tokens, top_k)
    ids = torch.rand(tokens, max(experts - 1, 1)).topk(top_k).indices
    exact, same = (layer(x, parts.__getitem__, ids, router, scheme, exact) for exact in (True, False))
    packed = stacked(parts, scheme)
    out = ops.moe(x, *packed, ids, router)
    assert out.dtype is dtype
    close(out, same, exact)
    gate_up, down = packed
    if isinstance(gate_up, PackedInt) and isinstance(down, PackedInt):
        close(ops.moe_by_scratch(x, gate_up, down, ids, router), same, exact)


@pytest.mark.parametrize(
    ("name", "tokens", "top_k", "experts", "hidden", "inner", "group"),
    [
        ("W4A16", 1, 1, 2, 64, 72, None),
        ("W4A16_ASYM", 5, 2, 4, 64, 64, 32),
        ("W4A16", 20, 2, 3, 128, 64, 64),
        ("W4A16", 33, 1, 2, 32, 40, None),
        ("W4A16_ASYM", 3, 1, 3, 128, 128, 128),
        ("W4A16", 2, 1, 2, 128, 1280, 128),  # down is split along K
        ("W8A16", 1, 1, 2, 128, 128, 128),
        ("W8A16", 7, 2, 4, 64, 64, 32),
        ("W8A16", 9, 1, 2, 72, 40, None),
        *((name, 1, 1, 2, 128, 128, None) for name in ROUNDED),
        *((name, 6, 2, 4, 256, 128, None) for name in ROUNDED),
        *((name, 9, 1, 3, 80, 48, None) for name in ROUNDED if name != "FP8_BLOCK"),
        *((name, 2, 1, 2, 128, 1152, None) for name in ROUNDED),
    ],
)
def test_moe(name: str, tokens: int, top_k: int, experts: int, hidden: int, inner: int, group: int | None) -> None:
    scheme = PRESETS[name] if name in ROUNDED else named(name, group)
    check_layer(scheme, tokens, top_k, experts, hidden, inner)


@pytest.mark.parametrize("name", ["W4A16", "FP8"])
def test_moe_takes_float32(name: str) -> None:
    check_layer(PRESETS[name], 4, 2, 3, 128, 128, torch.float32)


@pytest.mark.parametrize("name", ["W4A16", "FP8", "FP8_BLOCK"])
def test_shared_expert_is_one_more_id(name: str) -> None:
    scheme = PRESETS[name]
    parts = [random_expert(128, 128, scheme) for _ in range(3)]
    x, routed, weight = torch.randn(4, 128, dtype=BF16), torch.randint(0, 2, (4, 1)), torch.rand(4, 1)
    ids, router = torch.cat([routed, torch.full((4, 1), 2)], 1), torch.cat([weight, torch.ones(4, 1)], 1)
    exact, same = (layer(x, parts.__getitem__, ids, router, scheme, exact) for exact in (True, False))
    close(ops.moe(x, *stacked(parts, scheme), ids, router), same, exact)


def test_experts_round_with_their_own_scale() -> None:
    """One token, two experts alike but for their input scales: exchanging the ids exchanges what the router weighs."""
    scheme = PRESETS["FP8"]
    part = random_expert(128, 128, scheme)
    coarse = [torch.tensor([s]).bfloat16() for s in (0.004, 0.4)]
    parts = []
    for scale in coarse:
        gate, up = (type(w)(w.codes, w.scale, None, w.grid, scale) for w in (part.gate, part.up))
        parts.append(type(part)(gate, up, part.down))
    x, packed = torch.randn(1, 128, dtype=BF16), stacked(parts, scheme)
    one = torch.ones(1, 1)
    alone = [ops.moe(x, *packed, torch.tensor([[e]]), one).double() for e in (0, 1)]
    assert (alone[0] - alone[1]).norm() > 0.01 * alone[0].norm()  # they do differ
    both = ops.moe(x, *packed, torch.tensor([[1, 0]]), torch.tensor([[2.0, 1.0]])).double()
    torch.testing.assert_close(both, 2 * alone[1] + alone[0], rtol=2**-7, atol=2**-8 * float(both.abs().max()))


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_scratch_is_the_weight_rounded_once(name: str) -> None:
    for scheme, columns in ((named(name, 64), 192), (CHANNEL[8 if name == "W8A16" else 4], 72)):
        weight = random_weight(40, columns, scheme)
        packed = pack(weight, scheme)
        assert isinstance(packed, PackedInt)
        wide = weight_only.dequantize(packed, 0, torch.empty(40, columns, dtype=BF16))
        assert torch.equal(wide, weight.dequantize().bfloat16())
        x = torch.randn(3, columns)
        close(ops.linear_by_scratch(x, packed), product(x, weight, scheme, False), product(x, weight, scheme, True))


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "block"),
    [(1, 1, 16, 16), (7, 2, 4, 4), (40, 3, 5, 16), (9, 6, 160, 32), (300, 2, 16, 64)],
)
def test_sort_by_expert(tokens: int, top_k: int, experts: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.rand(tokens, experts).topk(top_k).indices
    both = []
    for few in (routing.FEW, (0,)):  # by the kernel, by torch
        monkeypatch.setattr(routing, "FEW", few)
        slots, owners = routing.sort_by_expert(ids, experts, block)
        owned = slots.view(-1, block)[owners >= 0]
        live = owned < ids.numel()
        assert torch.equal(owned[live].sort().values, torch.arange(ids.numel(), dtype=torch.int32))
        of_slot = owners[owners >= 0].repeat_interleave(block).view(-1, block)[live]
        assert torch.equal(of_slot.long(), ids.flatten()[owned[live].long()])
        both.append((owners, owned))
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16", "FP8_DYNAMIC"])
@pytest.mark.parametrize(("columns", "rows"), [(128, 20), (1, 1), (37, 19)])
def test_gptq_repairs_a_block_as_it_does_without_the_kernel(name: str, columns: int, rows: int) -> None:
    check_repair(repair.repair, PRESETS[name].weight, columns, rows)


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "FP8_DYNAMIC"])
def test_gptq_rounds_as_it_does_without_the_kernel(name: str) -> None:
    """20 rows, two blocks of columns, the second one of 32; the codes are the same, or nearly so where a GPU adds in another
    order."""
    grid = (scheme_named(name, 32) or PRESETS[name]).weight
    columns = 160
    weight, x = torch.randn(20, columns), torch.randn(512, columns) * torch.linspace(0.2, 2.0, columns)
    hessian = x.T @ x / len(x)
    plain, fast = gptq.gptq(weight, hessian, grid), gptq.gptq(weight, hessian, grid, replace(PLAIN, repair=repair.repair))
    same = plain.quantized.codes.view(torch.int8) == fast.quantized.codes.view(torch.int8)
    assert same.double().mean() > (0.98 if same.is_cuda else 0.9999), float(same.double().mean())
    nearest = gptq.gptq(weight, torch.diag(hessian.diagonal()), grid).quantized
    losses = [float(((q.dequantize() - weight) @ x.T).norm()) for q in (fast.quantized, nearest)]
    assert losses[0] < losses[1]  # it did repair something
    with pytest.raises(ValueError, match="no block"):
        repair.repair(torch.ones(129, 2), torch.ones(129, 2), torch.eye(129), torch.ones(129, 2), None, grid)


def test_a_call_chooses_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above SCRATCH_FROM rows a weight, the scratch serves; the result is the same within its precision."""
    scheme = PRESETS["W4A16"]
    parts = [random_expert(128, 128, scheme) for _ in range(2)]
    x, ids, router = torch.randn(6, 128), torch.randint(0, 2, (6, 1)), torch.rand(6, 1)
    called: list[str] = []

    def spy(name: str, real: QuantExperts) -> object:
        return lambda *a: (called.append(name), real(*a))[1]

    for name in ("linear_by_scratch", "moe_by_scratch"):
        monkeypatch.setattr(ops, name, spy(name, getattr(ops, name)))
    results: list[list[Tensor]] = []
    for limit in (2048, 3):
        monkeypatch.setattr(serve, "SCRATCH_FROM", limit)
        linear = serve.Linear(pack(parts[0].gate, scheme), None)
        experts = serve.Experts(*stacked(parts, scheme), None)
        results.append([linear(x), experts(x, ids, router)])
    assert called == ["linear_by_scratch", "moe_by_scratch"]
    for fused, scratch in zip(*results, strict=True):
        assert (fused - scratch).norm() < 2**-6 * fused.norm()


def test_backend_packs_one_expert_at_a_time() -> None:
    scheme, given = PRESETS["FP8"], []

    def parts() -> Iterator[object]:
        for _ in range(3):
            given.append(random_expert(128, 128, scheme))
            yield given[-1]

    experts = BACKEND.experts(parts(), 3, scheme)  # type: ignore[arg-type]
    x, ids, router = torch.randn(5, 128), torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    exact, same = (layer(x, given.__getitem__, ids, router, scheme, exact) for exact in (True, False))
    close(experts(x, ids, router), same, exact)
    weight = random_weight(40, 128, scheme)
    close(BACKEND.linear(weight, scheme)(x), product(x, weight, scheme, False), product(x, weight, scheme, True))


def test_refusals() -> None:
    scheme, x = PRESETS["W4A16"], torch.randn(2, 128, dtype=BF16)
    weight = pack(random_weight(16, 128, scheme), scheme)
    ids, ones = torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1)
    with pytest.raises(ValueError, match="not bfloat16 or float32"):
        ops.linear(x.half(), weight)
    with pytest.raises(ValueError, match="64 features, the weight 128"):
        ops.linear(x[:, :64], weight)
    with pytest.raises(ValueError, match="not twice as many"):
        ops.moe(x, weight, weight, ids, ones)
    with pytest.raises(ValueError, match="do not fit ids"):
        ops.moe(x, weight, weight, ids, torch.ones(2, 2))
    stack = Stack(2)
    stack.add(weight)
    with pytest.raises(ValueError, match="1 experts of 2"):
        stack.finish()
    other = scheme_named("W4A16", 64)
    assert other
    with pytest.raises(ValueError, match="differ"):
        stack.add(pack(random_weight(16, 128, other), other))
    block = PRESETS["FP8_BLOCK"]
    with pytest.raises(ValueError, match="whole blocks"):
        join(*(pack(random_weight(64, 128, block), block) for _ in range(2)))
    static = PRESETS["FP8"]
    with pytest.raises(ValueError, match="two input scales"):
        join(*(pack(random_weight(64, 128, static, scale), static) for scale in (0.1, 0.2)))
