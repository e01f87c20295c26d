"""What is solved at once, as data: a group of linears that read one input. Runs anywhere, and touches no file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from quantkit.quant import gptq
from quantkit.quant.method import Method
from quantkit.quant.solve import Solution, solutions
from quantkit.scheme import Scheme
from quantkit.stats import LinearStats

__all__ = ["GroupJob", "repair_on"]


@dataclass(frozen=True)
class GroupJob:
    """weights: as they are stored, [out_i, in_features] each, of linears that read one input. stats: of that input, from
    all tokens; None where the method needs none. The result depends on nothing else but the device's arithmetic."""

    weights: tuple[Tensor, ...]
    stats: LinearStats | None
    scheme: Scheme
    method: Method

    def run(self, device: torch.device) -> list[Solution]:
        """Codes and scales of each, and what happened to it."""
        weights = [weight.to(device).float() for weight in self.weights]
        return solutions(weights, self.scheme, self.method, self.stats, repair_on(device))


def repair_on(device: torch.device) -> gptq.Repair:
    """GPTQ's block of columns, in one launch where the device is a GPU with Triton."""
    if device.type == "cuda" and find_spec("triton"):
        from quantkit.kernels.triton.repair import repair

        return repair
    return gptq.repair
