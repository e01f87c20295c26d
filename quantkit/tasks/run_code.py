"""HumanEval's and MBPP's verdict: run what a model wrote against the tests, in a process group of its own, within limits.

This executes text from a model with the rights of the user. A group and limits are no sandbox: such a program reads what the
user may read, reaches the network, and may leave its group. Run it in a container or a virtual machine. `quantkit eval`
never comes here without --unsafe-code.

lm-evaluation-harness's own evaluator (`code_eval` of the package evaluate) is not used for these two: its metric is a script
that is fetched from the hub and run, it hands on the environment, and what its process has forked outlives it.
"""

from __future__ import annotations

import os
import resource
import secrets
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["humaneval", "mbpp", "passes"]

_SECONDS = 10
# Of each process: seconds of a processor, address space, the largest file, open files. No core is dumped.
_LIMITS = {
    resource.RLIMIT_CPU: _SECONDS,
    resource.RLIMIT_AS: 4 << 30,
    resource.RLIMIT_FSIZE: 16 << 20,
    resource.RLIMIT_NOFILE: 128,
    resource.RLIMIT_CORE: 0,
}
# An interpreter that takes on the limits, then becomes the program's: setting them between fork and exec (`preexec_fn`) can
# hang where threads run, as torch's do.
_LIMITED = """
import os, resource, sys
for pair in sys.argv[2].split(","):
    kind, value = map(int, pair.split("="))
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))
os.execv(sys.executable, [sys.executable, "-I", sys.argv[1]])
"""


def passes(program: str) -> bool:
    """Whether a Python program reaches its end without an error within 10 s and `_LIMITS`, in an empty folder, isolated from
    this environment. What it prints is thrown away, and what it has started is killed."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="quantkit-code-", ignore_cleanup_errors=True) as folder:
        work, file, reached = Path(folder, "work"), Path(folder, "program.py"), Path(folder, "reached")
        work.mkdir()
        # An exit code of 0 proves nothing: exit() before the tests gives it too. Only its last line does.
        last = f"__import__('pathlib').Path({str(reached)!r}).write_text({token!r})"
        file.write_bytes(f"{program}\n{last}\n".encode("utf-8", "surrogatepass"))
        done = _run(file, work)
        return done and reached.is_file() and reached.read_text("utf-8", errors="replace") == token


def _run(file: Path, work: Path) -> bool:
    """Whether a program's process ended in time with exit code 0. Whatever is left of its group is killed."""
    limits = ",".join(f"{kind}={value}" for kind, value in _LIMITS.items())
    command = [sys.executable, "-I", "-S", "-c", _LIMITED, str(file), limits]
    environment, quiet = {"HOME": str(work), "TMPDIR": str(work)}, subprocess.DEVNULL
    process = subprocess.Popen(
        command, cwd=work, env=environment, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
    )
    try:
        # Waiting without reaping: until then the group's number belongs to nobody else.
        watched = os.pidfd_open(process.pid)
        try:
            ended = bool(select.select([watched], [], [], _SECONDS)[0])
        finally:
            os.close(watched)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
    return ended and code == 0


def humaneval(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(passes(program))}


def mbpp(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    tests = "\n".join(doc["test_list"])
    return {"pass@1": float(passes(f"{results[0]}\n{doc.get('test_setup_code', '')}\n{tests}\n"))}
