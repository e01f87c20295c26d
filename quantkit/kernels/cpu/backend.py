"""The CPU kernels as `Backend`s: one for the schemes as they are, and one that multiplies INT4 weights by INT8 inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.backend import AttentionParts, Backend, Expert, MlpParts, Steps
from quantkit.kernels.cpu import build
from quantkit.kernels.cpu.linear import Packed, experts, format_of, gather, matmul, pack, plain, stack, unfit
from quantkit.kernels.cpu.steps import AttentionHalf, MlpHalf
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Activation, Kind, Scheme, Strategy

__all__ = ["AVX512", "W4A8", "rounding_of_w4a8"]


@dataclass(frozen=True)
class _Linear:
    weight: Packed

    def __call__(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight).to(x.dtype)


@dataclass(frozen=True)
class _Experts:
    gate_up: Packed
    down: Packed

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts(x, ids, weights, self.gate_up, self.down).to(x.dtype)


def _linear(q: QuantizedTensor, activation: Activation | None) -> _Linear:
    return _Linear(gather([pack(q, activation)]))


def _experts(parts: Iterable[Expert], activation: Activation | None) -> _Experts:
    pairs = [(stack(pack(part.gate, activation), pack(part.up, activation)), pack(part.down, activation)) for part in parts]
    gate_ups, downs = zip(*pairs, strict=True)
    return _Experts(gather(gate_ups), gather(downs))


def _lacks(scheme: Scheme, activation: Activation | None, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"{AVX512.name} runs on the CPU, not on {device}"
    result = build.kernels(format_of(scheme.weight, activation))
    return result if isinstance(result, str) else None


def _attention(parts: AttentionParts) -> AttentionHalf | None:
    linears = parts.q, parts.k, parts.v, parts.o
    if any(linear is not None and not isinstance(linear, _Linear) for linear in linears):
        return None
    return AttentionHalf(parts, [linear.weight if isinstance(linear, _Linear) else None for linear in linears])


def _mlp(parts: MlpParts) -> MlpHalf | None:
    if parts.router is not None and parts.router.dtype is not torch.bfloat16:
        return None
    kernels = [part for part in (parts.experts, parts.apart) if part is not None]
    packed = [weight for part in kernels if isinstance(part, _Experts) for weight in (part.gate_up, part.down)]
    return MlpHalf(parts, [*packed, *[None] * (4 - len(packed))]) if len(packed) == 2 * len(kernels) else None


def _steps(device: torch.device) -> Steps | str:
    if device.type != "cpu":
        return f"{AVX512.name} runs on the CPU, not on {device}"
    library = build.load()
    return library if isinstance(library, str) else _STEPS


_STEPS = Steps("cpu-avx512", lambda weight: _Linear(gather([plain(weight)])), _attention, _mlp)


def rounding_of_w4a8(scheme: Scheme) -> Activation:
    """INT8 with a scale for each group of inputs that share a scale of the weight, 128 where a whole row does."""
    return Activation(Kind.INT, Strategy.GROUP, dynamic=True, group_size=scheme.weight.group_size or 128)


def _w4a8_takes(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    if scheme.weight.bits != 4 or scheme.activation is not None:
        return f"{W4A8.name} multiplies INT4 weights whose scheme leaves the input as it is, not {scheme.name}"
    return unfit(scheme.weight, rounding_of_w4a8(scheme))


HARDWARE = f"an x86-64 CPU with {', '.join(sorted(build.CPU_FLAGS))} and a C++ compiler"
AVX512 = Backend(
    name="cpu-avx512",
    hardware=HARDWARE,
    why="weights by table and products summed in float32; INT8 by INT8 in integers",
    takes=lambda scheme, shape: unfit(scheme.weight, scheme.activation),
    lacks=lambda scheme, device: _lacks(scheme, scheme.activation, device),
    linear=lambda q, scheme: _linear(q, scheme.activation),
    experts=lambda parts, count, scheme: _experts(parts, scheme.activation),
    steps=_steps,
)
W4A8 = Backend(
    name="cpu-w4a8",
    hardware=HARDWARE,
    why="asked for: inputs rounded to INT8 by groups, integer products",
    takes=_w4a8_takes,
    lacks=lambda scheme, device: _lacks(scheme, rounding_of_w4a8(scheme), device),
    linear=lambda q, scheme: _linear(q, rounding_of_w4a8(scheme)),
    experts=lambda parts, count, scheme: _experts(parts, rounding_of_w4a8(scheme)),
    steps=_steps,
)
