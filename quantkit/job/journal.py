"""What a job has committed so far: an append-only file of checked lines, replayed when the same command runs again.

The first line holds the job key (all that decides its result); each later one commits a unit, and of two for one unit the
later counts. A line is `crc32 json` and names its job, so that a damaged or torn one costs the unit that it was about and
nothing else.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

from quantkit.atomic import disk_errors, fsync_folder
from quantkit.errors import OutputError
from quantkit.owned import distrust, make_private, no_links

__all__ = ["JOURNAL", "LOCK", "Journal"]

JOURNAL, LOCK = "journal", "lock"  # files in its folder


class Journal:
    """The journal of one job in `folder`, held by one process at a time.

    key: what decides the result. begun: what the job began with besides, and goes on with; as recorded, if it was begun.
    units: the committed ones, by number. Raises OutputError when another process holds it, another job wrote it, or another
    user could have.
    """

    def __init__(self, folder: Path, key: dict[str, str], begun: dict[str, Any] | None = None) -> None:
        self.folder, self.path = folder, folder / JOURNAL
        self.begun: dict[str, Any] = begun or {}
        self.units: dict[int, dict[str, Any]] = {}
        self._job = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        with disk_errors(folder):
            if reason := make_private(folder.parent) or make_private(folder):
                raise OutputError(reason, f"remove {folder.parent}, or choose another OUT")
            self._lock = open(folder / LOCK, "a", opener=no_links)  # noqa: SIM115 (held until close)
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
        data, lines = self._replay()
        if not lines and b"\n" in data:
            problem = f"{self.path} holds no sound line: it is damaged, or of another version of quantkit"
            raise OutputError(problem, f"finish it with that version, or remove {self.folder.parent}")
        mine = [line for line in lines if line["job"] == self._job]
        if lines and not mine:
            raise self._another(key, lines)
        if not lines:
            with disk_errors(self.path), open(self.path, "wb", opener=no_links):
                pass  # the first line was torn
        elif not data.endswith(b"\n"):
            self._write(b"\n")
        for line in mine:
            self.begun = line["begun"]
            if "unit" in line:
                self.units[line["unit"]] = line
        if not any("key" in line for line in mine):
            self._append({"key": key})
            fsync_folder(self.folder)

    def _another(self, key: dict[str, str], lines: list[dict[str, Any]]) -> OutputError:
        there: dict[str, str] = next((line["key"] for line in lines if "key" in line), {})
        differing = [name for name in sorted(key.keys() | there.keys()) if key.get(name) != there.get(name)]
        differences = "\n  ".join(f"{name}: {there.get(name)} there, {key.get(name)} here" for name in differing)
        return OutputError(
            f"{self.folder.parent} belongs to another job; these differ:\n  {differences}",
            f"repeat the other command to finish it, or remove {self.folder.parent}",
        )

    def _replay(self) -> tuple[bytes, list[dict[str, Any]]]:
        """What the file holds, and all lines of it that are sound. Raises OutputError."""
        if not os.path.lexists(self.path):
            return b"", []
        if reason := distrust(self.path):
            raise OutputError(reason, f"remove {self.folder.parent}, or choose another OUT")
        data, lines = self.path.read_bytes(), []
        for raw in data.split(b"\n"):
            crc, _, text = raw.partition(b" ")
            if crc == _checksum(text):
                lines.append(json.loads(text))
        return data, lines

    def _append(self, line: dict[str, Any]) -> None:
        text = json.dumps({"job": self._job, "begun": self.begun, **line}, sort_keys=True).encode()
        self._write(_checksum(text) + b" " + text + b"\n")

    def _write(self, data: bytes) -> None:
        with disk_errors(self.path), open(self.path, "ab", opener=no_links) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    def commit(self, number: int, unit: dict[str, Any]) -> None:
        """Make one unit count. Everything it refers to must be durable before."""
        self._append({"unit": number, **unit})
        self.units[number] = unit

    def close(self) -> None:
        self._lock.close()


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()
