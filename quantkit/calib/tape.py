"""Hidden states of all calibration tokens, on disk: what one layer leaves for the next."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.formats.atomic import disk_errors, fsync_folder, sha256
from quantkit.owned import no_links

__all__ = ["Tape"]


class Tape:
    """A float32 array [rows, width] in a file. Each access maps the file anew, so resident memory is what is in use."""

    def __init__(self, path: Path, rows: int, width: int) -> None:
        self.path, self.shape = path, (rows, width)

    @classmethod
    def create(cls, path: Path, rows: int, width: int) -> Tape:
        with disk_errors(path), open(path, "wb", opener=no_links) as file:
            os.posix_fallocate(file.fileno(), 0, rows * width * 4)  # a full disk says so now, not by SIGBUS later
        return cls(path, rows, width)

    @classmethod
    def found(cls, path: Path, rows: int, width: int, digest: str) -> Tape | None:
        """The tape that an earlier process left, if it is still what that process has written."""
        if path.is_symlink() or not path.is_file() or path.stat().st_size != rows * width * 4:
            return None
        return cls(path, rows, width) if sha256(path) == digest else None

    def _map(self) -> np.memmap[tuple[int, int], np.dtype[np.float32]]:
        return np.memmap(self.path, dtype=np.float32, mode="r+", shape=self.shape)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop, float32 [stop - start, width], a copy in torch's own memory, whose alignment never differs."""
        rows = torch.empty(stop - start, self.shape[1])
        rows.numpy()[:] = self._map()[start:stop]
        return rows

    def write(self, start: int, values: Tensor) -> None:
        self._map()[start : start + len(values)] = values.cpu().numpy()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows named by int64 [n], float32 [n, width]."""
        found = torch.empty(len(rows), self.shape[1])
        np.take(self._map(), rows.cpu().numpy(), axis=0, out=found.numpy())
        return found

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add values [n, width] to distinct rows int64 [n]."""
        self._map()[rows.cpu().numpy()] += values.cpu().numpy()

    def sync(self) -> str:
        """Make what was written durable; its sha256."""
        with disk_errors(self.path), open(self.path, "rb") as file:
            os.fsync(file.fileno())
        fsync_folder(self.path.parent)
        return sha256(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
