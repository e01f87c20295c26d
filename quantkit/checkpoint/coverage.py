"""What becomes of every tensor of a source: quantized, kept or refused; and where its bytes went.

`account` says it before the work, `reconcile` compares what lies on disk with it afterwards, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from quantkit.checkpoint.by_name import NamedSpec
from quantkit.checkpoint.reader import CheckpointReader, Entry
from quantkit.dtypes import FLOATS, TensorPlan
from quantkit.errors import VerificationError, counted
from quantkit.formats import compressed_tensors
from quantkit.model.spec import HEAD, ModelSpec, Role
from quantkit.scheme import Scheme

__all__ = ["Coverage", "Fate", "Item", "account", "bystanders", "reconcile"]


class Fate(str, Enum):
    """Exactly one for each tensor of the source. A run with a refused tensor does not begin."""

    QUANTIZED = "quantized"
    KEPT = "kept"
    REFUSED = "refused"


@dataclass(frozen=True)
class Item:
    """One tensor of the source. kind: the role of a linear, or router, embedding, head, norms, other, unknown."""

    fate: Fate
    kind: str
    source_bytes: int
    outputs: tuple[TensorPlan, ...]


@dataclass(frozen=True)
class Coverage:
    """The account of a whole checkpoint, by name of the source's tensors."""

    items: dict[str, Item]

    def of(self, fate: Fate) -> list[str]:
        return [name for name, item in self.items.items() if item.fate is fate]

    def output_bytes(self) -> dict[str, int]:
        """Planned bytes of each tensor of the output."""
        return {tensor.name: tensor.nbytes for item in self.items.values() for tensor in item.outputs}

    def as_dict(self) -> dict[str, Any]:
        """Tensors and bytes before and after, by fate and kind; all fates are there, also the empty ones."""
        table: dict[str, dict[str, dict[str, int]]] = {fate.value: {} for fate in Fate}
        columns = ("tensors", "source_bytes", "output_tensors", "output_bytes")
        for item in self.items.values():
            row = table[item.fate.value].setdefault(item.kind, dict.fromkeys(columns, 0))
            size = sum(tensor.nbytes for tensor in item.outputs)
            for column, amount in zip(columns, (1, item.source_bytes, len(item.outputs), size), strict=True):
                row[column] += amount
        rows = [row for kinds in table.values() for row in kinds.values()]
        return {**table, "total": {column: sum(row[column] for row in rows) for column in columns}}


def bystanders(spec: ModelSpec | NamedSpec) -> tuple[list[str], list[str]]:
    """Linears that are never quantized (routers and head), and all other modules (norms, embedding), by name."""
    linears = {ref.weight for ref in spec.linears()}
    unquantized = [*(moe.router.key for moe in spec.moes()), "lm_head"]
    others = [name.removesuffix(".weight") for name in spec.tensors() if name not in linears]
    return unquantized, [name for name in others if name not in unquantized]


def account(entries: Mapping[str, Entry], spec: ModelSpec | NamedSpec, schemes: Mapping[str, Scheme | None]) -> Coverage:
    """The fate of every tensor in `entries` under these schemes (None: kept)."""
    linears = {ref.weight: ref for ref in spec.linears()}
    kinds = dict.fromkeys(spec.tensors(), "norms" if isinstance(spec, ModelSpec) else "other")
    kinds |= {moe.router.weight: Role.ROUTER.value for moe in spec.moes()}
    if isinstance(spec, ModelSpec):
        kinds |= {HEAD: Role.HEAD.value, spec.embedding: "embedding"}
    kinds |= {weight: ref.role.value for weight, ref in linears.items()}
    items: dict[str, Item] = {}
    for name, entry in entries.items():
        scheme = schemes[linears[name].key] if name in linears else None
        if scheme is not None:
            outputs = tuple(compressed_tensors.planned(linears[name], scheme))
            items[name] = Item(Fate.QUANTIZED, kinds[name], entry.nbytes, outputs)
        elif name in kinds:
            items[name] = Item(Fate.KEPT, kinds[name], entry.nbytes, (TensorPlan(name, entry.dtype, entry.shape),))
        else:
            items[name] = Item(Fate.REFUSED, "unknown", entry.nbytes, ())
    return Coverage(items)


def reconcile(coverage: Coverage, reader: CheckpointReader) -> dict[str, Any]:
    """Compare the account with a finished folder: each planned tensor is there with its bytes, and nothing else is.

    Files are measured too, so that bytes which no header names are found. Returns the account with the bytes on disk.
    Raises VerificationError that lists what differs.
    """
    planned, on_disk = coverage.output_bytes(), {name: entry.nbytes for name, entry in reader.entries.items()}
    problems = [f"'{name}' was planned and is not there" for name in sorted(planned.keys() - on_disk.keys())]
    problems += [f"'{name}' is there and was not planned" for name in sorted(on_disk.keys() - planned.keys())]
    problems += [
        f"'{name}' has {on_disk[name]:,} bytes, planned {size:,}"
        for name, size in planned.items()
        if name in on_disk and on_disk[name] != size
    ]
    problems += [
        f"{coverage.items[name].kind} '{name}' stayed {reader.entries[name].dtype}"
        for name in coverage.of(Fate.QUANTIZED)
        if name in on_disk and reader.entries[name].dtype in FLOATS
    ]
    problems += _file_sizes(reader, on_disk.items())
    if problems:
        listing = "\n  ".join(problems[:10])
        message = f"{reader.folder}: {counted(len(problems), 'difference')} from the plan"
        raise VerificationError(f"{message}:\n  {listing}", "quantize again")
    return {**coverage.as_dict(), "bytes_on_disk": sum(on_disk.values()), "reconciled": True}


def _file_sizes(reader: CheckpointReader, sizes: Iterable[tuple[str, int]]) -> list[str]:
    """Shards whose length is not that of their header and the tensors which it names."""
    expected = dict.fromkeys(reader.shards, 0)
    for name, size in sizes:
        expected[reader.entries[name].shard] += size
    problems = []
    for shard, size in expected.items():
        path = reader.folder / shard
        with open(path, "rb") as file:
            header = 8 + int.from_bytes(file.read(8), "little")
        if path.stat().st_size != header + size:
            problems.append(f"{shard} has {path.stat().st_size - header:,} bytes of data, its tensors {size:,}")
    return problems
