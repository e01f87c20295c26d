"""The Triton kernels without a GPU: tests/gpu in the interpreter, in processes of their own, since
Triton reads TRITON_INTERPRET when it is imported; and what can be said where there is no Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from quantkit.kernels.triton import lang, ops
from quantkit.kernels.triton.layout import pack
from quantkit.scheme import PRESETS
from tests.helpers.kernels import random_weight
from tests.helpers.paths import ROOT

GROUPS = ("kernels", "benches"), ("model",), ("attention", "graphs")
FULL = [pytest.param(files, marks=pytest.mark.slow) for files in GROUPS]


@pytest.mark.parametrize("files", [("smoke",), *FULL], ids="-".join)
def test_in_interpreter(files: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [f"tests/gpu/{name}.py" for name in files]
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["TRITON_INTERPRET"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


def test_without_gpu_or_triton_one_message() -> None:
    if lang.simulated():
        pytest.skip("runs where the interpreter is off")
    scheme = PRESETS["W4A16"]
    expected = ValueError if lang.available() else ImportError
    with pytest.raises(expected, match="run on a GPU|pip install"):
        ops.linear(torch.zeros(1, 128, dtype=torch.bfloat16), pack(random_weight(16, 128, scheme), scheme))


def test_import_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None\nfrom quantkit.kernels.triton import compile, serve, weight_only\n"
    code += "try:\n    weight_only.kernel[(1,)]()\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert "pip install" in done.stdout


def test_choosing_a_kernel_on_the_cpu_does_not_import_triton() -> None:
    code = "import sys, torch\nfrom quantkit.kernels import dispatch\nfrom quantkit.scheme import PRESETS\n"
    code += "choice = dispatch.choose(PRESETS['W4A16'], (64, 128), torch.device('cpu'))\n"
    code += "print(choice.kernel, 'triton' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    assert done.stdout.split()[1] == "False" and done.stdout.split()[0] != "triton"
