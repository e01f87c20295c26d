"""Which kernel serves a linear on this machine, why, and what would serve it on another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quantkit.kernels.backend import Backend, Steps
from quantkit.kernels.cpu import backend as cpu
from quantkit.kernels.triton import backend as triton
from quantkit.scheme import Scheme

__all__ = ["BACKENDS", "OPTIONS", "PLAIN", "REFERENCE", "Choice", "choose", "explain", "steps"]

REFERENCE = "reference"
PLAIN = "torch"
BACKENDS: tuple[Backend, ...] = (triton.BACKEND, cpu.AVX512)  # the first that can serve a linear does
# What a user may ask for: backends that come first. "w4a8" rounds inputs that the scheme leaves as they are.
OPTIONS: dict[str, tuple[Backend, ...]] = {"auto": BACKENDS, "w4a8": (cpu.W4A8, *BACKENDS)}


@dataclass(frozen=True)
class Choice:
    """kernel: a backend's name, REFERENCE or PLAIN; backend: None for the last two. why: the reason for it. elsewhere: what
    would serve the layer on other hardware."""

    kernel: str
    backend: Backend | None
    why: str
    elsewhere: str


def choose(
    scheme: Scheme | None, shape: tuple[int, int], device: torch.device, backends: tuple[Backend, ...] = BACKENDS
) -> Choice:
    """The kernel for a linear [out, in] of this scheme on this device. The reference is always right, and slow."""
    if scheme is None:
        return Choice(PLAIN, None, "not quantized", "torch on any device")
    able = [backend for backend in backends if backend.takes(scheme, shape) is None]
    reasons = [backend.takes(scheme, shape) or backend.lacks(scheme, device) for backend in backends]
    here = next((backend for backend, reason in zip(backends, reasons, strict=True) if reason is None), None)
    elsewhere = "; ".join(f"{b.name} on {b.hardware}" for b in able if b is not here) or "the reference, on any device"
    if here is None:
        return Choice(REFERENCE, None, "; ".join(dict.fromkeys(filter(None, reasons))) or "asked for", elsewhere)
    return Choice(here.name, here, "; ".join(filter(None, (here.why, here.note(scheme, device)))), elsewhere)


def steps(device: torch.device, backends: tuple[Backend, ...] = BACKENDS) -> Steps | str:
    """How few tokens go in few calls on this device: the first backend's that has any, or the reasons why none has."""
    offers = [backend.steps(device) for backend in backends]
    reasons = dict.fromkeys(offer for offer in offers if isinstance(offer, str))
    return next((offer for offer in offers if not isinstance(offer, str)), "; ".join(reasons))


def explain(
    linears: Iterable[tuple[str, Scheme | None, tuple[int, int]]],
    device: torch.device,
    backends: tuple[Backend, ...] = BACKENDS,
) -> list[dict[str, str | int]]:
    """One row for each role, scheme and choice: which kernel serves it, why, and what would elsewhere.

    linears: (role, scheme, [out, in]) of every linear of a model.
    """
    counts: dict[tuple[str, Scheme | None, Choice], int] = {}
    for role, scheme, shape in linears:
        key = role, scheme, choose(scheme, shape, device, backends)
        counts[key] = counts.get(key, 0) + 1
    rows: list[dict[str, str | int]] = []
    for (role, scheme, choice), count in counts.items():
        place = {"kernel": choice.kernel, "why": choice.why, "elsewhere": choice.elsewhere}
        rows.append({"role": role, "scheme": scheme.name if scheme else "BF16", "linears": count, **place})
    return rows
