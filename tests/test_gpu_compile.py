"""Every kernel compiled for the GPUs it is meant for, none of which need be present: no spills, tensor cores in use."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from quantkit.kernels.cuda import build
from quantkit.kernels.triton import compile as compiler
from quantkit.kernels.triton import lang

SHARED = 227 * 1024  # bytes a block may have on Hopper


def test_triton_kernels_on_hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not lang.available():
        pytest.skip("Triton is not installed")
    if lang.simulated():
        pytest.skip("TRITON_INTERPRET is set")
    for case in compiler.cases():
        usage = compiler.compile_case(case)
        assert usage.local == usage.stack == 0, (case.name, usage)
        assert usage.registers <= 255 and usage.shared <= SHARED, (case.name, usage)
        if not case.name.startswith("quantise"):
            assert usage.wgmma > 0 and usage.async_copies > 0, (case.name, usage)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_cuda_decode(tmp_path: Path, architecture: str) -> None:
    reason, tool = build.missing(), compiler.cuobjdump()
    if reason or not tool:
        pytest.skip(reason or "cuobjdump is not installed")
    file = build.cubin(tmp_path, architecture)
    functions = compiler.resources(file)
    assert len(functions) == 4
    for name, usage in functions.items():
        assert usage["local"] == usage["stack"] == 0, (name, usage)
        assert usage["registers"] <= 168 and usage["shared"] <= 48 * 1024, (name, usage)
    sass = subprocess.run([tool, "-sass", str(file)], check=True, capture_output=True, text=True).stdout
    assert len(re.findall(r"HMMA\.16816\.F32\.BF16", sass)) >= 4 * 8


def test_build_is_kept_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.missing():
        pytest.skip(build.missing() or "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build.build()
    stamp = path.stat().st_mtime_ns
    assert build.build() == path and path.stat().st_mtime_ns == stamp
    assert [p.name for p in (tmp_path / "quantkit").iterdir()] == [path.parent.name]
    library = build.load()
    with pytest.raises(RuntimeError, match=r"CUDA error \d+"):
        library.run(*[None] * 8, 1, 7, 1, 1, 1, 8, 128, 64, 0, None)


def test_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if build.missing():
        pytest.skip(build.missing() or "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(RuntimeError, match="failed with code"):
        build.build(["-no-such-flag"])
    assert list((tmp_path / "quantkit").iterdir()) == []


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    with pytest.raises(RuntimeError, match="install the CUDA toolkit"):
        build.build()
