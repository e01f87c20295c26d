"""What a model's schemes were chosen by: that part of `report.json`, and of run.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["Allocation", "AllocationPoint", "allocation_in"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class AllocationPoint(_Part):
    """One allocation: bytes of the checkpoint, bits per weight of what is quantized, predicted mean KL."""

    output_bytes: int
    bits_per_weight: float
    predicted_kl: float


class AllocationAnchor(_Part):
    """A whole model that was measured beside the sensitivities: its KL, and what they predict for it."""

    name: str
    kl: float
    predicted_kl: float


class Allocation(AllocationPoint):
    """target, engine: what was asked for, and the engine that had to load it. schemes: by group of linears. curve: the least
    loss by bytes. exponent: how losses of groups combine. text, tokens: what predicted_kl is a prediction for."""

    target: str
    engine: str | None
    schemes: dict[str, str]
    curve: list[AllocationPoint]
    exponent: float
    anchors: list[AllocationAnchor]
    text: str
    tokens: int
    sensitivity: str | None = None


def allocation_in(record: Mapping[str, Any]) -> Allocation | None:
    """What run.json says of it; None where it says nothing that can be read."""
    try:
        return Allocation.model_validate(record["allocation"]) if "allocation" in record else None
    except ValidationError:
        return None
