"""Just-in-time build of the CPU kernels: shared libraries in `build_cache`, loaded through ctypes. One holds what all weight
formats share, and one for each format the kernels themselves, which are most of the compiler's work.

Where there can be no library (another processor, no compiler, a compiler that fails) the reason comes back as a string.
"""

from __future__ import annotations

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from quantkit.kernels.build_cache import BuildError, cache_folder, kept, open_library, run

__all__ = ["EXACT", "FLAGS", "KERNELS", "SOURCE", "build", "kernels", "library", "load", "missing_cpu_flags", "rowwise"]

SOURCE = Path(__file__).with_name("csrc") / "quantkit_cpu.cpp"
KERNELS = ("int4", "fp8", "int8", "int4_bytes", "int8_bytes")  # a format's number is its place
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
EXACT = ("-ffp-contract=off",)  # products and sums are rounded one by one
CPU_FLAGS = frozenset(
    {"avx2", "fma", "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_bf16", "avx512_vnni"}
)
LIBRARY = "quantkit_cpu.so"


def missing_cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What the kernels need and this processor lacks, sorted; everything when `cpuinfo` cannot be read (not Linux)."""
    try:
        text = cpuinfo.read_text("utf-8", errors="replace")
    except OSError:
        return sorted(CPU_FLAGS)
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return sorted(CPU_FLAGS - set(line.partition(":")[2].split()))


def build(cache: Path, compiler: str = "g++", source: Path = SOURCE, extra: tuple[str, ...] = ()) -> tuple[Path | None, str]:
    """The library built from `source`, compiled unless `cache` has it: (path, "") or (None, reason). extra: more flags.

    What decides it: the source and the headers beside it, compiler version and flags.
    """
    if missing := missing_cpu_flags():
        return None, f"this processor lacks {', '.join(missing)}"
    if not (executable := shutil.which(compiler)):
        return None, f"no compiler: '{compiler}' is not on PATH"
    flags = (*FLAGS, *extra)
    try:
        texts = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
        parts = (*texts, run([executable, "--version"]).encode(), " ".join(flags).encode())
        return kept(cache, LIBRARY, parts, lambda target: run([executable, *flags, str(source), "-o", str(target)])), ""
    except (BuildError, OSError) as error:
        return None, str(error)


def library(source: Path, extra: tuple[str, ...] = ()) -> ctypes.CDLL | str:
    """The loaded library of a source beside SOURCE, or the reason why there is none. extra: more flags."""
    import torch  # noqa: F401  loads the OpenMP runtime that the library shall share

    path, reason = build(cache_folder(), source=source, extra=extra)
    if path is None:
        return reason
    try:
        return open_library(path)
    except BuildError as error:
        return str(error)


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | str:
    """The loaded library, or the reason why there is none. Built on first use, once a machine."""
    if isinstance(shared := library(SOURCE), str):
        return shared
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    entries: dict[str, list[type]] = {  # what each takes, before the number of threads
        "quantkit_matmul": [*[pointer] * 3, size],
        "quantkit_experts": [*[pointer] * 6, *[size] * 3],
        "quantkit_attention_half": [pointer] * 4,
        "quantkit_mlp_half": [*[pointer] * 6, size],
    }
    for name, takes in entries.items():
        entry = getattr(shared, name)
        entry.restype, entry.argtypes = ctypes.c_int, [*takes, ctypes.c_int]
    return shared


@lru_cache
def kernels(number: int) -> ctypes.CDLL | str:
    """The loaded kernels of a weight format, or the reason why there are none or no library for them. Built on first use,
    beside `load`'s library if that is not there yet (some seconds)."""
    with ThreadPoolExecutor(1) as pool:
        shared = pool.submit(load)
        own = library(SOURCE.with_name(f"{KERNELS[number]}.cpp"))
    return reason if isinstance(reason := shared.result(), str) else own


@lru_cache(maxsize=1)
def rowwise() -> ctypes.CDLL | str:
    """The loaded library of what is done to a weight row by row (rowwise.cpp), or the reason why there is none."""
    return library(SOURCE.with_name("rowwise.cpp"), (*EXACT, "-fno-trapping-math", "-fno-math-errno"))
