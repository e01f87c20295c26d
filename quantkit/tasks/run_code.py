"""HumanEval's and MBPP's verdict: run what a model wrote against the tests, in a Python process of its own.

This executes text from a model with the rights of the user. A process and a time limit are no sandbox; run it in a container
or a virtual machine. `quantkit eval` never comes here without --unsafe-code.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["humaneval", "mbpp", "passes"]

_SECONDS = 10


def passes(program: str) -> bool:
    """Whether a Python program reaches its end without an error within 10 s, in an empty folder, isolated from this
    environment. What it prints is thrown away."""
    token, quiet = secrets.token_hex(16), subprocess.DEVNULL
    with tempfile.TemporaryDirectory() as folder:
        work, reached = Path(folder, "work"), Path(folder, "reached")
        work.mkdir()
        # An exit code of 0 proves nothing: exit() before the tests gives it too. Only its last line does.
        last = f"__import__('pathlib').Path({str(reached)!r}).write_text({token!r})"
        try:
            command = [sys.executable, "-I", "-c", f"{program}\n{last}\n"]
            done = subprocess.run(
                command, cwd=work, env={}, timeout=_SECONDS, stdin=quiet, stdout=quiet, stderr=quiet, check=False
            )
        except (subprocess.TimeoutExpired, ValueError):  # ValueError: a null character cannot be passed on
            return False
        return done.returncode == 0 and reached.is_file() and reached.read_text("utf-8", errors="replace") == token


def humaneval(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(passes(program))}


def mbpp(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    tests = "\n".join(doc["test_list"])
    return {"pass@1": float(passes(f"{results[0]}\n{doc.get('test_setup_code', '')}\n{tests}\n"))}
