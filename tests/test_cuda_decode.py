"""The CUDA decode kernel run on the CPU: its source, with a host header in place of CUDA's, against the reference."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from quantkit.kernels import reference
from quantkit.kernels.cuda import decode
from quantkit.kernels.cuda.build import SOURCE, Library
from quantkit.kernels.triton.layout import pack4, stack4
from tests.kernel_helpers import poison, weight4

HEADER = Path(__file__).with_name("cuda_on_host.h")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = re.sub(r"#include <cuda.*>", "", SOURCE.read_text())
    text, assembly = re.subn(r"asm volatile\(.*?\);", "host_mma(c, a, b0, b1);", text, flags=re.S)
    text, launches = re.subn(r"(decode<\d, \d>)<<<grid, .*?>>>\(a\)", r"launch(grid, [=] { \1(a); })", text)
    assert (assembly, launches) == (1, 4), "the source changed shape: this test's substitutions no longer fit"
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
    ("tokens", "rows", "columns", "group", "symmetric"),
    [
        (1, 16, 128, 128, True),
        (5, 24, 192, 64, False),
        (16, 9, 72, None, False),
        (19, 40, 1280, 128, True),
        (0, 8, 64, 64, True),
    ],
)
def test_linear(library: Library, tokens: int, rows: int, columns: int, group: int | None, symmetric: bool) -> None:
    w, x = weight4(rows, columns, group, symmetric), torch.randn(tokens, columns).bfloat16()
    exact = x.float() @ w.dequantize().T
    torch.testing.assert_close(decode.linear(x, pack4(w), library).float(), exact, rtol=2**-8, atol=1e-4)
    assert reference.linear(x, w, None).shape == (tokens, rows)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 3), (3, 2, 4), (20, 1, 2)])
def test_moe(library: Library, tokens: int, top_k: int, experts: int) -> None:
    hidden, inner = 64, 72  # the last expert never gets a token
    ups = [weight4(2 * inner, hidden, 64, False) for _ in range(experts)]
    downs = [weight4(hidden, inner, None, True) for _ in range(experts)]
    x, router = torch.randn(tokens, hidden).bfloat16(), torch.rand(tokens, top_k)
    ids = torch.randint(0, experts - 1, (tokens, top_k))
    out = decode.moe(x, stack4([pack4(w) for w in ups]), stack4([pack4(w) for w in downs]), ids, router, library)
    for t in range(tokens):
        exact = torch.zeros(hidden)
        for e, r in zip(ids[t].tolist(), router[t], strict=True):
            gate, up = (ups[e].dequantize() @ x[t].float()).split(inner)
            exact += r * (downs[e].dequantize() @ (F.silu(gate) * up).bfloat16().float())
        torch.testing.assert_close(out[t].float(), exact, rtol=2**-6, atol=0.02 * float(exact.abs().max()))


def test_refusals(library: Library) -> None:
    w = pack4(weight4(16, 96, 32, True))
    with pytest.raises(ValueError, match="multiple of 64"):
        decode.linear(torch.zeros(1, 96, dtype=torch.bfloat16), w, library)
    with pytest.raises(ValueError, match="features"):
        decode.linear(torch.zeros(1, 64, dtype=torch.bfloat16), w, library)
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        library.run(*[None] * 8, 1, 7, 1, 1, 1, 8, 128, 64, 0, None)
