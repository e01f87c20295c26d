"""The CPU kernels against their specification, and the build that makes them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.dtypes import torch_dtype
from quantkit.kernels import reference
from quantkit.kernels.cpu import build
from quantkit.kernels.cpu.backend import rounding_of_w4a8
from quantkit.kernels.cpu.linear import Packed, experts, gather, matmul, pack, stack, unfit
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import PRESETS, Activation, Grid, Kind, Scheme, Strategy
from tests.helpers.kernels import either_sign

LIBRARY = build.load()
built = pytest.mark.skipif(isinstance(LIBRARY, str), reason=f"no CPU kernels: {LIBRARY}")
TOKENS = (0, 1, 2, 3, 4, 5, 9, 16, 17, 25, 64, 65, 193, 300)
INT4_CHANNEL = Grid(Kind.INT, 4, Strategy.CHANNEL)
GRIDS = {name: scheme.weight for name, scheme in PRESETS.items()} | {
    "INT4 channel": INT4_CHANNEL,
    "INT4 channel asymmetric": Grid(Kind.INT, 4, Strategy.CHANNEL, symmetric=False),
    "INT4 g32": Grid(Kind.INT, 4, Strategy.GROUP, group_size=32),
    "INT4 g8 asymmetric": Grid(Kind.INT, 4, Strategy.GROUP, symmetric=False, group_size=8),
    "INT4 g384": Grid(Kind.INT, 4, Strategy.GROUP, group_size=384),
    "INT8 g24 asymmetric": Grid(Kind.INT, 8, Strategy.GROUP, symmetric=False, group_size=24),
    "FP8 blocks of 8 x 40": Grid(Kind.FLOAT, 8, Strategy.BLOCK, block=(8, 40)),
    "INT4 float16 scales": Grid(Kind.INT, 4, Strategy.GROUP, symmetric=False, group_size=32, scale_dtype="F16"),
    "FP8 float32 scales": Grid(Kind.FLOAT, 8, Strategy.BLOCK, block=(16, 8), scale_dtype="F32"),
}


def random_codes(grid: Grid, rows: int, inputs: int) -> Tensor:
    if grid.kind is Kind.FLOAT:
        return torch.randn(rows, inputs).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return torch.randint(int(grid.qmin), int(grid.qmax) + 1, (rows, inputs), dtype=torch.int8)


def random_weight(grid: Grid, rows: int, inputs: int) -> QuantizedTensor:
    shape = grid.scale_shape(rows, inputs)
    zero = None if grid.symmetric else torch.randint(int(grid.qmin), int(grid.qmax) + 1, shape, dtype=torch.int8)
    scale = either_sign(torch.rand(shape) + 0.1, grid).to(torch_dtype(grid.scale_dtype))
    return QuantizedTensor(random_codes(grid, rows, inputs), scale, zero, grid)


def exact_weight(grid: Grid, rows: int, inputs: int) -> QuantizedTensor:
    """Scales are powers of two and codes small integers, so that no sum of products with small integers rounds."""
    shape = grid.scale_shape(rows, inputs)
    codes = torch.randint(-7, 8, (rows, inputs))
    stored = codes.to(torch.float8_e4m3fn if grid.kind is Kind.FLOAT else torch.int8)
    zero = None if grid.symmetric else torch.randint(-8, 8, shape, dtype=torch.int8)
    scale = either_sign(2.0 ** torch.randint(-2, 2, shape), grid).to(torch_dtype(grid.scale_dtype))
    return QuantizedTensor(stored, scale, zero, grid)


def one(q: QuantizedTensor, activation: Activation | None = None) -> Packed:
    return gather([pack(q, activation)])


def poisoned(tokens: int, rows: int) -> Tensor:
    return torch.full((tokens, rows), float("nan"))


def shapes(grid: Grid) -> list[tuple[int, int]]:
    """[rows, inputs]: rows that do not fill a block of 16, one group only, inputs that do not fill a chunk of 128."""
    group = grid.group_size or 8
    return [(8, group), (37, group), (40, 3 * group), (88, group * (640 // group))]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@built
@pytest.mark.parametrize("name", GRIDS)
def test_error_is_below_bf16(name: str) -> None:
    grid = GRIDS[name]
    for rows, inputs in shapes(grid):
        q = random_weight(grid, rows, inputs)
        packed, plain = one(q), q.dequantize()
        for tokens in TOKENS:
            x = torch.randn(tokens, inputs).bfloat16()
            y = matmul(x, packed, poisoned(tokens, rows))
            wanted = F.linear(x.double(), plain.double())
            allowed = 2 * (F.linear(x, plain.bfloat16()).double() - wanted).abs().max() if tokens else 0
            assert y.dtype == torch.float32 and y.shape == wanted.shape
            assert not tokens or (y - wanted).abs().max() <= allowed, (rows, inputs, tokens)


@built
@pytest.mark.parametrize("name", GRIDS)
def test_exact_where_arithmetic_is(name: str) -> None:
    grid = GRIDS[name]
    for rows, inputs in shapes(grid):
        q = exact_weight(grid, rows, inputs)
        packed = one(q)
        for tokens in TOKENS:
            x = torch.randint(-8, 9, (tokens, inputs)).float()
            y = matmul(x, packed, poisoned(tokens, rows))
            assert torch.equal(y, reference.linear(x, q, None)), (rows, inputs, tokens)


@built
@pytest.mark.parametrize("inputs", [1, 7, 12, 129])
def test_odd_inputs_of_8_bit_weights(inputs: int) -> None:
    for name in ("W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"):
        q = exact_weight(GRIDS[name], 19, inputs)
        for tokens in (1, 30):
            x = torch.randint(-8, 9, (tokens, inputs)).float()
            assert torch.equal(matmul(x, one(q), poisoned(tokens, 19)), reference.linear(x, q, None))


@built
@pytest.mark.parametrize("tokens", [16, 32])
@pytest.mark.parametrize("grid", [GRIDS["FP8"], GRIDS["W8A8"], INT4_CHANNEL], ids=["fp8", "int8", "int4"])
def test_every_code(grid: Grid, tokens: int) -> None:
    """Each code alone in its row, so that a wrong bit cannot hide in a sum. NaN codes are refused."""
    codes = torch.arange(-(2 ** (grid.bits - 1)), 2 ** (grid.bits - 1)).to(torch.int8)
    if grid.kind is Kind.FLOAT:
        assert not codes.view(torch.float8_e4m3fn).float().isfinite().all()
        with pytest.raises(ValueError, match="NaN"):
            pack(QuantizedTensor(codes.view(torch.float8_e4m3fn)[None], torch.ones(1).bfloat16(), None, grid))
        codes = codes[codes.view(torch.float8_e4m3fn).float().isfinite()]
    for column in range(16):
        spread = torch.zeros(len(codes), 16, dtype=torch.int8)
        spread[:, column] = codes
        stored = spread.view(torch.float8_e4m3fn) if grid.kind is Kind.FLOAT else spread
        q = QuantizedTensor(stored, torch.ones(grid.scale_shape(*stored.shape)).bfloat16(), None, grid)
        y = matmul(torch.eye(16).repeat(tokens // 16, 1), one(q))
        assert torch.equal(y, q.dequantize().T.repeat(tokens // 16, 1))


@built
def test_x_may_be_strided_and_of_any_rank() -> None:
    q = exact_weight(GRIDS["W4A16"], 24, 256)
    x = torch.randint(-8, 9, (256, 2, 5)).float().permute(1, 2, 0)
    assert not x.is_contiguous()
    for given in (x, x.bfloat16(), x[0, 0], x[:, ::2, :]):
        assert torch.equal(matmul(given, one(q)), reference.linear(given.float(), q, None))


@built
def test_float32_x_is_rounded_to_bf16() -> None:
    packed, x = one(random_weight(GRIDS["FP8"], 24, 128)), torch.randn(3, 128)
    assert torch.equal(matmul(x, packed), matmul(x.bfloat16(), packed))


@built
def test_threads_do_not_change_the_result() -> None:
    packed, x = one(random_weight(GRIDS["W4A16_ASYM"], 264, 512)), torch.randn(70, 512).bfloat16()
    single = matmul(x, packed)
    try:
        torch.set_num_threads(3)
        assert torch.equal(matmul(x, packed), single)
    finally:
        torch.set_num_threads(1)


# Every way in which an input is rounded: as its scheme says, and INT8 by groups for the INT4 weights of W4A8.
ROUNDED = {name: (scheme.weight, scheme.activation) for name, scheme in PRESETS.items() if scheme.activation} | {
    f"{name} A8": (grid, rounding_of_w4a8(Scheme(name, grid)))
    for name, grid in GRIDS.items()
    if grid.bits == 4 and grid.kind is Kind.INT
}


def rounded_weight(name: str, rows: int, inputs: int, exact: bool = False) -> tuple[QuantizedTensor, Activation]:
    grid, activation = ROUNDED[name]
    assert activation
    q = (exact_weight if exact else random_weight)(grid, rows, inputs)
    scale = None if activation.dynamic else (torch.rand(1) * 0.01 + 0.01).bfloat16()
    return QuantizedTensor(q.codes, q.scale, q.zero, grid, scale), activation


def rounded_shapes(name: str) -> list[tuple[int, int]]:
    """A dynamic group of inputs must be whole."""
    grid, activation = ROUNDED[name]
    assert activation
    return [(rows, inputs) for rows, inputs in shapes(grid) if inputs % (activation.group_size or 1) == 0]


@built
@pytest.mark.parametrize("name", ROUNDED)
def test_input_is_rounded_as_the_reference_rounds_it(name: str) -> None:
    """Against the exact product of the reference's codes and scales: a code that differs by one step would show."""
    for rows, inputs in rounded_shapes(name):
        q, activation = rounded_weight(name, rows, inputs)
        packed = one(q, activation)
        for tokens in (1, 3, 19, 70):
            x = torch.randn(tokens, inputs) * torch.logspace(-4, 4, inputs)
            x[0, : inputs // 2] = 0
            y = matmul(x, packed, poisoned(tokens, rows))
            codes = reference.round_activation(x, activation, q.input_scale).double()
            wanted = codes @ q.dequantize().double().T
            magnitude = codes.abs() @ q.dequantize().double().abs().T
            assert ((y - wanted).abs() <= magnitude * 2**-21).all(), (rows, inputs, tokens)  # sums in float32


@built
@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "W4A16 A8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(name: str, bad: float) -> None:
    q, activation = rounded_weight(name, 24, 256)
    x = torch.randn(3, 256)
    x[1, 200] = bad
    finite = matmul(x, one(q, activation)).isfinite().all(1)
    assert finite.tolist() == [True, False, True]


def by_definition(
    x: Tensor, ids: Tensor, weights: Tensor, parts: list[list[QuantizedTensor]], how: Activation | None
) -> Tensor:
    """The sum over a token's experts, in float32."""
    out = torch.zeros_like(x)
    for t, chosen in enumerate(ids.tolist()):
        for slot, e in enumerate(chosen):
            gate, up, down = parts[e]
            act = F.silu(reference.linear(x[t], gate, how)) * reference.linear(x[t], up, how)
            out[t] += weights[t, slot] * reference.linear(act, down, how)
    return out


@built
@pytest.mark.parametrize("name", [*PRESETS, "W4A16 A8", "W4A16_ASYM A8"])
@pytest.mark.parametrize("tokens, top_k, count", [(0, 2, 2), (1, 1, 3), (5, 2, 4), (60, 1, 2), (70, 3, 6), (300, 1, 2)])
def test_layer_of_experts(name: str, tokens: int, top_k: int, count: int) -> None:
    hidden, inner = 128, 256 if name == "FP8_BLOCK" or "W4" in name else 72  # 72 rows do not fill a block of 16
    grid, how = ROUNDED.get(name, (GRIDS.get(name, GRIDS["W4A16"]), None))

    def weight(rows: int, inputs: int) -> QuantizedTensor:
        if name == "W8A16":
            return random_weight(Grid(Kind.INT, 8, Strategy.GROUP, group_size=8), rows, inputs)
        q = random_weight(grid, rows, inputs)
        scale = (q.scale.float() * 0.003).to(q.scale.dtype)
        fixed = None if how is None or how.dynamic else (torch.rand(1) * 0.01 + 0.01).bfloat16()
        return QuantizedTensor(q.codes, scale, q.zero, grid, fixed)

    parts = [[weight(inner, hidden), weight(inner, hidden), weight(hidden, inner)] for _ in range(count)]
    for gate, up, _ in parts:  # they read one input
        object.__setattr__(up, "input_scale", gate.input_scale)
    packed = [[pack(q, how) for q in part] for part in parts]
    gate_up, down = gather([stack(gate, up) for gate, up, _ in packed]), gather([down for _, _, down in packed])
    x, ids = torch.randn(tokens, hidden), torch.randint(0, count - 1, (tokens, top_k))  # the last expert is idle
    weights = torch.rand(tokens, top_k)
    y = experts(x, ids, weights, gate_up, down, poisoned(tokens, hidden))
    wanted = by_definition(x, ids, weights, parts, how)
    # bfloat16 keeps 2^-9 of the inputs that are not rounded; where the last bit of an activation tips a code, a step of FP8
    # (2^-4) or INT8 (2^-7) is added in one of `inner` places.
    allowed = 0.01 if how is None else 0.02
    assert not tokens or (y - wanted).norm() <= allowed * wanted.norm()


@built
def test_silu_at_its_ends() -> None:
    """Through identity weights: gate from -200 to 200, up 1."""
    grid = GRIDS["FP8"]
    eye = QuantizedTensor(torch.eye(16).to(torch.float8_e4m3fn), torch.ones(1).bfloat16(), None, grid)
    x = torch.tensor([[-200.0, -90, -88, -87, -20, -1, -1e-3, 0, 1e-3, 1, 20, 87, 88, 90, 200, -3]])
    y = experts(
        x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), gather([stack(pack(eye), pack(eye))]), gather([pack(eye)])
    )
    rounded = x.bfloat16().float()
    torch.testing.assert_close(y, (F.silu(rounded) * rounded).bfloat16().float(), rtol=2**-7, atol=1e-30)


def _packed(name: str = "W4A16", rows: int = 8, inputs: int = 128) -> Packed:
    return one(random_weight(GRIDS[name], rows, inputs))


def test_what_does_not_fit_is_refused() -> None:
    packed, x = _packed(), torch.zeros(4, 128)
    for bad in (torch.zeros(4, 64), torch.zeros(4, 0), torch.tensor(1.0), x.double(), x.half()):
        with pytest.raises(ValueError, match="x is"):
            matmul(bad, packed)
    for out in (torch.zeros(4, 9), torch.zeros(4, 8).double(), torch.zeros(8, 4).T):
        with pytest.raises(ValueError, match="out is"):
            matmul(x, packed, out)
    for other in (_packed("FP8"), _packed(rows=16), _packed("W4A16_ASYM")):
        with pytest.raises(ValueError, match="experts"):
            gather([*packed.parts, *other.parts])
    with pytest.raises(ValueError, match="experts"):
        gather([])
    with pytest.raises(ValueError, match="experts"):  # scales of two dtypes
        gather([replace(packed.parts[0], scale=packed.parts[0].scale.float()), *packed.parts])


@built
def test_experts_that_do_not_fit_are_refused() -> None:
    square = _packed(rows=128)
    gate_up, down = gather([stack(square.parts[0], square.parts[0])] * 2), gather([square.parts[0]] * 2)
    x, ids, weights = torch.zeros(4, 128), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    for bad in (ids - 1, ids + 2):
        with pytest.raises(ValueError, match="there are 2 experts"):
            experts(x, bad, weights, gate_up, down)
    for bad in (ids.int(), ids[:3], ids.flatten()):
        with pytest.raises(ValueError, match="ids are"):
            experts(x, bad, weights, gate_up, down)
    for bad in (weights.double(), torch.ones(4, 2)):
        with pytest.raises(ValueError, match="router weights are"):
            experts(x, ids, bad, gate_up, down)
    for bad in (x[:, :64], x.double(), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="x is"):
            experts(bad, ids, weights, gate_up, down)
    with pytest.raises(ValueError, match="ids are .* for x"):
        experts(x[None], ids, weights, gate_up, down)
    with pytest.raises(ValueError, match="does not go with"):
        experts(x, ids, weights, gather([square.parts[0]] * 2), down)


def test_weights_without_a_kernel_are_refused() -> None:
    assert "3-bit" in (unfit(Grid(Kind.INT, 3, Strategy.CHANNEL), None) or "")
    with pytest.raises(ValueError, match="groups of 12"):
        pack(random_weight(Grid(Kind.INT, 4, Strategy.GROUP, group_size=12), 8, 24))
    with pytest.raises(ValueError, match="empty"):
        pack(random_weight(INT4_CHANNEL, 0, 16))


def test_reason_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantkit.kernels.cpu.linear.load", lambda: "no compiler: 'g++' is not on PATH")
    with pytest.raises(RuntimeError, match="no compiler"):
        matmul(torch.zeros(1, 128), _packed())
