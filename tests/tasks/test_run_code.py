"""Generated code is run in a group of its own and within limits: programs that mean ill, beside harmless ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from quantkit.tasks import run_code
from quantkit.tasks.run_code import passes


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_code, "_SECONDS", 1)


def forked(target: Path, seconds: float, after: str) -> str:
    """A program whose child says that it is there, sleeps, and then writes a file. It waits until the child has begun."""
    child = (
        f"open('{target}.begun', 'w').close()\n    time.sleep({seconds})\n    open('{target}', 'w').close()\n    os._exit(0)"
    )
    waits = f"while not os.path.exists('{target}.begun'):\n    time.sleep(0.01)"
    return f"import os, time\nif os.fork() == 0:\n    {child}\n{waits}\n{after}"


@pytest.mark.parametrize(
    ("seconds", "after", "passed"), [(0.5, "", True), (0.5, "raise ValueError", False), (1.3, "time.sleep(60)", False)]
)
def test_a_child_is_killed_with_its_group(tmp_path: Path, hurry: None, seconds: float, after: str, passed: bool) -> None:
    """Where the program ends well, where it fails, and where its time is over."""
    target = tmp_path / "late"
    assert passes(forked(target, seconds, after)) is passed
    begun = Path(f"{target}.begun").stat().st_mtime
    time.sleep(max(0.0, begun + seconds + 0.2 - time.time()))
    assert not target.exists()


@pytest.mark.parametrize("loop", ["while True: pass", "while True: print('x' * 4096)", "import time; time.sleep(60)"])
def test_what_never_ends_is_ended(hurry: None, loop: str) -> None:
    begun = time.monotonic()
    assert not passes(loop) and time.monotonic() - begun < 5


def test_the_limit_of_processor_time_holds_without_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a child that has left the group: SIGKILL, not an exception that a program could catch."""
    monkeypatch.setitem(run_code._LIMITS, run_code.resource.RLIMIT_CPU, 1)
    begun = time.monotonic()
    assert not passes("while True:\n    try:\n        while True: pass\n    except BaseException: pass")
    assert time.monotonic() - begun < run_code._SECONDS


def test_memory_files_and_handles_are_bounded() -> None:
    assert passes("x = bytearray(1 << 28)") and not passes("x = bytearray(5 << 30)")
    written = "open('x', 'wb').write(bytes({} << 20))"
    assert passes(written.format(8)) and not passes(written.format(17))
    opened = "kept = [open('/dev/null') for _ in range({})]"
    assert passes(opened.format(64)) and not passes(opened.format(200))


def test_no_secret_of_the_environment_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert passes(
        "import os\nassert 'secret' not in str(dict(os.environ)), os.environ\nassert 'PYTHONPATH' not in os.environ"
    )
    inside = "import os, tempfile\nhere = os.getcwd()\nassert not os.listdir()\n"
    assert passes(inside + "assert os.path.expanduser('~') == here == tempfile.gettempdir()")


@pytest.mark.parametrize(
    "text", ["x = '\0'", "x = '\ud800'", "x = '" + "a" * 300_000 + "'", "from __future__ import annotations"]
)
def test_any_text_is_a_program_or_fails(text: str) -> None:
    """A null, half a surrogate pair, more than an argument holds; a line that must be a program's first."""
    assert passes(text) is (len(text) > 10)


@pytest.mark.parametrize(
    "end", ["exit()", "import os; os._exit(0)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"]
)
def test_to_end_early_is_not_to_pass(end: str) -> None:
    assert not passes(end)
