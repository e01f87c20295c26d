"""Triton where it is installed, and what every wrapper asks before a launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from quantkit.kernels.checks import check

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["OPTIONS", "available", "jit", "kernel_of", "machine", "on_device", "simulated", "tl"]


# Contraction of a * b + c as Triton has always done it; its default is about to change, with a warning until then.
OPTIONS = {"enable_fp_fusion": True}
MISSING = "this kernel needs Triton, which is not installed\nFix: pip install 'triton>=3.6' (Linux, with an NVIDIA GPU)"


class _Missing:
    """Stands for a kernel where Triton is not installed: a launch says how to get it."""

    def __getitem__(self, grid: object) -> NoReturn:
        raise ImportError(MISSING)


def available() -> bool:
    """Whether Triton is installed (a GPU is another question)."""
    return triton is not None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or a kernel that explains itself where Triton is absent."""
    return triton.jit(function) if triton is not None else _Missing()


def kernel_of(*varying: str) -> Callable[[Callable[..., Any]], Any]:
    """`jit` for a kernel that is not compiled anew for other values (1, multiples of 16) of these sizes."""
    if triton is None:
        return lambda function: _Missing()
    return lambda function: triton.jit(function, do_not_specialize=varying)


def simulated() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), which has no bfloat16 arithmetic."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def on_device(*tensors: Tensor | None) -> None:
    """Raises ValueError unless all tensors are contiguous, on one device, and that device can run a kernel; ImportError
    without Triton."""
    if not available():
        raise ImportError(MISSING)
    present = [t for t in tensors if t is not None]
    check(
        len({t.device for t in present}) == 1,
        f"tensors lie on {sorted({str(t.device) for t in present})}, not on one device",
    )
    check(all(t.is_contiguous() for t in present), "a tensor is not contiguous")
    check(present[0].is_cuda or simulated(), f"kernels run on a GPU, and the tensors lie on {present[0].device}")


def machine(device: torch.device) -> tuple[int, int]:
    """(Processors, bytes of shared memory a block may have) of a GPU; made up for the interpreter."""
    if device.type != "cuda":
        return 8, 227 * 1024
    properties = torch.cuda.get_device_properties(device)
    memory = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)  # not in torch's stubs
    return properties.multi_processor_count, int(memory)
