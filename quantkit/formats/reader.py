"""Reading a checkpoint folder in Hugging Face layout: config.json and safetensors shards, with or without an index.

Headers are read and checked at once, tensors one at a time when asked for. Nothing here trusts a file name or a size
that it finds in a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from quantkit.errors import CheckpointError
from quantkit.formats.dtypes import DTYPES, nbytes
from quantkit.formats.fingerprint import fingerprint

__all__ = ["INDEX", "SINGLE", "CheckpointReader", "Entry", "load_json"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as a shard's header describes it. dtype in safetensors' spelling (BF16, F32, I32, F8_E4M3, ...)."""

    shard: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


def load_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing, broken or not an object."""
    try:
        data = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist", "give a model folder in Hugging Face layout") from None
    except (OSError, ValueError, RecursionError) as error:
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
        expected = self._expected()
        for shard in sorted(set(expected.values())) if expected else [SINGLE]:
            self._read_header(shard)
        for key, shard in expected.items():
            if key not in self.entries or self.entries[key].shard != shard:
                raise CheckpointError(
                    f"{folder / INDEX} places tensor '{key}' in {shard}, which does not hold it",
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
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path} places tensor '{key}' in {shard!r}; only a file name ending in .safetensors, in the "
                    "same folder, is allowed",
                    "do not use this checkpoint, or fetch its index again from a source you trust",
                )
            if not os.path.isfile(self.folder / shard):
                raise CheckpointError(f"shard {self.folder / shard} does not exist; '{key}' should be in it", "fetch it")
        return weight_map

    def _read_header(self, shard: str) -> None:
        path = self.folder / shard
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (a safe_open is not a mapping)
                    view = file.get_slice(key)
                    if key in self.entries:
                        raise CheckpointError(
                            f"tensor '{key}' is in {self.entries[key].shard} and in {shard}", "fetch both again"
                        )
                    dtype, shape = str(view.get_dtype()), tuple(view.get_shape())
                    if dtype not in DTYPES:
                        raise CheckpointError(f"{path}: tensor '{key}' has unknown dtype {dtype}", f"allowed: {[*DTYPES]}")
                    self.entries[key] = Entry(shard, dtype, shape)
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size if path.exists() else 0
            raise CheckpointError(
                f"shard {path} ({size:,} bytes) is truncated or damaged: {error}", "fetch that shard again"
            ) from error

    def entry(self, key: str) -> Entry:
        if key not in self.entries:
            raise CheckpointError(f"{self.folder} has no tensor '{key}'", "check that all shards belong to this model")
        return self.entries[key]

    def tensor(self, key: str) -> Tensor:
        """One tensor, on the CPU, in its stored dtype. Raises CheckpointError when it holds NaN or infinity."""
        path = self.folder / self.entry(key).shard
        try:
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: tensor '{key}' cannot be read: {error}", "fetch that shard again") from error
        if tensor.dtype.is_floating_point:
            # A finite sum of |x| says that all are finite, in one pass; one that is not (float64 may overflow) says: look.
            wide = tensor.float() if tensor.element_size() == 1 else tensor
            if not torch.isfinite(wide.abs().sum(dtype=torch.float64)):
                bad = (~torch.isfinite(wide)).flatten().nonzero()
                if len(bad):
                    raise CheckpointError(
                        f"{path}: tensor '{key}' holds {len(bad)} NaN or infinite values, the first at flat index "
                        f"{int(bad[0])}",
                        "fetch that shard again, or repair the checkpoint: a weight must be finite",
                    )
        return tensor

    def tensors(self, device: torch.device | str = "cpu") -> Mapping[str, Tensor]:
        """All tensors by name, each read when it is asked for and brought to a device."""
        return _Lazy(self, device)

    @cached_property
    def shards(self) -> list[str]:
        return sorted({entry.shard for entry in self.entries.values()})

    def fingerprint(self) -> str:
        """See `fingerprint.fingerprint`: cheap, by content, and another for another model."""
        return fingerprint(self.folder, self.shards)


class _Lazy(Mapping[str, Tensor]):
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
