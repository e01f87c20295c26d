"""The device of these tests: the CPU in Triton's interpreter, else the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from quantkit.kernels.triton import lang


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where tensors are made unless told."""
    chosen = torch.device("cpu" if lang.simulated() else "cuda")
    torch.set_default_device(chosen)
    yield chosen
    torch.set_default_device(None)
