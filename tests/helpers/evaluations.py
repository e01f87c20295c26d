"""A short evaluation of the pair of conftest.py, and a change that its cache must notice."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from quantkit.measure.evaluate import Extent
from quantkit.run.model import Model

SHORT = ("--seq-len", 48, "--windows", 8, "--samples", 0)
EXTENT = Extent(seq_len=48, windows=8, samples=0)


def both(pair: tuple[Path, Path]) -> list[Model]:
    return [Model(path, torch.device("cpu")) for path in (pair[1], pair[0])]


def flip(folder: Path) -> Path:
    """Change one bit of a weight; size, names, headers and modification time stay."""
    shard = sorted(folder.glob("*.safetensors"))[0]
    stat = shard.stat()
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return shard
