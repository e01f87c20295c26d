"""The specification of every kernel: dequantise the weight, round the activation as the scheme says, multiply."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Activation, Kind, Strategy

__all__ = ["linear", "round_activation"]


def round_activation(x: Tensor, activation: Activation, input_scale: Tensor | None) -> Tensor:
    """x [..., in] on the 8-bit grid that the scheme gives activations, back in float32.

    Dynamic: scale = amax / 448 (FLOAT) or amax / 127 (INT) over the token or over each group of features. Static:
    input_scale [1] from calibration; what lies beyond it saturates.
    """
    x = x.float()
    grouped = activation.strategy is Strategy.GROUP
    if grouped:
        assert activation.group_size
        x = x.unflatten(-1, (-1, activation.group_size))
    reach = 448.0 if activation.kind is Kind.FLOAT else 127.0
    if activation.dynamic:
        scale = x.abs().amax(-1, keepdim=True) / reach
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    else:
        if input_scale is None:
            raise ValueError("a static activation needs an input scale")
        scale = input_scale.float().to(x.device)
    codes = (x / scale).clamp(-reach, reach)
    codes = codes.to(torch.float8_e4m3fn).float() if activation.kind is Kind.FLOAT else codes.round()
    x = codes * scale
    return x.flatten(-2) if grouped else x


def linear(x: Tensor, weight: QuantizedTensor, activation: Activation | None) -> Tensor:
    """x [..., in] times the quantised weight [out, in], in float32, returned in x.dtype."""
    rounded = x.float() if activation is None else round_activation(x, activation, weight.input_scale)
    return F.linear(rounded, weight.dequantize().to(x.device)).to(x.dtype)
