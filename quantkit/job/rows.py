"""A unit that needs no calibration: rows of each weight from the source's file to OUT's, read once, never whole in memory.

Tensors do not depend on each other, so several may be on their way at once, each in a thread of its own (`host.every`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from quantkit.checkpoint.reader import CheckpointReader
from quantkit.checkpoint.writer import ShardWriter
from quantkit.dtypes import torch_dtype
from quantkit.formats import compressed_tensors
from quantkit.model.spec import Linear
from quantkit.quant.rounding import Rounding
from quantkit.quant.solve import Outcome
from quantkit.scheme import Packing, Scheme

__all__ = ["carry", "round_rows"]

_BYTES = 1 << 20  # of a tensor that is carried over, at once


def carry(reader: CheckpointReader, writer: ShardWriter, key: str) -> None:
    """A tensor as it is."""
    entry = reader.entry(key)
    if not entry.shape or 0 in entry.shape:
        writer.write(key, reader.tensor(key))
        return
    for part in reader.rows(key, entry.rows_in(_BYTES)):
        writer.append(key, part)


@torch.inference_mode()
def round_rows(
    reader: CheckpointReader,
    writer: Callable[[str], ShardWriter],
    ref: Linear,
    scheme: Scheme,
    device: torch.device,
) -> Outcome:
    """A linear to the nearest codes. writer: of each of the tensors that it becomes, by name."""
    rounding = Rounding(scheme, ref.in_features)
    for part in reader.rows(ref.weight, rounding.at_once):
        for name, rows in compressed_tensors.encode_rows(ref.key, scheme, rounding.rows(part.to(device))).items():
            writer(name).append(name, rows)
    if scheme.packing is Packing.WORDS:
        name = f"{ref.key}.weight_shape"
        writer(name).write(name, torch.tensor([ref.out_features, ref.in_features], dtype=torch_dtype("I64")))
    error = rounding.error
    return Outcome("rtn", "", error**2, None, 0, error)
