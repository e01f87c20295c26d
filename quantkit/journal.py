"""What a job has committed so far: an append-only file of checked lines, replayed when the same command runs again.

The first line names the job (digests of all that decides its result), each later one a committed unit. A line is
`crc32 json`; the longest valid prefix counts, so a torn last line is as if it had not been written.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import quantkit
from quantkit.errors import OutputError
from quantkit.formats.atomic import disk_errors, fsync_folder

__all__ = ["Journal", "code_digest"]


def code_digest() -> str:
    """sha256 over quantkit's own source: another version may round differently, so it is another job."""
    root, digest = Path(quantkit.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Journal:
    """The journal of one job in `folder`, held by one process at a time.

    Raises OutputError when another process holds it or another job wrote it.
    """

    def __init__(self, folder: Path, key: dict[str, str]) -> None:
        self.folder, self.path = folder, folder / "journal"
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / "lock", "w")  # noqa: SIM115 (held until close)
        try:
            self._open(key)
        except BaseException:
            self.close()  # a job that was refused must not lock the others out
            raise

    def _open(self, key: dict[str, str]) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.folder.parent} is being written by another process", "wait for it, or choose another OUT"
            ) from None
        lines, size = self._replay()
        self.units = lines[1:]
        if not lines:
            with disk_errors(self.path), open(self.path, "wb"):
                fsync_folder(self.folder)
            self._append(key)
        elif lines[0] != key:
            differing = sorted(k for k in key.keys() | lines[0].keys() if key.get(k) != lines[0].get(k))
            raise OutputError(
                f"{self.folder.parent} belongs to another job; these differ: {', '.join(differing)}",
                f"repeat the other command to finish it, or remove {self.folder.parent}",
            )
        else:
            os.truncate(self.path, size)

    def _replay(self) -> tuple[list[dict[str, Any]], int]:
        lines: list[dict[str, Any]] = []
        size = 0
        for raw in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []:
            crc, _, text = raw.partition(b" ")
            if not raw.endswith(b"\n") or crc != f"{zlib.crc32(text):08x}".encode():
                break
            lines.append(json.loads(text))
            size += len(raw)
        return lines, size

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps(line, sort_keys=True).encode() + b"\n"
        with disk_errors(self.path), open(self.path, "ab") as file:
            file.write(f"{zlib.crc32(text):08x} ".encode() + text)
            file.flush()
            os.fsync(file.fileno())

    def commit(self, unit: dict[str, Any]) -> None:
        """Make one unit count. Everything it refers to must be durable before."""
        self._append(unit)
        self.units.append(unit)

    def close(self) -> None:
        self._lock.close()

    def remove(self) -> None:
        """Forget the job: its result is published."""
        shutil.rmtree(self.folder)
        self.close()
