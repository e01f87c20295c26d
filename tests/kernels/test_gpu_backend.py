"""The GPU backend without a GPU: what it takes, what a device lacks and how that reads, and what explain() says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch

from quantkit.kernels import dispatch
from quantkit.kernels.backend import Backend
from quantkit.kernels.cuda import build
from quantkit.kernels.cuda.build import Library
from quantkit.kernels.triton import tiles
from quantkit.kernels.triton.backend import BACKEND, lacks
from quantkit.kernels.triton.layout import pack
from quantkit.kernels.triton.tiles import Tile
from quantkit.scheme import PRESETS, Activation, Grid, Kind, Scheme, Strategy, scheme_named
from tests.gpu.__main__ import FILES
from tests.helpers.kernels import ON_GPU, random_weight
from tests.helpers.paths import ROOT

CUDA = torch.device("cuda:0")
FP8 = [name for name, scheme in PRESETS.items() if scheme.activation and scheme.activation.kind is Kind.FLOAT]
TOKEN = Activation(Kind.INT, Strategy.TOKEN, dynamic=True)
GROUPS = Activation(Kind.INT, Strategy.GROUP, dynamic=True, group_size=128)
STRANGE = [
    PRESETS["W4AFP8"],
    Scheme("FP8 weights alone", Grid(Kind.FLOAT, 8, Strategy.CHANNEL)),
    Scheme("W4A8", Grid(Kind.INT, 4, Strategy.CHANNEL), TOKEN),
    Scheme("W8A8 in groups", Grid(Kind.INT, 8, Strategy.GROUP, group_size=128), TOKEN),
    Scheme("W8A8 static", Grid(Kind.INT, 8, Strategy.CHANNEL), Activation(Kind.INT, Strategy.TOKEN, dynamic=False)),
    Scheme("W8A8 of two kinds", Grid(Kind.INT, 8, Strategy.CHANNEL), Activation(Kind.FLOAT, Strategy.TOKEN, True)),
    Scheme("W8A16 with zero points", Grid(Kind.INT, 8, Strategy.GROUP, False, 128)),
    Scheme("W4A16 by tensor", Grid(Kind.INT, 4, Strategy.TENSOR)),
    Scheme(
        "INT8 blocks", Grid(Kind.INT, 8, Strategy.BLOCK, block=(128, 128)), Activation(Kind.INT, Strategy.GROUP, True, 128)
    ),
    Scheme("64x64 blocks", Grid(Kind.FLOAT, 8, Strategy.BLOCK, block=(64, 64)), PRESETS["FP8_BLOCK"].activation),
]


@pytest.mark.parametrize("name", ON_GPU)
def test_it_takes_every_preset_at_the_known_models_shapes(name: str) -> None:
    for shape in ((18304, 6400), (6400, 18304), (3072, 4096), (4096, 3072), (6144, 16384), (1536, 5120), (5120, 1536)):
        assert BACKEND.takes(PRESETS[name], shape) is None


@pytest.mark.parametrize("scheme", STRANGE, ids=lambda scheme: scheme.name)
def test_it_refuses_other_schemes(scheme: Scheme) -> None:
    reason = BACKEND.takes(scheme, (64, 256))
    assert reason and dispatch.choose(scheme, (64, 256), CUDA).kernel == dispatch.REFERENCE
    assert reason in dispatch.choose(scheme, (64, 256), CUDA).why


@pytest.mark.parametrize(
    ("name", "group", "columns", "words"),
    [
        ("W4A16", 8, 128, "group size 8 is not a multiple of 16"),
        ("W4A16", 24, 48, "group size 24"),
        ("W8A16", 40, 80, "group size 40"),
        ("W8A8", None, 72, "in_features 72 is not a multiple of 16"),
        ("FP8_DYNAMIC", None, 120, "in_features 120 is not a multiple of 16"),
        ("FP8_BLOCK", None, 192, "in_features 192 is not a multiple of 128"),
    ],
)
def test_it_refuses_odd_sizes_with_a_reason(name: str, group: int | None, columns: int, words: str) -> None:
    scheme = scheme_named(name, group)
    assert scheme and words in (BACKEND.takes(scheme, (64, columns)) or "")
    if scheme.misfit(64, columns) is None:
        with pytest.raises(ValueError, match=words):
            pack(random_weight(64, columns, scheme), scheme)


@pytest.mark.parametrize("name", PRESETS)
def test_a_device_that_is_too_old_is_refused(name: str) -> None:
    scheme = PRESETS[name]
    assert lacks(scheme, CUDA, lambda _: (9, 0)) is None
    assert "compute capability 7.5, and" in (lacks(scheme, CUDA, lambda _: (7, 5)) or "")
    on_ampere = lacks(scheme, CUDA, lambda _: (8, 0))
    assert (
        (on_ampere == "cuda:0 has compute capability 8.0, and FP8 needs 8.9 or later") if name in FP8 else on_ampere is None
    )
    assert "sees no NVIDIA GPU" in (lacks(scheme, CUDA, lambda _: None) or "")
    assert "pip install" in (lacks(scheme, CUDA, lambda _: (9, 0), lambda: False) or "")


def test_the_cpu_is_served_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert lacks(PRESETS["W4A16"], torch.device("cpu")) == "triton runs on an NVIDIA GPU, not on cpu"
    assert "not on xpu" in (lacks(PRESETS["W4A16"], torch.device("xpu")) or "")


def on_hopper() -> tuple[Backend, ...]:
    """The backends as they would be on a machine with an H100."""
    able = dataclasses.replace(BACKEND, lacks=lambda scheme, device: lacks(scheme, device, lambda _: (9, 0)))
    return tuple(able if backend is BACKEND else backend for backend in dispatch.BACKENDS)


def test_explain_says_which_kernel_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "library", lambda: "nvcc is not on PATH")
    monkeypatch.setattr(tiles, "CUDA_UP_TO", 0)
    choice = dispatch.choose(PRESETS["W4A16"], (64, 128), CUDA, on_hopper())
    assert choice.kernel == "triton" and "CUDA" not in choice.why  # where it is nowhere ahead, nothing is said of it
    monkeypatch.setattr(tiles, "CUDA_UP_TO", 16)
    choice = dispatch.choose(PRESETS["W4A16"], (64, 128), CUDA, on_hopper())
    assert choice.kernel == "triton" and "Triton for one token too: nvcc is not on PATH" in choice.why
    assert "avx512" in choice.elsewhere
    monkeypatch.setattr(build, "library", lambda: Library(None))  # type: ignore[arg-type]
    assert "CUDA for up to 16 tokens a weight" in dispatch.choose(PRESETS["W4A16"], (64, 128), CUDA, on_hopper()).why
    short = scheme_named("W4A16", 64)
    assert "groups of a multiple of 128, not 64" in dispatch.choose(short, (64, 128), CUDA, on_hopper()).why
    rows = dispatch.explain([("experts", PRESETS["FP8"], (64, 128))] * 3, CUDA, on_hopper())
    assert [(row["kernel"], row["linears"]) for row in rows] == [("triton", 3)] and "CUDA" not in str(rows[0]["why"])


def test_table_of_tiles() -> None:
    for rows in tiles.TABLE.values():
        limits = [limit for limit, _ in rows]
        assert limits == sorted(set(limits)) and limits[-1] == float("inf")
        for _, tile in rows:
            assert tile.bm in (16, 32, 64, 128, 256) and tile.bn in (64, 128, 256) and tile.warps in (4, 8)
    assert tiles.pick("int4", 0.5) == tiles.TABLE["int4"][0][1] and tiles.pick("int4", 1e9) == tiles.TABLE["int4"][-1][1]


def test_a_block_holds_what_nearly_every_expert_gets() -> None:
    """Not the mean: with blocks of 16 for experts of 16 rows on average, half of them would read their weight twice."""
    torch.manual_seed(0)
    for tokens, experts in ((128, 16), (256, 16), (1024, 64), (16, 64)):
        rows = torch.stack([torch.bincount(one, minlength=experts) for one in torch.randint(experts, (200, tokens))])
        block = tiles.pick("int4", tiles.crowd(tokens / experts)).bm
        read = float((rows / block).ceil().sum() / (rows > 0).sum())
        assert read < 1.05, (tokens, experts, block, read)


@pytest.mark.parametrize(
    ("programs", "steps", "processors", "parts"),
    [(50, 72, 132, 10), (1000, 72, 132, 1), (1, 8, 132, 2), (1, 1, 8, 1), (2, 400, 132, 16)],
)
def test_splits_fill_the_processors_and_no_more(programs: int, steps: int, processors: int, parts: int) -> None:
    assert tiles.splits(Tile(16, 128, 4, 4, fill=4), programs, steps, processors) == parts


def test_stages_fit_the_memory() -> None:
    tile = Tile(128, 128, 8, 3)
    assert [tiles.that_fits(tile, 40_000, limit * 1024) for limit in (227, 99, 48, 16)] == [3, 2, 1, 1]


def test_gpu_test_without_a_gpu_is_one_sentence() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "tests.gpu"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("gpu-test needs an NVIDIA GPU: torch")
    assert "Fix: " in done.stderr and "Traceback" not in done.stderr


def test_plain_pytest_leaves_the_gpu_tests_alone() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "tests/gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "skip" not in done.stdout
    folder = ROOT / "tests" / "gpu"
    files = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py", "conftest.py"}
    assert files == set(FILES)  # make gpu-test runs each
