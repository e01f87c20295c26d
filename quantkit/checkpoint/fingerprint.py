"""Whether a model is still the one it was: by content, so that a copy is the same model; cheap, since 780 GB are not."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from quantkit.atomic import sha256
from quantkit.errors import CheckpointError

__all__ = ["Watch", "fingerprint"]

_SAMPLE = 4096


def fingerprint(folder: Path, shards: Iterable[str]) -> str:
    """sha256 over config.json and over each shard's name, size, header, and 4 KiB from the middle of each of its tensors.

    Another training, merge or conversion changes it. A change of a few values elsewhere in a tensor does not: that is found
    when every weight is compared with what was made from it, before OUT appears.
    """
    return _joined(_digests(folder, shards))


def _joined(digests: dict[str, str]) -> str:
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()).hexdigest()


def _digests(folder: Path, shards: Iterable[str]) -> dict[str, str]:
    config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    return {"config.json": config, **{shard: _shard(folder / shard) for shard in shards}}


def _shard(path: Path) -> str:
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        header = file.read(min(length, size))
        digest = hashlib.sha256(f"{size}\n".encode() + header)
        for begin, end in _spans(header):
            wide = min(_SAMPLE, end - begin)
            digest.update(os.pread(file.fileno(), wide, 8 + length + begin + (end - begin - wide) // 2))
    return digest.hexdigest()


def _spans(header: bytes) -> list[tuple[int, int]]:
    """Where each tensor lies, from the beginning of the data."""
    try:
        offsets = [row["data_offsets"] for name, row in json.loads(header).items() if name != "__metadata__"]
        return sorted((int(begin), int(end)) for begin, end in offsets)
    except (ValueError, TypeError, KeyError, AttributeError):
        return []  # a damaged header is another header, and the reader's to refuse


class Watch:
    """A model that must not change while it is worked on. fingerprint: as `fingerprint`, when the watch began.

    beside: further files of the folder, such as the tokenizer's, which are no part of the fingerprint.
    """

    def __init__(self, folder: Path, shards: Iterable[str], beside: Iterable[str] = ()) -> None:
        self.folder, self._shards, self._beside = folder, tuple(shards), tuple(beside)
        self._seen = self._stamps()
        self.fingerprint = _joined(_digests(folder, self._shards))
        self._digests = self._now()

    def _now(self) -> dict[str, str]:
        beside = {name: sha256(self.folder / name) for name in self._beside}
        return {**beside, **_digests(self.folder, self._shards)}

    def _stamps(self) -> list[tuple[int, ...]]:
        """What no write leaves as it was."""
        stats = [os.stat(self.folder / name) for name in ("config.json", *self._shards, *self._beside)]
        return [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for one in stats]

    def check(self) -> None:
        """Raises CheckpointError when a file is no longer what it was, or gone. One that was copied or touched still is."""
        try:
            now = self._stamps()
            if now == self._seen:
                return
            digests = self._now()
        except OSError as error:
            raise CheckpointError(f"{error.filename or self.folder}: {error.strerror}", self._fix()) from error
        for name, digest in self._digests.items():
            if digests[name] != digest:
                raise CheckpointError(f"{self.folder / name} has been replaced while it was worked on", self._fix())
        self._seen = now

    @staticmethod
    def _fix() -> str:
        return "put back the model that the run began with and repeat the command: it resumes; or remove OUT.partial"
