"""HumanEval's and MBPP's verdict: run what a model wrote against the tests, in a Python process of its own.

This executes text from a model with the rights of the user. A process and a time limit are no sandbox; run it in a container
or a virtual machine. `quantkit eval` never comes here without --unsafe-code.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

__all__ = ["humaneval", "mbpp", "passes"]

_SECONDS = 10


def passes(program: str) -> bool:
    """Whether a Python program ends without an error within 10 s, in an empty folder, isolated from this environment."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = [sys.executable, "-I", "-c", program]
            done = subprocess.run(
                command, cwd=folder, env={}, timeout=_SECONDS, stdin=subprocess.DEVNULL, capture_output=True, check=False
            )
        except (subprocess.TimeoutExpired, ValueError):  # ValueError: a null character cannot be passed on
            return False
    return done.returncode == 0


def humaneval(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(passes(program))}


def mbpp(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    tests = "\n".join(doc["test_list"])
    return {"pass@1": float(passes(f"{results[0]}\n{doc.get('test_setup_code', '')}\n{tests}\n"))}
