"""The CUDA decode kernel run on the CPU: its source, with a host header in place of CUDA's, against the reference."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from quantkit.kernels.cuda import decode
from quantkit.kernels.cuda.build import SOURCE, Library
from quantkit.kernels.triton.layout import PackedInt, pack
from quantkit.scheme import PRESETS, Grid, Kind, Scheme, Strategy, scheme_named
from tests.kernel_helpers import close, layer, poison, product, random_expert, random_weight, stacked

HEADER = Path(__file__).with_name("cuda_on_host.h")
SCHEMES = {**PRESETS, "channel": Scheme("channel", Grid(Kind.INT, 4, Strategy.CHANNEL))}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = re.sub(r"#include <cuda.*>", "", SOURCE.read_text())
    text, assembly = re.subn(r"asm volatile\(.*?\);", "host_mma(c, a, b0, b1);", text, flags=re.S)
    text, launches = re.subn(r"kernel<<<grid, .*?>>>\(a\)", "launch(grid, [=] { kernel(a); })", text)
    assert (assembly, launches) == (1, 1), "the source changed shape: this test's substitutions no longer fit"
    folder = tmp_path_factory.mktemp("host")
    (folder / "decode.cpp").write_text(f'#include "{HEADER}"\n{text}')
    command = [compiler, "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-o", "decode.so", "decode.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Library(ctypes.CDLL(str(folder / "decode.so")), "cpu")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@pytest.mark.parametrize(
    ("name", "tokens", "rows", "columns"),
    [
        ("W4A16", 1, 16, 128),
        ("W4A16_ASYM", 5, 24, 384),
        ("channel", 16, 9, 72),
        ("channel", 3, 70, 200),
        ("W4A16", 19, 40, 1280),
        ("W4A16", 0, 8, 128),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear(library: Library, name: str, tokens: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    scheme = SCHEMES[name]
    w, x = random_weight(rows, columns, scheme), torch.randn(tokens, columns, dtype=dtype)
    packed = pack(w, scheme)
    assert isinstance(packed, PackedInt)
    out = decode.linear(x, packed, library)
    assert out.dtype is dtype
    close(out, product(x, w, scheme, False), product(x, w, scheme, True))


@pytest.mark.parametrize(
    ("name", "tokens", "top_k", "experts"), [("W4A16", 1, 1, 3), ("W4A16_ASYM", 3, 2, 4), ("channel", 20, 1, 3)]
)
def test_moe(library: Library, name: str, tokens: int, top_k: int, experts: int) -> None:
    scheme = SCHEMES[name]
    hidden, inner = (128, 256) if name != "channel" else (64, 72)
    parts = [random_expert(inner, hidden, scheme) for _ in range(experts)]
    x, router = torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens, top_k)
    ids = torch.rand(tokens, experts - 1).topk(top_k).indices  # the last expert never gets a token
    gate_up, down = stacked(parts, scheme)
    assert isinstance(gate_up, PackedInt) and isinstance(down, PackedInt)
    exact, same = (layer(x, parts.__getitem__, ids, router, scheme, exact) for exact in (True, False))
    close(decode.moe(x, gate_up, down, ids, router, library), same, exact)


def test_refusals(library: Library) -> None:
    scheme = scheme_named("W4A16", 32)
    assert scheme and "multiple of 128, not 32" in (decode.misfit(scheme.weight) or "")
    assert "4-bit" in (decode.misfit(PRESETS["W8A16"].weight) or "") and decode.misfit(PRESETS["W4A16"].weight) is None
    packed = pack(random_weight(16, 96, scheme), scheme)
    assert isinstance(packed, PackedInt)
    with pytest.raises(ValueError, match="groups of 32"):
        decode.linear(torch.zeros(1, 96, dtype=torch.bfloat16), packed, library)
    with pytest.raises(ValueError, match="features"):
        decode.linear(torch.zeros(1, 64, dtype=torch.bfloat16), packed, library)
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        library.run(*[None] * 8, 1, 7, 1, 1, 1, 8, 256, 128, 0, 0, None)
