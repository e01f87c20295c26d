"""Just-in-time build of the CPU kernels: one shared library, kept in a cache folder, loaded through ctypes.

Where there can be no library (another processor, no compiler, a compiler that fails) the reason comes back as a string.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from quantkit.owned import distrust, make_private

__all__ = ["FLAGS", "SOURCE", "build", "cache_folder", "load", "missing_cpu_flags"]

SOURCE = Path(__file__).with_name("csrc") / "quantkit_cpu.cpp"
# A fixed target, not -march=native: home folders, and the cache with them, may be shared between machines. Floating point
# stays strict. -fopenmp links libgomp.so.1 by name, which is the one that torch has already loaded.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=x86-64-v4",
    "-mavx512bf16",
    "-mavx512vnni",
    "-mprefer-vector-width=512",
    "-fopenmp",
    "-fPIC",
    "-shared",
)
CPU_FLAGS = frozenset(
    {"avx2", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}
)
LIBRARY = "quantkit_cpu.so"
COMPILE_SECONDS = 300


def missing_cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What the kernels need and this processor lacks, sorted; everything when `cpuinfo` cannot be read (not Linux)."""
    try:
        text = cpuinfo.read_text("utf-8", errors="replace")
    except OSError:
        return sorted(CPU_FLAGS)
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return sorted(CPU_FLAGS - set(line.partition(":")[2].split()))


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/quantkit, or ~/.cache/quantkit."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "quantkit"


def _run(command: list[str]) -> tuple[int, str]:
    """Exit status and standard output, or error output when there is no other; -1 and why if it did not run to its end."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return -1, str(error)
    return result.returncode, result.stdout or result.stderr


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _compile(compiler: str, source: Path, target: Path) -> str | None:
    """Compile into target's folder, which appears at once and complete. Returns the reason why not, or None."""
    parent = target.parent.parent
    if reason := make_private(parent):
        return f"the kernels cannot be built in {parent}: {reason}; remove it"
    with tempfile.TemporaryDirectory(prefix=".build-", dir=parent) as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir(0o700)
        status, text = _run([compiler, *FLAGS, str(source), "-o", str(folder / LIBRARY)])
        if status:
            lines = text.strip().splitlines() or [f"exit status {status}"]
            return f"{compiler} failed: {next((line for line in lines if 'error' in line), lines[0])}"
        os.chmod(folder / LIBRARY, 0o700)
        _sync(folder / LIBRARY)
        _sync(folder)
        try:
            folder.rename(target.parent)
        except OSError:
            if not target.exists():  # otherwise another process was first, with the same bytes
                raise
        _sync(parent)
    return None


def build(cache: Path, compiler: str = "g++", source: Path = SOURCE) -> tuple[Path | None, str]:
    """The library built from `source`, compiled unless `cache` has it: (path, "") or (None, reason).

    What another user could have put there is not run. The cache key is the SHA-256 of the source and the headers beside it,
    compiler version and flags. Safe for several processes at once.
    """
    if missing := missing_cpu_flags():
        return None, f"this processor lacks {', '.join(missing)}"
    if not (found := shutil.which(compiler)):
        return None, f"no compiler: '{compiler}' is not on PATH"
    status, version = _run([found, "--version"])
    if status:
        return None, f"{found} --version failed: {version.strip()}"
    try:
        texts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
        key = hashlib.sha256(b"\0".join([*texts, version.encode(), " ".join(FLAGS).encode()])).hexdigest()
        target = cache / key / LIBRARY
        reason = None if target.exists() else _compile(found, source, target)
        if reason is None and (doubt := next(filter(None, map(distrust, (cache, target.parent, target))), None)):
            reason = f"{doubt}: what lies there is not run; remove it"
    except OSError as error:
        return None, f"the kernels cannot be built in {cache}: {error}"
    return (None, reason) if reason else (target, "")


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | str:
    """The loaded library, or the reason why there is none. Built on first use (about 10 seconds), once a machine."""
    import torch  # noqa: F401  loads the OpenMP runtime that the library shall share

    path, reason = build(cache_folder())
    if path is None:
        return reason
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} cannot be loaded: {error}"
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.quantkit_matmul.restype = library.quantkit_experts.restype = ctypes.c_int
    library.quantkit_matmul.argtypes = [*[pointer] * 3, size, ctypes.c_int]
    library.quantkit_experts.argtypes = [*[pointer] * 6, *[size] * 3, ctypes.c_int]
    return library
