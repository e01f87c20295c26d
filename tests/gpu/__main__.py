"""`make gpu-test`: every kernel test on this machine's GPU, or one sentence why that cannot be."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from quantkit.kernels.triton.backend import capability_of

FILES = ("smoke.py", "kernels.py", "attention.py", "graphs.py", "benches.py", "model.py", "shapes.py")


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
    """Each file in a process of its own, since an illegal access spoils its process's CUDA context. Arguments: files of
    FILES, and what goes to pytest."""
    if reason := missing():
        print(f"gpu-test needs an NVIDIA GPU: {reason}", file=sys.stderr)
        return 2
    print(f"on {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    folder, failed = Path(__file__).parent, []
    named = [name for name in sys.argv[1:] if name in FILES]
    rest = [argument for argument in sys.argv[1:] if argument not in FILES]
    for name in named or FILES:
        command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-v", "--tb=short", "--durations=5", str(folder / name)]
        if subprocess.run([*command, *rest], check=False).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
