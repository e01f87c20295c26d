"""The specification of every kernel: dequantize the weight, round the activation as the scheme says, multiply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Activation, Kind, Strategy

__all__ = ["linear", "quantize_activation", "round_activation"]


def quantize_activation(x: Tensor, activation: Activation, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """x [..., in] as codes of 8 bits and scales, both float32; their product is the rounded x.

    Codes have x's shape, or [..., groups, size] when scales are per group of features; scales broadcast against them.
    Dynamic: scale = amax / 448 (FLOAT) or amax / 127 (INT) over the token or over each group. Static: input_scale [1] from
    calibration; what lies beyond it saturates.
    """
    x = x.float()
    if activation.strategy is Strategy.GROUP:
        assert activation.group_size
        x = x.unflatten(-1, (-1, activation.group_size))
    reach = 448.0 if activation.kind is Kind.FLOAT else 127.0
    if activation.dynamic:
        # A GPU multiplies by the reciprocal of a Python number; by a tensor it divides, as the kernels do.
        scale = x.abs().amax(-1, keepdim=True) / torch.full((), reach, device=x.device)
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    else:
        if input_scale is None:
            raise ValueError("a static activation needs an input scale")
        scale = input_scale.float().to(x.device)
    codes = (x / scale).clamp(-reach, reach)
    return codes.to(torch.float8_e4m3fn).float() if activation.kind is Kind.FLOAT else codes.round(), scale


def round_activation(x: Tensor, activation: Activation, input_scale: Tensor | None) -> Tensor:
    """x [..., in] on the 8-bit grid that the scheme gives activations, back in float32: codes times scales."""
    codes, scale = quantize_activation(x, activation, input_scale)
    rounded = codes * scale
    return rounded.flatten(-2) if activation.strategy is Strategy.GROUP else rounded


def linear(x: Tensor, weight: QuantizedTensor, activation: Activation | None) -> Tensor:
    """x [..., in] times the quantized weight [out, in], in float32, returned in x.dtype."""
    rounded = x.float() if activation is None else round_activation(x, activation, weight.input_scale)
    return F.linear(rounded, weight.dequantize().to(x.device)).to(x.dtype)
