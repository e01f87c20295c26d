"""Where compiled kernels are kept, the same for CPU and CUDA: by what they are made from, whole or not there, and this
user's own."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from quantkit.kernels import build_cache
from quantkit.kernels.build_cache import BuildError, cache_folder, kept, open_library, run
from quantkit.kernels.cpu import build as cpu
from quantkit.kernels.cuda import build as cuda


def test_kept_by_what_it_is_made_from(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_bytes(b"library")

    cache = tmp_path / "cache"
    first = kept(cache, "a.so", [b"source", b"flags"], make)
    assert kept(cache, "a.so", [b"source", b"flags"], make) == first and len(made) == 1
    others = [kept(cache, "a.so", parts, make) for parts in ([b"source", b"other"], [b"sourceflags"], [b"sourc", b"eflags"])]
    assert len({first, *others}) == 4 and all(path.read_bytes() == b"library" for path in others)
    assert sorted(cache.iterdir()) == sorted(path.parent for path in (first, *others))
    assert {stat.S_IMODE(os.stat(place).st_mode) for place in (cache, first.parent, first)} == {0o700}


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    def half(path: Path) -> None:
        path.write_bytes(b"half")
        raise BuildError("the compiler was killed")

    with pytest.raises(BuildError, match="the compiler was killed"):
        kept(tmp_path / "cache", "a.so", [b""], half)
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(BuildError, match="cannot be built in"):
        kept(tmp_path / "file", "a.so", [b""], half)


def test_several_at_once_agree(tmp_path: Path) -> None:
    together, found = threading.Barrier(4, timeout=30), list[Path]()

    def make(path: Path) -> None:
        together.wait()
        path.write_bytes(b"library")

    workers = [threading.Thread(target=lambda: found.append(kept(tmp_path / "c", "a.so", [b""], make))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4 and len(set(found)) == 1 and [*(tmp_path / "c").iterdir()] == [found[0].parent]


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "quantkit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the standard says to ignore it
    assert cache_folder() == Path.home() / ".cache" / "quantkit"


def test_a_compiler_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"sh failed with code 3: a.cpp:1: error: wrong$"):
        run(["sh", "-c", "echo In file >&2; echo a.cpp:1: error: wrong >&2; echo a.cpp:2: error: more >&2; exit 3"])
    with pytest.raises(BuildError, match="no-such-compiler failed: "):
        run([str(tmp_path / "no-such-compiler")])
    (tmp_path / "a.so").write_bytes(b"no library")
    with pytest.raises(BuildError, match=r"a\.so cannot be loaded: .*remove its folder"):
        open_library(tmp_path / "a.so")


def test_cuda_and_cpu_keep_theirs_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a compiler that only writes the file that it is asked for."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo code > "$2"; shift; done\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(cuda, "compiler", lambda: str(compiler))
    monkeypatch.setattr(cpu, "missing_cpu_flags", list)
    of_cpu, reason = cpu.build(cache_folder(), str(compiler))
    assert of_cpu and not reason
    for path in (cuda.build(), of_cpu):
        assert path.parent.parent == tmp_path / "home" / "quantkit" and path.read_text() == "code\n"
    os.chmod(cuda.build(), 0o770)
    with pytest.raises(RuntimeError, match="others may write to"):
        cuda.build()
    assert cuda.kept is cpu.kept is build_cache.kept
