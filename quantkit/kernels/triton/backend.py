"""The GPU kernels as a `Backend`: Triton, with the CUDA kernel for few tokens where it can be built.

Importing this imports neither Triton nor a kernel: that takes half a second, and most processes have no GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from quantkit.kernels.backend import Backend, Expert, QuantExperts, QuantLinear
from quantkit.qtensor import QuantizedTensor
from quantkit.scheme import Kind, Scheme

if TYPE_CHECKING:
    from quantkit.kernels.cuda.build import Library

__all__ = ["BACKEND", "Capability", "capability_of", "lacks"]

Capability = tuple[int, int]
BFLOAT16, FLOAT8 = (8, 0), (8, 9)  # compute capabilities whose tensor cores have these types


def capability_of(device: torch.device) -> Capability | None:
    """The compute capability of an NVIDIA GPU, or None where torch sees none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(device)


def lacks(
    scheme: Scheme,
    device: torch.device,
    capability: Callable[[torch.device], Capability | None] = capability_of,
    installed: Callable[[], bool] = lambda: find_spec("triton") is not None,
) -> str | None:
    """What a device lacks to run a scheme here, or None. The CPU runs it in Triton's interpreter if that is asked for."""
    if device.type == "cpu" and "TRITON_INTERPRET" in os.environ and installed():
        from quantkit.kernels.triton import lang

        if lang.simulated():
            return None
    if device.type != "cuda":
        return f"triton runs on an NVIDIA GPU, not on {device}"
    if not installed():
        return "Triton is not installed: pip install 'quantkit[gpu]'"
    actual = capability(device)
    if actual is None:
        return f"torch {torch.__version__} sees no NVIDIA GPU"
    activation = scheme.activation
    needed = FLOAT8 if activation and activation.kind is Kind.FLOAT else BFLOAT16
    if actual < needed:
        what = "FP8" if needed == FLOAT8 else "bfloat16"
        return f"{device} has compute capability {actual[0]}.{actual[1]}, and {what} needs {needed[0]}.{needed[1]} or later"
    return None


def _takes(scheme: Scheme, shape: tuple[int, int]) -> str | None:
    from quantkit.kernels.triton.layout import misfit

    return misfit(scheme, shape)


def _note(scheme: Scheme, device: torch.device) -> str | None:
    """Which of the two kernels serves which number of tokens."""
    if scheme.activation is not None or device.type != "cuda":
        return None
    from quantkit.kernels.cuda import build, decode
    from quantkit.kernels.triton.tiles import CUDA_UP_TO

    if not CUDA_UP_TO:
        return None
    reason = decode.misfit(scheme.weight) or (library if isinstance(library := build.library(), str) else None)
    return f"Triton for one token too: {reason}" if reason else f"CUDA for up to {CUDA_UP_TO} tokens a weight"


def _library(scheme: Scheme, device: torch.device) -> Library | None:
    """The CUDA kernel, where it can be built and reads such weights."""
    if scheme.activation is not None or device.type != "cuda":
        return None
    from quantkit.kernels.cuda import build, decode
    from quantkit.kernels.triton.tiles import CUDA_UP_TO

    if not CUDA_UP_TO or decode.misfit(scheme.weight):
        return None
    library = build.library()
    return None if isinstance(library, str) else library


def _linear(q: QuantizedTensor, scheme: Scheme) -> QuantLinear:
    from quantkit.kernels.triton.layout import pack
    from quantkit.kernels.triton.serve import Linear

    return Linear(pack(q, scheme), _library(scheme, q.codes.device))


def _experts(parts: Iterable[Expert], count: int, scheme: Scheme) -> QuantExperts:
    from quantkit.kernels.triton.layout import Stack, join, pack
    from quantkit.kernels.triton.serve import Experts

    gate_up, down = Stack(count), Stack(count)
    for part in parts:
        gate_up.add(join(pack(part.gate, scheme), pack(part.up, scheme)))
        down.add(pack(part.down, scheme))
    whole = gate_up.finish(), down.finish()
    return Experts(*whole, _library(scheme, whole[0].device))


BACKEND = Backend(
    name="triton",
    hardware="an NVIDIA GPU with Triton (compute capability 8.0; 8.9 for FP8)",
    why="integer weights widened beside the tensor cores, FP8 and INT8 products in them; experts in two launches",
    takes=_takes,
    lacks=lacks,
    linear=_linear,
    experts=_experts,
    note=_note,
)
