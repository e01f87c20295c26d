"""Rounding and comparing in pieces of rows, in torch and in C++: the same to the last bit as the whole at once."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quantkit import rowwise
from quantkit.checkpoint import bounds
from quantkit.checkpoint.finite import first_not_finite
from quantkit.checkpoint.shard import read_header
from quantkit.checkpoint.writer import ShardPlan, ShardWriter
from quantkit.dtypes import TensorPlan
from quantkit.host import every, using_threads
from quantkit.kernels.cpu import build
from quantkit.qtensor import QuantizedTensor
from quantkit.quant.rounding import Rounding, by_rows, rtn
from quantkit.scheme import PRESETS, Scheme, fp8_block, weight_only
from quantkit.stats import WeightError, weight_error

SCHEMES = {
    **{name: scheme for name, scheme in PRESETS.items() if by_rows(scheme)},
    "INT4 by channel": weight_only(4, True, None),
    "INT8 with zero points": weight_only(8, False, 64),
    "FP8 in blocks of 32 x 64": fp8_block(32, 64),
}
SHAPES = ((1, 128), (7, 384), (130, 640), (33, 128 * 131))
compiled = pytest.mark.skipif(isinstance(build.rowwise(), str), reason=f"no C++ here: {build.rowwise()}")


def weights(shape: tuple[int, int]) -> list[Tensor]:
    """Usual ones, BF16 ones, ones with rows and columns of nothing, ones whose scales are at the least that there is."""
    usual = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.02
    holes = usual.clone()
    holes[:, ::3], holes[0] = 0, 0
    tiny = usual * 1e-6
    tiny[:1] *= 1e-35
    return [usual, usual.bfloat16().float(), holes, tiny]


def same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    zeros = a.zero is b.zero if a.zero is None or b.zero is None else torch.equal(a.zero, b.zero)
    return torch.equal(a.codes.view(torch.int8), b.codes.view(torch.int8)) and torch.equal(a.scale, b.scale) and zeros


@compiled
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_rounding_is_the_definition(name: str, shape: tuple[int, int]) -> None:
    scheme = SCHEMES[name]
    for weight in weights(shape):
        done = rowwise.round_rows(weight, scheme.weight)
        assert done is not None
        q, lost, whole = done
        expected, sums = rtn(weight, scheme), WeightError()
        sums.add_sums(lost.tolist(), whole.tolist())
        assert same(q, expected) and sums.value == weight_error(weight, expected.dequantize())


@compiled
@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_comparing_is_the_definition(name: str, shape: tuple[int, int]) -> None:
    scheme = SCHEMES[name]
    for weight in weights(shape):
        q = rtn(weight, scheme)
        q.codes.view(torch.int8)[-1, 5] ^= 1  # one that is no nearest code
        seen, value, sums = rowwise.compare_rows(weight, q, bounds.TIE, True), q.dequantize(), WeightError()
        wrong = bounds.misplaced_codes(weight, q, value).flatten().nonzero()
        assert seen is not None and seen.misplaced == (len(wrong), int(wrong[0]) if len(wrong) else 0)
        span = bounds.range_of(weight, scheme.weight)
        assert torch.equal(seen.smallest.flatten(), span[0].flatten())
        assert torch.equal(seen.largest.flatten(), span[1].flatten())
        sums.add_sums(seen.lost.tolist(), seen.whole.tolist())
        assert sums.value == weight_error(weight, value)
        assert (unasked := rowwise.compare_rows(weight, q, bounds.TIE, False)) is not None and unasked.misplaced == (0, 0)


@compiled
def test_what_is_not_written_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output is written as a whole: they begin as NaN or as codes that no grid has."""
    empty = torch.empty

    def poisoned(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        made = empty(*size, dtype=dtype)
        return made.fill_(math.nan) if dtype.is_floating_point else made.view(torch.int8).fill_(0x55).view(dtype)

    monkeypatch.setattr(torch, "empty", poisoned)
    for scheme in SCHEMES.values():
        weight = weights((37, 640))[0]
        done = rowwise.round_rows(weight, scheme.weight)
        assert done is not None and same(done[0], rtn(weight, scheme))
        seen = rowwise.compare_rows(weight, done[0], bounds.TIE, True)
        assert seen is not None and seen.misplaced == (0, 0)
        assert all(part.isfinite().all() for part in (*done[1:], seen.smallest, seen.largest, seen.lost, seen.whole))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("how", ["compiled", "torch"])
def test_pieces_are_the_whole(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "torch":
        monkeypatch.setattr(build, "rowwise", lambda: "not here")
    scheme = SCHEMES[name]
    weight = torch.randn(3 * 128 + 40, 640, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounding = Rounding(scheme, 640)
    at_once = 128 if scheme.weight.block else 8
    parts = [rounding.rows(part) for part in weight.split(at_once)]
    whole = rtn(weight.float(), scheme)
    zeros = None if whole.zero is None else torch.cat([part.zero for part in parts if part.zero is not None])
    joined = (torch.cat([part.codes.view(torch.int8) for part in parts]), torch.cat([part.scale for part in parts]))
    assert same(dataclasses.replace(whole, codes=joined[0].view(whole.codes.dtype), scale=joined[1], zero=zeros), whole)
    assert rounding.error == weight_error(weight.float(), whole.dequantize())
    start = 0
    for part in parts:
        assert same(whole.rows(start, start + len(part.codes)), part)
        start += len(part.codes)


def test_one_scale_for_all_is_not_rounded_by_rows() -> None:
    with pytest.raises(ValueError, match="one scale"):
        Rounding(PRESETS["FP8"], 128)
    assert rowwise.round_rows(torch.randn(8, 128), PRESETS["FP8"].weight) is None
    assert rowwise.round_rows(torch.randn(0, 128), PRESETS["W8A8"].weight) is None
    assert rowwise.round_rows(torch.randn(128, 8).T, PRESETS["W8A8"].weight) is None  # not as it lies in memory


@pytest.mark.parametrize("scheme", [PRESETS["W4A16"], PRESETS["FP8_DYNAMIC"]], ids=lambda scheme: scheme.name)
def test_pieces_are_small(scheme: Scheme) -> None:
    """In float32 a piece of the widest weight stays below a few megabytes."""
    for columns in (128, 4096, 18304, 1_000_064):
        rows = Rounding(scheme, columns).at_once
        assert rows % 8 == 0 and (rows == 8 or rows * columns <= 1 << 18)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn])
def test_what_is_not_finite_is_found(dtype: torch.dtype) -> None:
    values = torch.full((3, 5), -1.5).to(dtype)
    values[0, 1] = torch.finfo(dtype).max
    assert first_not_finite(values) is None and first_not_finite(values[:0]) is None
    for bad in (math.nan, -math.nan, *(() if dtype is torch.float8_e4m3fn else (math.inf, -math.inf))):
        wrong = values.clone()
        wrong[1, 2] = wrong[2, 4] = bad
        assert first_not_finite(wrong) == (2, 7)
    assert first_not_finite(torch.tensor(math.nan)) == (1, 0) and first_not_finite(torch.tensor([2**31 - 1])) is None


def test_rows_are_appended_in_order_and_as_planned(tmp_path: Path) -> None:
    plan = ShardPlan("one.safetensors", [TensorPlan("a", "F32", (5, 3)), TensorPlan("b", "I8", (4,))])
    a, b = torch.arange(15.0).view(5, 3), torch.arange(4, dtype=torch.int8)
    with ShardWriter(tmp_path, plan) as writer:
        writer.append("a", a[:2])
        writer.write("b", b)
        writer.append("a", a[2:])
    header = read_header(tmp_path / plan.file)
    data = (tmp_path / plan.file).read_bytes()
    assert data[header.tensors["a"].start :][:60] == a.numpy().tobytes()
    for rows in (a[:, :2], a.half(), torch.cat([a, a])):
        with pytest.raises(ValueError, match="planned F32"), ShardWriter(tmp_path, plan) as writer:
            writer.append("a", rows)
    with pytest.raises(ValueError, match="misses 1 tensor"), ShardWriter(tmp_path, plan) as writer:
        writer.write("b", b)
        writer.append("a", a[:4])  # the last row is missing


@pytest.mark.parametrize(("most", "expected"), [(None, 3), (2, 2), (1, 1)])
def test_only_so_many_are_on_their_way_at_once(most: int | None, expected: int) -> None:
    """What holds a whole linear must not be multiplied by the processors of a machine."""
    running, largest, lock = [0], [0], threading.Lock()

    def work(item: int) -> int:
        with lock:
            running[0] += 1
            largest[0] = max(largest[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
        return item

    with using_threads(3):
        assert every(work, range(12), most) == [*range(12)]
    assert largest[0] == expected
