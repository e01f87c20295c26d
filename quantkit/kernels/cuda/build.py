"""Builds the CUDA kernels with nvcc on first use and loads them with ctypes. No torch headers: seconds, not minutes."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from quantkit.kernels.build_cache import BuildError, cache_folder, kept, open_library, run

__all__ = ["FLAGS", "SOURCE", "Library", "architectures", "build", "compiler", "cubin", "library", "load", "missing"]

SOURCE = Path(__file__).with_name("w4a16_decode.cu")
BASE = ("-O3", "-std=c++17")
# Code for Ampere and Hopper, and PTX that a later GPU's driver compiles.
FLAGS = (
    *BASE,
    *("-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_90a,code=sm_90a"),
    *("-gencode", "arch=compute_90,code=compute_90", "-shared", "-Xcompiler", "-fPIC"),
)
NAME = "w4a16_decode.so"


@dataclass(frozen=True)
class Library:
    """The loaded kernels, and the type of device whose memory they read."""

    functions: ctypes.CDLL
    device: str = "cuda"

    def run(self, *arguments: int | None) -> None:
        """quantkit_w4a16_decode: pointers to x, words, scale, zero, slots, owners, ids, router, out; then blocks, block,
        total, top_k, outputs, inputs, padded, group, gated, wide; then the stream. Raises RuntimeError with CUDA's words."""
        call = self.functions.quantkit_w4a16_decode
        call.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int] * 10 + [ctypes.c_void_p]
        call.restype = ctypes.c_int
        if code := call(*arguments):
            raise RuntimeError(f"w4a16_decode was not launched: {self._name(code)}")

    def problem(self) -> str | None:
        """Why this driver and GPU cannot run the kernels (a driver older than nvcc, say), or None."""
        code = self.functions.quantkit_cuda_probe()
        return self._name(code) if code else None

    def _name(self, code: int) -> str:
        name = self.functions.quantkit_cuda_error
        name.argtypes, name.restype = [ctypes.c_int], ctypes.c_char_p
        return f"{name(code).decode()} (CUDA error {code})"


def compiler() -> str | None:
    """nvcc on PATH, or in CUDA_HOME, or in /usr/local/cuda; None where there is none."""
    nvcc = shutil.which("nvcc")
    places = [Path(root) / "bin" / "nvcc" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    return nvcc or next((str(path) for path in places if path.is_file()), None)


def missing() -> str | None:
    """Why the kernels cannot be built here, or None."""
    if compiler() is None:
        return "nvcc is not on PATH, in CUDA_HOME or in /usr/local/cuda: install the CUDA toolkit (12.0 or later)"
    return None


def architectures() -> set[str]:
    """The virtual architectures that nvcc knows, such as 'compute_90a'; none without nvcc."""
    nvcc = compiler()
    return set(run([nvcc, "--help"]).replace("'", " ").replace(",", " ").split()) if nvcc else set()


def cubin(folder: Path, architecture: str) -> Path:
    """The kernels for one architecture, such as 'sm_90a', for inspection. Raises RuntimeError."""
    reason, nvcc = missing(), compiler()
    if reason or not nvcc:
        raise BuildError(reason)
    to, virtual = folder / f"{architecture}.cubin", architecture.replace("sm_", "compute_")
    run([nvcc, *BASE, "-gencode", f"arch={virtual},code={architecture}", "-cubin", "-o", str(to), str(SOURCE)])
    return to


def build(flags: Sequence[str] = FLAGS) -> Path:
    """The library, from `cache_folder` if it was built before from the same source, by the same nvcc, with the same flags.
    Raises RuntimeError."""
    reason, nvcc = missing(), compiler()
    if reason or not nvcc:
        raise BuildError(reason)
    parts = (SOURCE.read_bytes(), run([nvcc, "--version"]).encode(), "\0".join(flags).encode())
    return kept(cache_folder(), NAME, parts, lambda target: run([nvcc, *flags, "-o", str(target), str(SOURCE)]))


def load() -> Library:
    """Builds if need be, and loads. Raises RuntimeError with the reason."""
    return Library(open_library(build()))


@lru_cache(maxsize=1)
def library() -> Library | str:
    """The kernels, built once a process if need be, or the reason why there are none that run here."""
    try:
        kernels = load()
    except (RuntimeError, OSError) as error:
        return str(error)
    problem = kernels.problem()
    return f"what nvcc built does not run here: {problem}" if problem else kernels
