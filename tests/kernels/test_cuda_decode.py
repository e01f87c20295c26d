"""The CUDA decode kernel run on the CPU: its source, with a host header in place of CUDA's, against the reference."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from itertools import pairwise

import pytest
import torch

from quantkit.kernels.cuda import decode
from quantkit.kernels.cuda.build import SOURCE, Library
from quantkit.kernels.triton.layout import PackedInt, pack
from quantkit.scheme import PRESETS, Grid, Kind, Scheme, Strategy, scheme_named
from tests.helpers.kernels import close, layer, poison, product, random_expert, random_weight, stacked
from tests.helpers.paths import ROOT

HEADER = ROOT / "tests" / "helpers" / "cuda_on_host.h"
WIDE = {"wide": 512, "odd": 384}  # groups that are whole spans of 256 columns, and that are not
SCHEMES = {
    **PRESETS,
    **{name: Scheme(name, Grid(Kind.INT, 4, Strategy.GROUP, False, size)) for name, size in WIDE.items()},
    "channel": Scheme("channel", Grid(Kind.INT, 4, Strategy.CHANNEL)),
}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    text = re.sub(r"#include <cuda.*>", "", SOURCE.read_text())
    text, launches = re.subn(r"kernel<<<grid, .*?>>>\(a\)", "launch(grid, [=] { kernel(a); })", text)
    assert launches == 1, "the source changed shape: this test's substitution no longer fits"
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
        ("W4A16_ASYM", 3, 66, 2304),  # warps go round their rings more than once, not all as often
        ("wide", 9, 24, 1024),
        ("odd", 2, 24, 768),
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
    ("name", "tokens", "top_k", "experts"),
    [("W4A16", 1, 1, 3), ("W4A16_ASYM", 1, 2, 4), ("W4A16_ASYM", 3, 2, 4), ("channel", 20, 1, 3)],
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


def flying(library: Library, tokens: int, shared: int) -> int:
    """Bytes that a block has under way while it multiplies, with so much shared memory."""
    packed = pack(random_weight(64, 4096, PRESETS["W4A16"]), PRESETS["W4A16"])
    assert isinstance(packed, PackedInt)
    library.functions.host_begin(shared)
    try:
        decode.linear(torch.randn(tokens, 4096).bfloat16(), packed, library)
        return int(library.functions.host_flying())
    finally:
        library.functions.host_begin(227 * 1024)


@pytest.mark.parametrize("tokens", [8, 16])
def test_the_next_steps_are_under_way_while_one_is_multiplied(library: Library, tokens: int) -> None:
    """An H200 reads 36 KB a processor in the microsecond that a load takes at most: two steps of words are more."""
    step = 8 * (4096 + 256)  # of 8 warps: 64 rows of 64 bytes, 64 pairs of scales
    of_x = 8 * 32 * 4 * 16 * (tokens // 8)
    assert flying(library, tokens, 227 * 1024) == 2 * (step + of_x)
    assert flying(library, tokens, 163 * 1024) == (2 if tokens == 8 else 1) * (step + of_x)  # of an A100
    with pytest.raises(RuntimeError, match="CUDA error 9"):
        flying(library, 16, 99 * 1024)


def test_an_experts_second_block_reads_its_weight_right_after_the_first(library: Library) -> None:
    """Blocks run in order: neighbours share the cache. 40 of 41 tokens go to one expert, three blocks of 16."""
    parts = [random_expert(256, 128, PRESETS["W4A16"]) for _ in range(2)]
    gate_up, down = stacked(parts, PRESETS["W4A16"])
    assert isinstance(gate_up, PackedInt) and isinstance(down, PackedInt)
    ids = torch.tensor([[0]] * 40 + [[1]])
    library.functions.host_read.restype = ctypes.c_void_p
    library.functions.host_begin(227 * 1024)
    decode.moe(torch.randn(41, 128).bfloat16(), gate_up, down, ids, torch.ones(41, 1), library)
    read = [library.functions.host_read(block) for block in range(library.functions.host_blocks())]
    assert len(read) == 4 * (256 // 32) + 4 * (128 // 64)  # a launch of gate and up, and one of down
    places = [[i for i, a in enumerate(read) if a == address] for address in set(read)]
    again = [after - before for each in places for before, after in pairwise(each)]
    assert len(again) == 2 * (256 // 32 + 128 // 64) and set(again) == {1}


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
        library.run(*[None] * 9, 1, 7, 1, 1, 1, 8, 256, 128, 0, 0, None)
