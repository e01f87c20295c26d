"""Whether this machine can build the CPU kernels."""

from __future__ import annotations

import pytest

from quantkit.kernels.cpu import build

compiles = pytest.mark.skipif(
    bool(build.missing_cpu_flags()) or not build.shutil.which("g++"), reason="no g++, or a processor without AVX-512 BF16"
)
