"""Writing safetensors shards tensor by tensor, so that no more than one tensor need be in memory.

The layout of a shard (names, dtypes, shapes) is known before its first byte; the header goes first, each tensor is then
written at its offset, in any order. Format: https://github.com/huggingface/safetensors (8-byte little-endian header
length, JSON header, data without gaps).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from quantkit.atomic import disk_errors, fsync_folder, temporary_name
from quantkit.checkpoint.ranges import write_from
from quantkit.dtypes import ITEMSIZE, TensorPlan, raw, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ShardPlan", "ShardWriter"]


@dataclass
class ShardPlan:
    """The tensors of one shard file."""

    file: str
    tensors: list[TensorPlan] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def layout(self) -> tuple[bytes, dict[str, tuple[int, TensorPlan]]]:
        """The file's header, and each tensor's absolute offset. Wide dtypes first, so all data is aligned."""
        ordered = sorted(self.tensors, key=lambda t: (-ITEMSIZE[t.dtype], t.name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offsets, position = {}, 0
        for tensor in ordered:
            offsets[tensor.name] = (position, tensor)
            ends = [position, position + tensor.nbytes]
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": ends}
            position += tensor.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        return len(text).to_bytes(8, "little") + text, {name: (start + at, t) for name, (at, t) in offsets.items()}


class ShardWriter:
    """Context manager. The file gets its name only on a clean exit with every tensor written. Several threads may write
    tensors, each its own."""

    def __init__(self, folder: Path, plan: ShardPlan) -> None:
        self.path = folder / plan.file
        self._temporary = temporary_name(self.path)
        header, self._pending = plan.layout()
        self._begun: dict[str, int] = {}  # rows of tensors of which some are written
        with disk_errors(self.path):
            self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115 (closed by __exit__)
            write_from(self._file.fileno(), memoryview(header), 0)

    def write(self, name: str, tensor: Tensor) -> None:
        """Store one tensor. Raises ValueError when it is not what the plan says, KeyError when it is not in the plan."""
        offset, plan = self._pending.pop(name)
        if tuple(tensor.shape) != plan.shape or tensor.dtype is not torch_dtype(plan.dtype):
            raise ValueError(f"'{name}' is {tensor.dtype} {tuple(tensor.shape)}, planned {plan.dtype} {plan.shape}")
        self._store(tensor, offset)

    def append(self, name: str, rows: Tensor) -> None:
        """Store the rows that follow those of a tensor that are stored already. Raises as `write`, and where there are more
        than were planned."""
        (offset, plan), done = self._pending[name], self._begun.get(name, 0)
        if rows.shape[1:] != plan.shape[1:] or rows.dtype is not torch_dtype(plan.dtype) or done + len(rows) > plan.shape[0]:
            raise ValueError(
                f"'{name}': rows {rows.dtype} {tuple(rows.shape)} after {done}, planned {plan.dtype} {plan.shape}"
            )
        self._store(rows, offset + done * (plan.nbytes // plan.shape[0]))
        self._begun[name] = done + len(rows)
        if self._begun[name] == plan.shape[0]:
            del self._pending[name], self._begun[name]

    def _store(self, values: Tensor, offset: int) -> None:
        with disk_errors(self.path):
            write_from(self._file.fileno(), raw(values.cpu()).numpy().data, offset)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None and self._pending:
                raise ValueError(f"shard {self.path.name} misses {len(self._pending)} tensors: {min(self._pending)}, ...")
            with disk_errors(self.path):
                if kind is None:
                    os.fsync(self._file.fileno())
                self._file.close()
                if kind is None:
                    os.replace(self._temporary, self.path)
                    fsync_folder(self.path.parent)
        finally:
            self._file.close()
            self._temporary.unlink(missing_ok=True)
