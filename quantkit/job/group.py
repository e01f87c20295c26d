"""What is solved at once, as data: a group of linears that read one input. Runs anywhere, and touches no file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from quantkit.kernels.cpu import build
from quantkit.kernels.cpu import solve as compiled
from quantkit.quant.loops import PLAIN, Loops
from quantkit.quant.method import Method
from quantkit.quant.solve import Solution, solutions
from quantkit.scheme import Kind, Scheme
from quantkit.stats import LinearStats

__all__ = ["GroupJob", "loops_on"]


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
        weights = [weight.to(device) for weight in self.weights]
        return solutions(weights, self.scheme, self.method, self.stats, loops_on(device, self.scheme.weight.kind))


def loops_on(device: torch.device, kind: Kind) -> Loops:
    """GPTQ's loops: a block of columns in one launch where the device is a GPU with Triton, compiled ones where the CPU
    kernels can be built (integers only), else plain torch: the codes are the same.

    Errors are handed on as bfloat16 where the CPU multiplies that, several times as fast as float32."""
    if device.type == "cuda":
        if not find_spec("triton"):
            return PLAIN
        from quantkit.kernels.triton.repair import repair

        return replace(PLAIN, repair=repair)
    plain = replace(PLAIN, feedback=torch.float32 if build.missing_cpu_flags() else torch.bfloat16)
    if kind is not Kind.INT or isinstance(compiled.library(), str):
        return plain
    return replace(plain, least=compiled.least, repair=compiled.repair)
