"""Which kernel serves a linear on this machine, why, and what would serve it on another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quantkit.kernels.cpu import build
from quantkit.kernels.cpu.linear import served
from quantkit.scheme import Scheme

__all__ = ["CPU", "PLAIN", "REFERENCE", "Choice", "choose", "explain"]

CPU = "cpu-avx512"
REFERENCE = "reference"
PLAIN = "torch"


@dataclass(frozen=True)
class Choice:
    """kernel: CPU, REFERENCE or PLAIN. why: the reason for it. elsewhere: what would serve the layer on other hardware."""

    kernel: str
    why: str
    elsewhere: str


def choose(scheme: Scheme | None, device: torch.device) -> Choice:
    """The kernel for a linear of this scheme on this device. The reference is always right, and slow."""
    if scheme is None:
        return Choice(PLAIN, "not quantised", "torch on any device")
    if unfit := served(scheme.weight):
        return Choice(REFERENCE, unfit, "the reference, on any device")
    elsewhere = f"{CPU} on an x86-64 CPU with {', '.join(sorted(build.CPU_FLAGS))} and a C++ compiler"
    if device.type != "cpu":
        return Choice(REFERENCE, f"no kernel is connected for device {device} yet", elsewhere)
    library = build.load()
    if isinstance(library, str):
        return Choice(REFERENCE, library, elsewhere)
    return Choice(CPU, "INT4, INT8 and FP8 weights by table, bfloat16 products summed in float32", "the reference")


def explain(linears: Iterable[tuple[str, Scheme | None]], device: torch.device) -> list[dict[str, str | int]]:
    """One row for each role and scheme: which kernel serves it, why, and what would elsewhere.

    linears: (role, scheme) of every linear of a model.
    """
    counts: dict[tuple[str, Scheme | None], int] = {}
    for role, scheme in linears:
        counts[role, scheme] = counts.get((role, scheme), 0) + 1
    rows: list[dict[str, str | int]] = []
    for (role, scheme), count in counts.items():
        choice = choose(scheme, device)
        name = scheme.name if scheme else "BF16"
        place = {"kernel": choice.kernel, "why": choice.why, "elsewhere": choice.elsewhere}
        rows.append({"role": role, "scheme": name, "linears": count, **place})
    return rows
