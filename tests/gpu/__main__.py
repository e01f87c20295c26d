"""`make gpu-test`: every kernel test on this machine's GPU, or one sentence why that cannot be."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from quantkit.kernels.triton.backend import capability_of

FILES = ("kernels.py", "benches.py", "model.py", "shapes.py")


def missing() -> str | None:
    """Why there is nothing to test on, or None."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA, so it sees no GPU.\n"
            "Fix: on a machine with an NVIDIA GPU, make clean && make gpu-test"
        )
    if capability_of(torch.device("cuda")) is None:
        return "torch sees no NVIDIA GPU.\nFix: run this on a machine that has one, and check nvidia-smi"
    return None if find_spec("triton") else "Triton is not installed.\nFix: pip install 'quantkit[gpu]'"


def main() -> int:
    if reason := missing():
        print(f"gpu-test needs an NVIDIA GPU: {reason}", file=sys.stderr)
        return 2
    print(f"on {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    folder = Path(__file__).parent
    return int(pytest.main(["-p", "no:xdist", "--durations=10", *(str(folder / name) for name in FILES), *sys.argv[1:]]))


if __name__ == "__main__":
    sys.exit(main())
