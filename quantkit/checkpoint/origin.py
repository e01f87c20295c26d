"""`quantkit.json`: what a checkpoint was made from, how, and what each weight lost; SHA256SUMS covers it.

It holds nothing that differs between two runs of one job: no times, no paths.

    quantkit   version that wrote it
    source     digest: of every tensor (`content_digest`); config_sha256: of config.json; files: sha256 by name of each file
               that was carried over
    recipe     as resolved: schemes by role, and what was calibrated on, if anything was
    linears    by name of each quantized linear: scheme, method (what was really used), weight_error (`stats.weight_error`
               of the source's weight and of what is stored), and input_scale where calibration made one
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.checkpoint.reader import CheckpointReader, Entry, load_json
from quantkit.dtypes import raw
from quantkit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RECORD", "STATEMENT", "SUMS", "DigestingReader", "content_digest", "read_statement", "tensor_digest"]

STATEMENT, SUMS, RECORD = "quantkit.json", "SHA256SUMS", "run.json"  # what quantkit writes about an OUT into it


def tensor_digest(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes, as a safetensors file holds them."""
    return hashlib.sha256(raw(tensor.cpu()).numpy().data).hexdigest()


class DigestingReader(CheckpointReader):
    """Keeps the digest of each tensor that was read, by name in `digests`. One that is read again must be the same."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.digests: dict[str, str] = {}

    def tensor(self, key: str) -> Tensor:
        tensor = super().tensor(key)
        self._seen(key, tensor_digest(tensor))
        return tensor

    def rows(self, key: str, at_once: int) -> Iterator[Tensor]:
        if not self.entry(key).shape:
            yield self.tensor(key)
            return
        digest = hashlib.sha256()
        for part in super().rows(key, at_once):
            digest.update(raw(part).numpy().data)
            yield part
        self._seen(key, digest.hexdigest())

    def _seen(self, key: str, digest: str) -> None:
        if self.digests.setdefault(key, digest) != digest:
            where = self.folder / self.entries[key].shard
            raise CheckpointError(f"{where}: tensor '{key}' has changed since it was read first", "leave the model alone")


def content_digest(entries: Mapping[str, Entry], digests: Mapping[str, str]) -> str:
    """sha256 over the name, dtype, shape and `tensor_digest` of every tensor: the same however the tensors are divided into
    shards, another as soon as one bit of one differs."""
    whole = hashlib.sha256()
    for name in sorted(entries):
        whole.update(f"{name}\\0{entries[name].dtype}\\0{[*entries[name].shape]}\\0{digests[name]}\\n".encode())
    return whole.hexdigest()


def read_statement(folder: Path) -> dict[str, Any] | None:
    """What quantkit.json says; None where there is none. Raises CheckpointError when it is no JSON object."""
    path = folder / STATEMENT
    return load_json(path) if os.path.lexists(path) else None
