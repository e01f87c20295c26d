"""Every kernel compiled for the GPUs it is meant for, none of which need be present: no spills, tensor cores in use."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.kernels.cuda import build
from quantkit.kernels.triton import compile as compiler
from quantkit.kernels.triton import lang, tiles

SHARED = 227 * 1024  # bytes a block may have on Hopper


@pytest.fixture(scope="module")
def no_interpreter() -> None:
    if not lang.available():
        pytest.skip("Triton is not installed")
    if lang.simulated():
        pytest.skip("TRITON_INTERPRET is set")


ON_HOPPER = ["int4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "row8", "block8", "others"))]


@pytest.mark.parametrize("kind", ON_HOPPER)
def test_triton_kernels_on_hopper(no_interpreter: None, kind: str) -> None:
    mine = [c for c in compiler.cases() if (c.name.split()[0] if c.name.split()[0] in tiles.TABLE else "others") == kind]
    assert len(mine) >= 6
    for case in mine:
        usage = compiler.compile_case(case)
        spills = case.name.startswith("int4") and case.name.endswith("128x256")  # on an H100 still 1.4 times as fast as any
        assert usage.local == 0 and usage.stack <= 64 * spills, (case.name, usage)
        assert usage.registers <= 255 and usage.shared <= SHARED, (case.name, usage)
        if kind != "others":
            assert usage.wgmma > 0 and usage.async_copies > 0, (case.name, usage)
        assert not usage.volatile, case.name  # a volatile load goes past the caches, for the whole system
        if kind.startswith("int"):  # a synchronous load in the loop is a latency of memory in each step
            assert usage.loop.count("LDGSTS") > 0 and usage.loop.count("LDG") == 0, case.name
            assert usage.loop.count("LDL") <= 8 * spills, case.name


@pytest.mark.parametrize(("kind", "most"), [("int4", 2.6), ("int8", 3.3), ("row8", 1.6), ("block8", 2.2)])
def test_instructions_for_each_weight_at_one_token(no_interpreter: None, kind: str, most: float) -> None:
    """Decoding is bound by bandwidth only if widening keeps up. At 4.8 TB/s each of 132 processors at 1.8 GHz gets 20 bytes
    a cycle and issues 128 lanes of instructions: 3.2 for each 4-bit weight, 6.4 for each 8-bit one."""
    tile = tiles.TABLE[kind][0][1]
    usage = compiler.compile_case(compiler.product(kind, tile, "linear"))
    columns = {"int4": 256, "int8": 128}.get(kind, 128)
    assert usage.loop.length / (tile.bn * columns / (32 * tile.warps)) <= most, usage


def run_ptx(text: str, value: np.ndarray) -> list[np.ndarray]:
    """What a block of shr.b32 and lop3.b32 makes of its one input: the registers it writes but its own, in order."""
    registers: dict[str, np.ndarray] = {}
    for name, result, *operands in re.findall(r"(shr|lop3)\.b32 ([%\w]+), ([%\w]+), ([%\w]+)(?:, ([%\w]+), (\w+))?;", text):
        first = registers.get(operands[0], value)
        if name == "shr":
            registers[result] = first >> np.uint32(int(operands[1], 0))
            continue
        second, third, table = (int(each, 0) for each in operands[1:])
        out = np.zeros_like(first)
        for row in range(8):  # lop3's table has a bit for each combination of a's, b's and c's bits
            if table >> row & 1:
                sides = zip((first, np.uint32(second), np.uint32(third)), (row >> 2 & 1, row >> 1 & 1, row & 1), strict=True)
                a, b, c = (side if bit else ~side for side, bit in sides)
                out |= a & b & c
        registers[result] = out
    return [each for name, each in registers.items() if name != "t"]


@pytest.mark.parametrize("bits", [4, 8])
def test_inline_assembly_gives_the_codes(no_interpreter: None, bits: int) -> None:
    """The interpreter cannot run it. Here its instructions are run by their definition, on every word of 16 bits."""
    (case,) = (c for c in compiler.cases() if c.name == f"widen int{bits}")
    low = np.arange(2**16, dtype=np.uint32)
    pair = low | (low[::-1] << np.uint32(16))
    shifts = set()
    for text in filter(lambda block: "lop3" in block, compiler.compile_case(case).inline):
        shift = int(re.findall(r"shr\.b32 t, %\w+, (\d+);", text)[0])
        shifts.add(shift)
        written = [out.view(np.uint16).reshape(-1, 2) for out in run_ptx(text, pair)]
        values = [(half.astype(np.uint32) << np.uint32(16)).view(np.float32) for half in written]
        codes = (pair.view(np.uint16).reshape(-1, 2) >> shift & (2**bits - 1)).astype(np.float32)
        wide = values[0] - (136 if bits == 4 else values[1])
        assert np.array_equal(wide, codes - 2 ** (bits - 1))
    assert shifts == set(range(0, 16, bits))


@pytest.mark.parametrize(("capability", "shared"), [(80, 163), (100, 227), (120, 99)])
def test_triton_kernels_elsewhere(no_interpreter: None, capability: int, shared: int) -> None:
    """The smallest and largest tiles on Ampere and Blackwell, with the stages that fit: no spills, within shared memory."""
    codes = "fp8e4nv" if capability >= 89 else "i8"
    for kind in ("int4", "row8"):
        for _, tile in (tiles.TABLE[kind][0], tiles.TABLE[kind][-1]):
            stages = tiles.that_fits(tile, compiler.step_bytes(kind, tile), shared * 1024)
            case = compiler.product(kind, dataclasses.replace(tile, stages=stages), "gate_up", codes=codes)
            usage = compiler.compile_case(case, capability)
            assert usage.local == 0 and usage.shared <= shared * 1024, (case.name, stages, usage)


BESIDE = [pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "sm_100a", "sm_120a")]


@pytest.mark.parametrize("architecture", ["sm_90a", *BESIDE])
def test_cuda_decode(tmp_path: Path, architecture: str) -> None:
    reason, tool = build.missing(), compiler.cuobjdump()
    if reason or not tool:
        pytest.skip(reason or "cuobjdump is not installed")
    if architecture.replace("sm", "compute") not in build.architectures():
        pytest.skip(f"this nvcc does not know {architecture}")
    file = build.cubin(tmp_path, architecture)
    functions, loops = compiler.resources(file), compiler.loops(file)
    assert len(functions) == 8
    for name, usage in functions.items():
        assert usage["local"] == usage["stack"] == 0, (name, usage)
        assert usage["registers"] <= 255 and usage["shared"] <= 48 * 1024, (name, usage)
        # A step of 64 rows by 128 columns; as above, there are 3.2 instructions for each weight on an H200.
        assert loops[name].length / 256 <= (3.2 if "ELb1EE" in name or "ILi2" in name else 2.6), (name, loops[name].length)
        assert loops[name].count("LDG") == loops[name].count("LDL") == 0 < loops[name].count("LDGSTS"), name
    sass = subprocess.run([tool, "-sass", str(file)], check=True, capture_output=True, text=True).stdout
    assert len(re.findall(r"HMMA\.16816\.F32\.BF16", sass)) >= 8 * 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of all architectures takes a quarter of a minute, so that one is enough."""
    if build.missing():
        pytest.skip(build.missing() or "")
    return tmp_path_factory.mktemp("cache")


def test_build_is_kept_and_loads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path = build.build()
    stamp = path.stat().st_mtime_ns
    assert build.build() == path and path.stat().st_mtime_ns == stamp
    assert [p.name for p in (cache / "quantkit").iterdir()] == [path.parent.name]
    library = build.load()
    with pytest.raises(RuntimeError, match=r"CUDA error \d+"):
        library.run(*[None] * 9, 1, 7, 1, 1, 1, 8, 256, 128, 0, 0, None)


def test_a_library_that_no_driver_runs_is_a_reason(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    build.library.cache_clear()
    assert re.search(r"does not run here: .*CUDA error \d+", str(build.library()))
    build.library.cache_clear()


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.missing():
        pytest.skip(build.missing() or "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="failed with code"):
        build.build(["-no-such-flag"])
    assert list((tmp_path / "quantkit").iterdir()) == []


def test_a_compiler_that_fails_is_a_reason_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "nvcc"
    fake.write_text("#!/bin/sh\necho unsupported host compiler >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(build, "compiler", lambda: str(fake))
    build.library.cache_clear()
    assert "unsupported host compiler" in str(build.library())
    build.library.cache_clear()


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match="install the CUDA toolkit"):
        build.build()
