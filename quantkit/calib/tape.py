"""Hidden states of all calibration tokens, on disk: what one layer leaves for the next."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from quantkit.atomic import disk_errors, fsync_folder, sha256
from quantkit.checkpoint.ranges import read_into, write_from
from quantkit.errors import OutputError
from quantkit.owned import no_links

__all__ = ["MemoryTape", "Tape"]


class Tape:
    """A float32 array [rows, width] in a file, read and written row by row: what is in memory is what is asked for.

    Raises OutputError when the file or its disk fails.
    """

    def __init__(self, path: Path, rows: int, width: int) -> None:
        self.path, self.shape = path, (rows, width)
        self.row = width * 4  # bytes

    @classmethod
    def create(cls, path: Path, rows: int, width: int) -> Tape:
        with disk_errors(path), open(path, "wb", opener=no_links) as file:
            os.posix_fallocate(file.fileno(), 0, rows * width * 4)  # a full disk says so now, not half-way
        return cls(path, rows, width)

    @classmethod
    def found(cls, path: Path, rows: int, width: int, digest: str) -> Tape | None:
        """The tape that an earlier process left, if it is still what that process has written."""
        if path.is_symlink() or not path.is_file() or path.stat().st_size != rows * width * 4:
            return None
        return cls(path, rows, width) if sha256(path) == digest else None

    @contextmanager
    def _opened(self, doing: str) -> Iterator[int]:
        with disk_errors(self.path, doing), open(self.path, "r+b", buffering=0, opener=no_links) as file:
            yield file.fileno()

    def _read(self, handle: int, start: int, view: memoryview) -> None:
        """Fill the bytes of whole rows from row `start` on."""
        if read_into(handle, view, start * self.row) != len(view):
            fix = f"remove {self.path.parent.parent} and repeat the command"
            raise OutputError(f"{self.path} is shorter than it was", fix)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop, float32 [stop - start, width], a copy in torch's own memory, whose alignment never differs."""
        values = torch.empty(stop - start, self.shape[1])
        with self._opened("read") as handle:
            self._read(handle, start, _bytes(values))
        return values

    def write(self, start: int, values: Tensor) -> None:
        with self._opened("write") as handle:
            write_from(handle, _bytes(values.float().cpu().contiguous()), start * self.row)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows named by int64 [n], float32 [n, width]."""
        values = torch.empty(len(rows), self.shape[1])
        view = _bytes(values)
        with self._opened("read") as handle:
            for first, start, stop in _runs(rows):
                self._read(handle, first, view[start * self.row : stop * self.row])
        return values

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Add values [n, width] to distinct rows int64 [n]."""
        view = _bytes(self.gather(rows).add_(values.cpu()))
        with self._opened("write") as handle:
            for first, start, stop in _runs(rows):
                write_from(handle, view[start * self.row : stop * self.row], first * self.row)

    def sync(self) -> str:
        """Make what was written durable; its sha256."""
        with disk_errors(self.path), open(self.path, "rb") as file:
            os.fsync(file.fileno())
        fsync_folder(self.path.parent)
        return sha256(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class MemoryTape(Tape):
    """The same in memory: for what is small, and lost with the process."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__(Path(), rows, width)
        self.values = torch.empty(rows, width)

    def read(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop].clone()

    def write(self, start: int, values: Tensor) -> None:
        self.values[start : start + len(values)] = values.cpu()

    def gather(self, rows: Tensor) -> Tensor:
        return self.values[rows.cpu()]

    def add(self, rows: Tensor, values: Tensor) -> None:
        self.values.index_add_(0, rows.cpu(), values.float().cpu())

    def sync(self) -> str:
        raise NotImplementedError("a tape in memory cannot be made durable")

    def remove(self) -> None:
        self.values = torch.empty(0, self.shape[1])


def _bytes(rows: Tensor) -> memoryview:
    return rows.view(torch.uint8).flatten().numpy().data


def _runs(rows: Tensor) -> Iterator[tuple[int, int, int]]:
    """int64 [n] as stretches that follow each other in the file: (first row, start and stop within `rows`)."""
    if not len(rows):
        return
    rows = rows.cpu()
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), (rows.diff() != 1).nonzero().flatten() + 1])
    starts = begins.tolist()
    yield from zip(rows[begins].tolist(), starts, [*starts[1:], len(rows)], strict=True)
