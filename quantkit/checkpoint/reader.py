"""Reading a checkpoint folder in Hugging Face layout: config.json and safetensors shards, with or without an index.

Headers are read and checked at once, each one time; tensors one at a time when asked for, from few open files. Nothing here
trusts a file name or a size that it finds in a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from quantkit.atomic import unreadable
from quantkit.checkpoint.fingerprint import fingerprint
from quantkit.checkpoint.finite import first_not_finite
from quantkit.checkpoint.shard import OpenShard, ShardHeader, read_header, rows_of, tensor_of
from quantkit.dtypes import Entry
from quantkit.errors import CheckpointError, shown

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["INDEX", "SINGLE", "CheckpointReader", "Entry", "load_json"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_OPEN = 4  # files that a reader holds open at most: a source of hundreds of shards must not use up what a process may have


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing, broken or not an object."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", "give a model folder in Hugging Face layout") from None
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}", "fetch the file again") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not a JSON object", "fetch the file again")
    return data


class CheckpointReader:
    """A checked, lazily read checkpoint folder. `entries` maps every tensor's name to where and what it is."""

    def __init__(self, folder: Path) -> None:
        if not os.path.isdir(folder):  # unlike Path.is_dir, False for a name that is too long
            raise CheckpointError(f"{folder} is not a folder", "give a model folder in Hugging Face layout")
        self.folder = folder
        self.config = load_json(folder / "config.json")
        self.entries: dict[str, Entry] = {}
        self._headers: dict[str, ShardHeader] = {}
        self._open: dict[str, OpenShard] = {}  # the one that was read last comes last
        self._lock = Lock()  # of `_open`; several threads may read
        expected = self._expected()
        for shard in sorted(set(expected.values())) if expected else [SINGLE]:
            self._read_header(shard)
        for key, shard in expected.items():
            if key not in self.entries or self.entries[key].shard != shard:
                raise CheckpointError(
                    f"{folder / INDEX} places tensor '{shown(key)}' in {shard}, which does not hold it",
                    "fetch that shard again",
                )
        if expected and (extra := self.entries.keys() - expected.keys()):
            raise CheckpointError(f"{folder / INDEX} does not list tensor '{min(extra)}'", "fetch the index again")

    def _expected(self) -> dict[str, str]:
        """The index's map of tensors to shards, with every name checked; empty when a single file serves."""
        path = self.folder / INDEX
        if not path.exists():
            if (self.folder / SINGLE).exists():
                return {}
            raise CheckpointError(f"{self.folder} holds neither {INDEX} nor {SINGLE}", "give a safetensors checkpoint")
        weight_map = load_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path} has no 'weight_map'", "fetch the index again")
        for key, shard in weight_map.items():
            if not _is_shard(shard):
                raise CheckpointError(
                    f"{path} places tensor '{shown(key)}' in {shown(repr(shard))}; only a file name ending in "
                    ".safetensors, in the same folder, is allowed",
                    "do not use this checkpoint, or fetch its index again from a source you trust",
                )
        for shard, key in {shard: key for key, shard in reversed(weight_map.items())}.items():
            if not os.path.isfile(self.folder / shard):
                problem = f"shard {self.folder / shard} does not exist; '{shown(key)}' should be in it"
                raise CheckpointError(problem, "fetch it")
        return weight_map

    def _read_header(self, shard: str) -> None:
        header = read_header(self.folder / shard)
        if both := self.entries.keys() & header.tensors.keys():
            key = min(both)
            raise CheckpointError(f"tensor '{key}' is in {self.entries[key].shard} and in {shard}", "fetch both again")
        self._headers[shard] = header
        self.entries.update(header.tensors)

    def entry(self, key: str) -> Entry:
        if key not in self.entries:
            raise CheckpointError(
                f"{self.folder} has no tensor '{shown(key)}'", "check that all shards belong to this model"
            )
        return self.entries[key]

    def stored(self, key: str) -> Tensor:
        """One tensor, on the CPU, in its stored dtype, whatever its values. Raises CheckpointError if it cannot be read."""
        entry = self.entry(key)
        return tensor_of(self._file(entry.shard), key, entry)

    def _file(self, shard: str) -> OpenShard:
        """A shard, open, whose header is still the one that was read. A copy, or a file that was touched, is as good. One
        that is open no longer is closed as soon as nobody reads it."""
        with self._lock:
            file = self._open.pop(shard, None) or OpenShard(self.folder / shard)
            for oldest in [*self._open][: 1 - _OPEN]:
                del self._open[oldest]
            self._open[shard] = file
            header, status = self._headers[shard], file.status()
            if (status.st_size, status.st_mtime_ns) != (header.size, header.changed):
                if status.st_size != header.size or (now := read_header(self.folder / shard)).tensors != header.tensors:
                    raise CheckpointError(
                        f"shard {file.path} has changed since its header was read: {header.size:,} bytes then, "
                        f"{status.st_size:,} now",
                        "wait until it is whole, and repeat the command",
                    )
                self._headers[shard] = now
            return file

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU, in its stored dtype. Raises CheckpointError when it holds NaN or infinity."""
        tensor = self.stored(key)
        self._check(key, tensor, 0)
        return tensor

    def rows(self, key: str, at_once: int) -> Iterator[Tensor]:
        """The same, in pieces of so many rows of its first dimension, which follow each other; a scalar is one piece."""
        entry = self.entry(key)
        if not entry.shape:
            yield self.tensor(key)
            return
        for start in range(0, entry.shape[0], at_once):
            part = rows_of(self._file(entry.shard), key, entry, start, min(start + at_once, entry.shape[0]))
            self._check(key, part, start)
            yield part

    def _check(self, key: str, values: Tensor, row: int) -> None:
        """Raises CheckpointError where values, which begin at that row of the tensor, are not all finite."""
        if (bad := first_not_finite(values)) is not None:
            count, first = bad
            first += row * (values[:1].numel() if values.ndim else 1)
            raise CheckpointError(
                f"{self.folder / self.entries[key].shard}: tensor '{key}' holds {count} NaN or infinite "
                f"values, the first at flat index {first}",
                "fetch that shard again, or repair the checkpoint: a weight must be finite",
            )

    def tensors(self, device: torch.device | str = "cpu") -> Mapping[str, Tensor]:
        """All tensors by name, each read when it is asked for and brought to a device."""
        return _Lazy(self, device)

    @cached_property
    def shards(self) -> list[str]:
        return sorted({entry.shard for entry in self.entries.values()})

    def fingerprint(self) -> str:
        """See `fingerprint.fingerprint`: cheap, by content, and another for another model."""
        return fingerprint(self.folder, self.shards)


def _is_shard(name: object) -> bool:
    """Whether an index's word for a file is a name in the same folder, and can be shown."""
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors") and name.isprintable()


class _Lazy(Mapping[str, "Tensor"]):
    def __init__(self, reader: CheckpointReader, device: torch.device | str) -> None:
        self._reader, self._device = reader, device

    def __getitem__(self, key: str) -> Tensor:
        return self._reader.tensor(key).to(self._device)

    def __contains__(self, key: object) -> bool:
        return key in self._reader.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.entries)

    def __len__(self) -> int:
        return len(self._reader.entries)
