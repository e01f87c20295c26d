"""One safetensors file: its header, checked, and byte ranges of it.

Ranges are read plainly and a file is never mapped: mapping one that is larger than the address space fails, and one that is
truncated or whose disk fails under a map ends the process by SIGBUS. Format: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import os
import stat
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from quantkit.atomic import unreadable
from quantkit.checkpoint.ranges import read_into
from quantkit.dtypes import ITEMSIZE, Entry, nbytes, torch_dtype
from quantkit.errors import CheckpointError, shown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["OpenShard", "ShardHeader", "read_header", "rows_of", "tensor_of"]

_LONGEST_HEADER = 100_000_000  # as the safetensors library allows
_LONGEST_NAME = 512


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """A shard's tensors by name. size (bytes) and changed (modification time, ns) are the file's when it was read."""

    tensors: dict[str, Entry]
    size: int
    changed: int


class _Damaged(ValueError):
    """The header is not one that a safetensors file may have."""


class OpenShard:
    """A shard open for reading; the file is closed with `close`, or when nothing refers to this. Raises CheckpointError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would be waited for
        except (OSError, ValueError) as error:  # ValueError: a NUL in its name
            raise unreadable(path, error) from error
        self.close = weakref.finalize(self, os.close, self._handle)
        if not stat.S_ISREG(self.status().st_mode):
            raise CheckpointError(f"shard {path} is not a file", "give a safetensors checkpoint")

    def status(self) -> os.stat_result:
        try:
            return os.fstat(self._handle)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def read(self, start: int, length: int, what: str) -> Tensor:
        """That many bytes from `start`, uint8 [length]. what: for the message when they cannot be had."""
        import torch

        try:
            data = torch.empty(length, dtype=torch.uint8)
        except RuntimeError as error:  # what torch raises for memory that a CPU does not have
            raise CheckpointError(
                f"{self.path}: {what} needs {length:,} bytes of memory, and there is not as much", "free memory"
            ) from error
        self.fill(data.numpy().data, start, what)
        return data

    def fill(self, view: memoryview, start: int, what: str) -> None:
        """Fill a view of bytes with those from `start`."""
        length = len(view)
        try:
            got = read_into(self._handle, view, start)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if got != length:
            problem = f"{self.path}: {what} cannot be read: the file ends at byte {start + got:,}, before {start + length:,}"
            raise CheckpointError(problem, "it was truncated; fetch that shard again")


def tensor_of(file: OpenShard, key: str, entry: Entry) -> Tensor:
    """One tensor of an open shard, in its stored dtype. Raises CheckpointError."""
    return file.read(entry.start, entry.nbytes, f"tensor '{key}'").view(torch_dtype(entry.dtype)).reshape(entry.shape)


def rows_of(file: OpenShard, key: str, entry: Entry, start: int, stop: int) -> Tensor:
    """Rows start to stop of one tensor of an open shard, in its stored dtype. Raises CheckpointError."""
    data = file.read(entry.start + start * entry.row, (stop - start) * entry.row, f"tensor '{key}'")
    return data.view(torch_dtype(entry.dtype)).reshape(stop - start, *entry.shape[1:])


def read_header(path: Path) -> ShardHeader:
    """Read and check a shard's header. Raises CheckpointError."""
    file = OpenShard(path)
    status = file.status()
    size = status.st_size
    try:
        length = int.from_bytes(_bytes(file, 0, 8, size), "little")
        if length > _LONGEST_HEADER:
            raise _Damaged(f"a header of {length:,} bytes is too large")
        text = _bytes(file, 8, length, size)
        if not text.startswith(b"{"):
            raise _Damaged("the header is not a JSON object")
        fields = json.loads(text, object_pairs_hook=_each_once)
        tensors = _tensors(path, fields, 8 + length, size)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"shard {path} ({size:,} bytes) is truncated or damaged: {error}", "fetch that shard again"
        ) from error
    finally:
        file.close()
    return ShardHeader(tensors, size, status.st_mtime_ns)


def _bytes(file: OpenShard, start: int, length: int, size: int) -> bytes:
    if start + length > size:
        raise _Damaged("it ends within its header")
    data = bytearray(length)
    file.fill(memoryview(data), start, "its header")
    return bytes(data)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise _Damaged(f"its header names '{shown(key)}' twice")
        fields[key] = value
    return fields


def _tensors(path: Path, fields: dict[str, Any], start: int, size: int) -> dict[str, Entry]:
    """The tensors that a header names, each with its bytes, which follow each other without a gap up to the file's end."""
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Damaged("__metadata__ is not an object of strings")
    tensors: dict[str, Entry] = {}
    spans: list[tuple[int, int, str]] = []
    for name, row in sorted(fields.items()):
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise _Damaged(f"'{shown(name)}' is no name of a tensor: it is too long, or has characters that do not print")
        dtype, shape, (begin, end) = _row(name, row)
        if dtype not in ITEMSIZE:
            raise CheckpointError(f"{path}: tensor '{name}' has unknown dtype {shown(dtype)}", f"allowed: {[*ITEMSIZE]}")
        needed = nbytes(dtype, shape)
        if needed >= 2**63:
            raise _Damaged(f"tensor '{name}': shape {shown(shape)} overflows 64 bits")
        if end - begin != needed:
            raise _Damaged(f"tensor '{name}': {needed:,} bytes of {dtype} {shape}, but offsets {begin} to {end}")
        tensors[name] = Entry(path.name, dtype, shape, start + begin)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise _Damaged(f"tensor '{name}': offset {begin} where {position} is the next")
        position = end
    if start + position != size:
        raise _Damaged(f"{position:,} bytes of tensors, and {size - start:,} in the file")
    return tensors


def _row(name: str, row: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """dtype, shape and offsets of a tensor, each of the type that it should have."""
    fields = row if isinstance(row, dict) else {}
    dtype, shape, ends = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or not _is_sizes(shape) or not _is_sizes(ends) or len(ends) != 2:
        raise _Damaged(f"tensor '{name}' is {shown(row)}, not dtype, shape and offsets")
    return dtype, tuple(shape), (ends[0], ends[1])


def _is_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and len(value) <= 64 and all(type(size) is int and 0 <= size < 2**64 for size in value)
