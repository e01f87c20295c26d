"""Libraries that kernels are compiled into at first use, kept in one folder and found by what they are made from.

A build happens in a folder beside and is renamed when it is whole and on disk: several processes may build at once, and one
that is killed leaves nothing half made. What another user could have put there is not run.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from quantkit.atomic import fsync_folder
from quantkit.owned import distrust, make_private

__all__ = ["BuildError", "cache_folder", "kept", "open_library", "run"]

_SECONDS = 300  # for one run of a compiler


class BuildError(RuntimeError):
    """Why there is no library."""


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/quantkit, or ~/.cache/quantkit. A relative one is ignored, as the standard says."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "quantkit"


def run(command: Sequence[str]) -> str:
    """Standard output of a compiler. Raises BuildError with the first error that it names."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from error
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["it says nothing"]
        message = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{command[0]} failed with code {done.returncode}: {message}")
    return done.stdout


def kept(cache: Path, name: str, parts: Iterable[bytes], make: Callable[[Path], object]) -> Path:
    """The library `name` in `cache` that these parts decide (source, compiler's version, flags): what `make` has written to
    the path that it was given, made now unless it is there. Raises BuildError."""
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    target = cache / key / name
    try:
        if not target.exists():
            if reason := make_private(cache):
                raise BuildError(f"the kernels cannot be built in {cache}: {reason}; remove it")
            _make(target, make)
        if doubt := next(filter(None, map(distrust, (cache, target.parent, target))), None):
            raise BuildError(f"{doubt}: what lies there is not run; remove it")
    except OSError as error:
        raise BuildError(f"the kernels cannot be built in {cache}: {error}") from error
    return target


def _make(target: Path, make: Callable[[Path], object]) -> None:
    """target's folder appears at once and complete."""
    cache = target.parent.parent
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir(0o700)
        make(folder / target.name)
        os.chmod(folder / target.name, 0o700)
        with open(folder / target.name, "rb") as file:
            os.fsync(file.fileno())
        fsync_folder(folder)
        try:
            folder.rename(target.parent)
        except OSError:
            if not target.exists():  # otherwise another process was first, with the same bytes
                raise
        fsync_folder(cache)


def open_library(path: Path) -> ctypes.CDLL:
    """Raises BuildError when it cannot be loaded."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}; remove its folder, and it is built again") from error
