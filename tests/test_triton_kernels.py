"""Runs tests/interpreted_kernels.py in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantkit.kernels.triton import lang, w4a16
from quantkit.kernels.triton.layout import pack4
from tests.kernel_helpers import weight4

ROOT = Path(__file__).resolve().parent.parent


def test_in_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "tests/interpreted_kernels.py"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


def test_without_gpu_or_triton_one_message() -> None:
    if lang.simulated():
        pytest.skip("runs where the interpreter is off")
    expected = ValueError if lang.available() else ImportError
    with pytest.raises(expected, match="run on a GPU|pip install"):
        w4a16.linear(torch.zeros(1, 128, dtype=torch.bfloat16), pack4(weight4(16, 128, 128, True)))


def test_import_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None\nfrom quantkit.kernels.triton import compile, moe_w8a8, moe_w4a16\n"
    code += "try:\n    moe_w4a16.gate_up_kernel[(1,)]()\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "pip install" in done.stdout
