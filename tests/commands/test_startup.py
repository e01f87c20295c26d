"""What reads headers starts at once: it imports none of the libraries that take seconds. Counted, not timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

TINY = ROOT / "examples" / "tiny-hunyuan"
# Each takes from a tenth of a second to some seconds.
SLOW = {
    *("torch", "numpy", "scipy", "transformers", "tokenizers", "compressed_tensors", "safetensors", "huggingface_hub"),
    *("datasets", "lm_eval", "matplotlib", "jinja2", "pyarrow", "pandas", "triton"),
}
SCRIPT = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
from quantkit.cli import main
main()
"""


def imported(*arguments: str | Path) -> tuple[set[str], str]:
    """The modules that a command has imported by its end, and what it printed."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # 1: an engine that does not load it
    return set(json.loads(done.stderr.splitlines()[-1])), done.stdout


@pytest.mark.parametrize("engine", [[], ["--engine", "vllm", "--tp", "8", "--ep"]], ids=["", "engine"])
def test_plan(engine: list[str]) -> None:
    modules, said = imported("plan", TINY, "--experts", "W4A16", "--attention", "W8A16", *engine)
    assert "W8A16" in said and not modules & SLOW


def test_inspect() -> None:
    modules, said = imported("inspect", TINY)
    assert "experts" in said and not modules & SLOW


def test_a_quantized_checkpoint(out: Path) -> None:
    modules, said = imported("inspect", out)
    assert "W8A16" in said and not modules & SLOW
    modules, said = imported("verify", out, "--engine", "vllm")
    assert "vllm" in said.lower() and not modules & SLOW


@pytest.mark.parametrize(
    "command", ["quantize", "plan", "sensitivity", "inspect", "eval", "report", "convert", "verify", "generate", "bench"]
)
def test_help(command: str) -> None:
    modules, said = imported(command, "--help")
    assert f"quantkit {command}" in said or f"{command} [OPTIONS]" in said
    assert not modules & SLOW


def test_the_slow_ones_would_be_seen() -> None:
    modules, _ = imported("inspect", TINY, "--kernels")
    assert "torch" in modules
