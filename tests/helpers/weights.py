"""Stand-ins for a checkpoint's weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from quantkit.kernels.reference import round_activation
from quantkit.model.spec import Linear, Role
from quantkit.model.weights import Weights
from quantkit.run.model import Model


class InMemory(Weights):
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        return F.linear(x, self.tensors[ref.weight])

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]


class Emulated(Weights):
    """quantkit's reading of a checkpoint with transformers' three departures. In experts inputs are not rounded to FP8, and
    kept or packed weights are multiplied in bfloat16 although float32 is asked for. The input of DeepSeek's kv_b_proj is
    [batch, 1, time, rank] there, of which "per token" becomes one FP8 scale for a whole sequence."""

    def __init__(self, model: Model) -> None:
        self.weights = model.weights

    def linear(self, ref: Linear, x: Tensor) -> Tensor:
        scheme = self.weights.schemes.get(ref.key)
        q = self.weights.quantized(ref, scheme) if scheme else None
        weight = q.dequantize() if q else self.weights.tensor(ref.weight).float()
        activation = scheme.activation if scheme else None
        if ref.role is Role.EXPERTS:
            return F.linear(x, weight) if activation else F.linear(x.bfloat16(), weight.bfloat16())
        if q and activation:
            together = x.flatten(1) if ref.key.endswith("kv_b_proj") and activation.dynamic else x
            x = round_activation(together, activation, q.input_scale).view_as(x)
        return F.linear(x, weight)

    def tensor(self, key: str) -> Tensor:
        return self.weights.tensor(key)
