"""Kill `quantkit quantize` at any moment; the same command must finish with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quantkit.errors import OutputError
from quantkit.job import pipeline
from quantkit.recipe import Recipe
from tests.conftest import SMALL

# Forks a child per attempt from one process that has imported everything, so that a kill costs no import.
CHILD = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
from quantkit.job import pipeline
from quantkit.recipe import Recipe
import compressed_tensors.quantization
model, recipe = sys.argv[1], Recipe(**json.loads(sys.argv[2]))
print("ready", flush=True)
for line in sys.stdin:  # OUT, and the delay in seconds after which to be killed, or 'run'
    out, order = json.loads(line)
    child = os.fork()
    if child == 0:
        pipeline.quantize(model, out, recipe)
        os._exit(0)
    if order != "run":
        time.sleep(order)
        os.kill(child, 9)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


class Runner:
    def __init__(self, model: Path, recipe: Recipe) -> None:
        arguments = [sys.executable, "-c", CHILD, str(model), recipe.model_dump_json()]
        self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout and self.process.stdout.readline() == "ready\n"

    def __call__(self, out: Path, order: str | float) -> int:
        """The status of a run into OUT, which is killed after so many seconds if it is not told to 'run'."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(out), order]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@pytest.mark.parametrize(("attempts", "finishing"), [(1, 1.0), pytest.param(2, 0.2, marks=pytest.mark.slow)])
def test_killed_at_random_and_resumed(attempts: int, finishing: float, model: Path, tmp_path: Path) -> None:
    """Each attempt is killed twice at least, and then again and again until it is let finish."""
    recipe = Recipe(experts="W4A16", attention="FP8", **SMALL)
    runner = Runner(model, recipe)
    begun = time.monotonic()
    assert runner(tmp_path / "a", "run") == 0
    duration = time.monotonic() - begun
    expected = (tmp_path / "a" / "SHA256SUMS").read_bytes()
    dice, kills, resumed = random.Random(0), 0, set()
    for attempt in range(attempts):
        out, killed = tmp_path / f"b{attempt}", 0
        while not out.exists():
            # Mostly short, to hit every stage; sometimes to the end, so that it gets on.
            finish = killed >= 2 and resumed and dice.random() < finishing
            status = runner(out, "run" if finish else dice.uniform(0.02, 0.7) * duration)
            assert status in (0, signal.SIGKILL)
            if status == 0 and killed < 2:  # the machine has become faster than it was: aim earlier, begin anew
                shutil.rmtree(out)
                duration /= 2
                continue
            killed += not out.exists()
            if not out.exists() and (journal := out.with_name(out.name + ".partial") / ".work" / "journal").exists():
                resumed.add(journal.read_bytes().count(b"\n"))
                if dice.random() < 0.3:  # a torn tail, as a power cut may leave
                    with open(journal, "ab") as file:
                        file.write(os.urandom(7))
        kills += killed
        assert (out / "SHA256SUMS").read_bytes() == expected
        assert json.loads((out / "run.json").read_text())["linears"].keys()
        assert {p.name for p in out.iterdir()} - {".work"} == {p.name for p in (tmp_path / "a").iterdir()}
    runner.close()
    assert kills >= 2 and resumed  # jobs were really interrupted, and went on from a journal


# Kills itself before the n-th operation on a file of OUT or OUT.partial; prints how many there were.
AT = """
import os, sys
from quantkit.job import pipeline
from quantkit.recipe import Recipe
import compressed_tensors.quantization
model, out = sys.argv[1:]

def count(kill_at):
    reached = 0
    def hook(event, arguments):
        nonlocal reached
        names = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")
        if event in names and (out in str(arguments[0]) or event in ("os.remove", "os.rmdir")):  # rmtree names no folder
            reached += 1
            if reached == kill_at:
                os.kill(os.getpid(), 9)
    sys.addaudithook(hook)
    pipeline.quantize(model, out, Recipe(scheme="W8A16", group_size=32))
    return reached

print("ready", flush=True)
for line in sys.stdin:
    if (child := os.fork()) == 0:
        found = count(int(line))
        print(found, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print("done", flush=True)
"""


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_killed_before_any_operation_on_a_file(step: int, model: Path, tmp_path: Path) -> None:
    """The last ones, where OUT is published, each (or every fourth), and some of those before."""
    command, out = [sys.executable, "-c", AT, str(model), str(tmp_path / "out")], tmp_path / "out"
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout and process.stdout.readline() == "ready\n"

    def run(kill_at: int) -> int | None:
        """How many operations there were; None when it was killed."""
        assert process.stdin and process.stdout
        process.stdin.write(f"{kill_at}\n")
        process.stdin.flush()
        said = process.stdout.readline()
        return None if said == "done\n" else int(said) if process.stdout.readline() else None

    total = run(0)
    assert total and total > 50
    expected, names, mode = (out / "SHA256SUMS").read_bytes(), sorted(os.listdir(out)), os.stat(out).st_mode
    last, published = range(total - 8, total + 1, step), 0
    for at in [*range(2, total - 8, 40 * step), *last]:
        shutil.rmtree(out)
        assert run(at) is None
        published += out.exists()
        assert run(0) is not None, f"killed before operation {at}, it does not resume"
        assert (out / "SHA256SUMS").read_bytes() == expected and sorted(os.listdir(out)) == names
        assert os.stat(out).st_mode == mode and sorted(os.listdir(tmp_path)) == ["model", "out"]
    assert len(last) / 3 <= published < len(last)
    process.stdin.close()
    process.wait()


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_interrupted_and_resumed(stop_after: int, model: Path, tmp_path: Path) -> None:
    recipe, out = Recipe(scheme="W4A16", **SMALL), tmp_path / "out"
    whole = pipeline.quantize(model, tmp_path / "whole", recipe)

    def stop(step: pipeline.Step) -> None:
        if step.layer == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(model, out, recipe, progress=stop)
    assert not out.exists() and (tmp_path / "out.partial").exists()
    with pytest.raises(OutputError, match="another job; these differ:\n  recipe.seed: 0 there, 1 here\n  tokens"):
        pipeline.quantize(model, out, Recipe(**{**SMALL, "scheme": "W4A16", "seed": 1}))
    record = pipeline.quantize(model, out, recipe)
    assert record["resumed_at_unit"] == {0: 1, 1: 1, 3: 2}[stop_after]
    assert record["linears"] == whole["linears"]
    assert (out / "SHA256SUMS").read_bytes() == (tmp_path / "whole" / "SHA256SUMS").read_bytes()


def test_two_at_once(model: Path, tmp_path: Path) -> None:
    """The second process is told so, and the first is not disturbed."""

    def second(step: pipeline.Step) -> None:
        if step.layer == 0:
            command = [sys.executable, "-m", "quantkit.cli", "quantize", str(model), "-o", str(tmp_path / "out")]
            options = ["--samples", "8", "--seq-len", "64", "--group-size", "32"]
            result = subprocess.run([*command, *options], capture_output=True, text=True)
            assert result.returncode == 2 and "is being written by another process" in result.stderr, result.stderr

    pipeline.quantize(model, tmp_path / "out", Recipe(scheme="W4A16", **SMALL), progress=second)


def test_ctrl_c_leaves_no_output(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quantkit.cli", "quantize", str(model), "-o", str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, *["--group-size", "32", "--samples", "64", "--seq-len", "128"]],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stderr
    process.stderr.readline()  # the first layer is done
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait() == 130 and "Traceback" not in rest and "resume" in rest
    assert not (tmp_path / "out").exists()
