"""Hidden states of all calibration tokens, on disk: what one layer leaves for the next."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantkit.errors import OutputError
from quantkit.formats.atomic import disk_errors, fsync_folder

__all__ = ["Tape"]


class Tape:
    """A float32 array [rows, width] in a file. Each access maps the file anew, so resident memory is what is in use."""

    def __init__(self, path: Path, rows: int, width: int) -> None:
        self.path, self.shape = path, (rows, width)
        if not path.is_file() or path.stat().st_size != rows * width * 4:  # numpy would lengthen a short one with zeros
            raise OutputError(f"{path} is gone or has another size", f"remove {path.parent.parent} and repeat the command")

    @classmethod
    def create(cls, path: Path, rows: int, width: int) -> Tape:
        with disk_errors(path), open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, rows * width * 4)  # a full disk says so now, not by SIGBUS later
        return cls(path, rows, width)

    def _map(self) -> np.memmap[tuple[int, int], np.dtype[np.float32]]:
        return np.memmap(self.path, dtype=np.float32, mode="r+", shape=self.shape)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop, float32 [stop - start, width], a copy."""
        return torch.from_numpy(np.array(self._map()[start:stop]))

    def write(self, start: int, values: Tensor) -> None:
        self._map()[start : start + len(values)] = values.cpu().numpy()

    def gather(self, rows: Tensor) -> Tensor:
        """The rows named by int64 [n], float32 [n, width]."""
        return torch.from_numpy(self._map()[rows.cpu().numpy()])

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add values [n, width] to distinct rows int64 [n]."""
        self._map()[rows.cpu().numpy()] += values.cpu().numpy()

    def sync(self) -> None:
        """Make what was written durable."""
        with disk_errors(self.path), open(self.path, "rb") as file:
            os.fsync(file.fileno())
        fsync_folder(self.path.parent)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
