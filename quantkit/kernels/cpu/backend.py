"""The CPU kernels as a `Backend`: bfloat16 products of packed INT4, INT8 and FP8 weights, summed in float32."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.backend import Backend, Expert
from quantkit.kernels.cpu import build
from quantkit.kernels.cpu.linear import PackedLinear, matmul, moe_matmul, pack, served
from quantkit.kernels.reference import quantize_activation, round_activation
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Activation, Scheme, Strategy

__all__ = ["BACKEND"]


def _rounded(x: Tensor, activation: Activation | None, input_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What is multiplied, and the scale that then goes onto the product.

    Codes of 8 bits are exact in bfloat16, codes times a scale are not.
    """
    if activation is None:
        return x, None
    if activation.strategy is Strategy.GROUP:
        return round_activation(x, activation, input_scale), None
    return quantize_activation(x, activation, input_scale)


@dataclass(frozen=True)
class _Linear:
    packed: PackedLinear
    activation: Activation | None
    input_scale: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        codes, scale = _rounded(x, self.activation, self.input_scale)
        y = matmul(codes, self.packed)
        return (y if scale is None else y * scale).to(x.dtype)


@dataclass(frozen=True)
class _Experts:
    gates: list[_Linear]
    ups: list[_Linear]
    downs: list[_Linear]

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order = ids.flatten().argsort(stable=True)  # (token, slot) pairs, expert by expert
        tokens = order // ids.shape[1]
        counts = torch.bincount(ids.flatten(), minlength=len(self.gates))
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        rows = x[tokens]
        owners = ids.flatten()[order]
        act = F.silu(self._product(self.gates, rows, owners, offsets)) * self._product(self.ups, rows, owners, offsets)
        y = self._product(self.downs, act, owners, offsets) * weights.flatten()[order, None]
        return torch.zeros_like(x).index_add(0, tokens, y.to(x.dtype))

    def _product(self, linears: list[_Linear], x: Tensor, owners: Tensor, offsets: Tensor) -> Tensor:
        parts = [l.packed for l in linears]
        static = [l.input_scale for l in linears if l.input_scale is not None]  # each expert has its own
        codes, scale = _rounded(x, linears[0].activation, torch.stack(static)[owners] if static else None)
        y = moe_matmul(codes, offsets, parts)
        return y if scale is None else y * scale


def _linear(q: QuantizedTensor, scheme: Scheme) -> _Linear:
    return _Linear(pack(q), scheme.activation, q.input_scale)


def _experts(parts: Iterable[Expert], count: int, scheme: Scheme) -> _Experts:
    packed = [(_linear(part.gate, scheme), _linear(part.up, scheme), _linear(part.down, scheme)) for part in parts]
    gates, ups, downs = (list(column) for column in zip(*packed, strict=True))
    return _Experts(gates, ups, downs)


def _lacks(scheme: Scheme, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"{BACKEND.name} runs on the CPU, not on {device}"
    library = build.load()
    return library if isinstance(library, str) else None


BACKEND = Backend(
    name="cpu-avx512",
    hardware=f"an x86-64 CPU with {', '.join(sorted(build.CPU_FLAGS))} and a C++ compiler",
    why="INT4, INT8 and FP8 weights by table, bfloat16 products summed in float32",
    takes=lambda scheme, shape: served(scheme.weight),
    lacks=_lacks,
    linear=_linear,
    experts=_experts,
)
