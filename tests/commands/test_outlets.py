"""Where results and messages go: a full disk under standard error changes no verdict, a user's own files stay."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit.cli import main
from quantkit.kernels.cpu import build
from tests.helpers.compiler import compiles

SHORT = ("--seq-len", "32", "--windows", "2", "--samples", "0", "--text")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full, of Linux")
def test_a_full_disk_under_standard_error_changes_no_exit_code(model: Path, tmp_path: Path) -> None:
    """Each begins with an error or progress that cannot be written; 1 would be a verdict."""
    done = ("quantize", str(model), "-o", str(tmp_path / "out"), "--method", "rtn", "--group-size", "32")
    cases = [(("inspect", str(tmp_path / "none")), 2), (("no-such-command",), 2), (done, 0)]
    for arguments, code in cases:
        with open("/dev/full", "w") as full:
            found = subprocess.run([sys.executable, "-m", "quantkit.cli", *arguments], stdout=subprocess.PIPE, stderr=full)
        assert found.returncode == code, arguments
    assert (tmp_path / "out" / "SHA256SUMS").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full, of Linux")
@pytest.mark.parametrize("arguments", [("--help",), ("inspect", "MODEL")])
def test_results_that_cannot_be_written_are_an_error(arguments: tuple[str, ...], model: Path) -> None:
    given = [str(model) if argument == "MODEL" else argument for argument in arguments]
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            [sys.executable, "-m", "quantkit.cli", *given], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert found.returncode == 2 and "No space left" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize("name", ["report.html", "report.md", "report.json", "report.previous.json", "items.jsonl"])
@pytest.mark.parametrize("content", ['{"my": "own"}\n', "# My own page\n", ""])
def test_eval_leaves_files_alone_that_it_has_not_written(
    name: str, content: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    result = CliRunner().invoke(main, ["eval", str(pair[0]), "--baseline", str(pair[1]), "--save", str(tmp_path)])
    assert result.exit_code == 2 and f"{tmp_path / name} is there and no evaluation" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == content


def test_eval_replaces_what_it_has_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 9)
    command = ["eval", str(pair[0]), "--baseline", str(pair[1]), "--save", str(tmp_path), *SHORT, str(tmp_path / "text.txt")]
    for _ in range(3):
        result = CliRunner().invoke(main, command, catch_exceptions=False)
        assert result.exit_code == 0, result.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"text.txt", "report.html", "report.md", "report.json", "report.previous.json"}
    (tmp_path / "own.md").write_text("# My own page\n")
    result = CliRunner().invoke(main, ["report", str(tmp_path), "-o", str(tmp_path / "own.html")])
    assert result.exit_code == 2 and (tmp_path / "own.md").read_text() == "# My own page\n"


@compiles
def test_a_library_that_others_could_have_put_there_is_not_run(tmp_path: Path) -> None:
    (source := tmp_path / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
    before = os.umask(0o002)  # with which g++ and mkdir let the group write
    try:
        path, reason = build.build(tmp_path / "cache", source=source)
    finally:
        os.umask(before)
    assert path and not reason
    for place in (path, path.parent, tmp_path / "cache"):
        os.chmod(place, 0o770)
        found, reason = build.build(tmp_path / "cache", source=source)
        assert found is None and f"others may write to {place}" in reason
        os.chmod(place, 0o700)
    other = path.rename(tmp_path / "other.so")
    path.symlink_to(other)
    assert "is a symbolic link" in build.build(tmp_path / "cache", source=source)[1]
    path.unlink()
    other.rename(path)
    assert build.build(tmp_path / "cache", source=source) == (path, "")


def test_a_request_to_end_leaves_no_temporary_files(model: Path, tmp_path: Path) -> None:
    """`timeout` and schedulers send SIGTERM."""
    script = """
import os, signal, sys
from pathlib import Path
from quantkit.calib.lockstep import Track
from quantkit.cli import main

def done(self, layer):
    assert list(Path(os.environ["TMPDIR"]).glob("quantkit-eval-*"))
    os.kill(os.getpid(), signal.SIGTERM)

Track.done = done
main()
"""
    arguments = ["eval", str(model), "--baseline", str(model), "--windows", "2", "--seq-len", "32", "--samples", "0"]
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    command = [sys.executable, "-c", script, *arguments, "--save", str(tmp_path / "saved")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 128 + 15, ended.stderr
    assert not list((tmp_path / "tmp").glob("quantkit-eval-*"))
