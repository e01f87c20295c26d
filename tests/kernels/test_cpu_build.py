"""The just-in-time build of the CPU kernels: cached, safe for several at once, and a reason where it cannot be."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from quantkit.kernels.cpu import build
from tests.helpers.compiler import compiles

SMALL = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "small.cpp"
    path.write_text(SMALL)
    return path


@compiles
def test_cache_is_reused_and_keyed_by_source(tmp_path: Path, source: Path) -> None:
    cache = tmp_path / "cache"
    path, reason = build.build(cache, source=source)
    assert path and not reason
    before = path.stat()
    assert build.build(cache, source=source) == (path, "") and path.stat() == before
    source.write_text(SMALL.replace("42", "43"))
    other, _ = build.build(cache, source=source)
    assert other and other != path
    assert sorted(p.name for p in cache.iterdir()) == sorted({path.parent.name, other.parent.name})


@compiles
def test_failed_build_gives_the_first_error(tmp_path: Path, source: Path) -> None:
    source.write_text("int f() { return wrong; }\nint g() { return worse; }\n")
    path, reason = build.build(tmp_path / "cache", source=source)
    assert path is None and "error" in reason and "wrong" in reason and "worse" not in reason and "\n" not in reason
    assert not list((tmp_path / "cache").iterdir())


@compiles
def test_unusable_cache_gives_a_reason(tmp_path: Path, source: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    path, reason = build.build(tmp_path / "cache", source=source)
    assert path is None and "cannot be built in" in reason


@compiles
def test_builds_at_once_agree(tmp_path: Path, source: Path) -> None:
    """Threads stand for processes: they share nothing but the folder, and each waits for a compiler of its own."""
    results: list[tuple[Path | None, str]] = []
    workers = [threading.Thread(target=lambda: results.append(build.build(tmp_path / "c", source=source))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(results) == 4 and len(set(results)) == 1 and results[0][1] == ""
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_missing_compiler_and_processor(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "missing_cpu_flags", list)
    path, reason = build.build(tmp_path / "cache", "no-such-compiler", source)
    assert path is None and "no-such-compiler" in reason
    monkeypatch.setattr(build, "missing_cpu_flags", lambda: ["avx512_bf16"])
    assert build.build(tmp_path / "cache", source=source) == (None, "this processor lacks avx512_bf16")


def test_processor_flags_are_read(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: fma avx2 avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni\n")
    assert build.missing_cpu_flags(info) == ["avx512_bf16"]
    assert set(build.missing_cpu_flags(tmp_path / "none")) == build.CPU_FLAGS


def test_what_a_model_does_not_use_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """For INT4 the shared part and INT4's kernels, both at once."""
    asked, both = [], threading.Barrier(2, timeout=30)

    def fake(cache: Path, source: Path, extra: tuple[str, ...]) -> tuple[Path | None, str]:
        asked.append(source.name)
        both.wait()
        return None, f"no {source.name}"

    monkeypatch.setattr(build, "build", fake)
    monkeypatch.setattr(build, "load", build.load.__wrapped__)
    assert build.kernels.__wrapped__(build.KERNELS.index("int4")) == "no quantkit_cpu.cpp"
    assert sorted(asked) == ["int4.cpp", "quantkit_cpu.cpp"]
    sources = {path.stem for path in build.SOURCE.parent.glob("*.cpp")}
    assert sources == {"quantkit_cpu", "rowwise", "solve", *build.KERNELS}
