"""OUT.partial, where a job works until OUT is complete; when OUT is there already; what is kept of what failed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantkit.atomic import disk_errors, fsync_folder, sha256
from quantkit.checkpoint.folder import refuse_present
from quantkit.checkpoint.origin import RECORD
from quantkit.checkpoint.reader import load_json
from quantkit.checkpoint.verify import check_hashes
from quantkit.errors import CheckpointError, OutputError
from quantkit.job.journal import JOURNAL, LOCK

__all__ = [
    "RECORD",
    "WORK",
    "drop_orphans",
    "finished",
    "keep_failed",
    "made_by",
    "partial_of",
    "publish",
    "refuse_others",
    "set_aside_damaged",
    "shortage",
]

WORK = ".work"  # of OUT.partial: the journal, the lock, what is needed between units


def partial_of(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def refuse_others(target: Path) -> None:
    """As `refuse_present`, but an OUT that a job has recorded may yet prove to be this job's (`finished`)."""
    if _job(target) is None:
        refuse_present(target)


def made_by(target: Path, key: Mapping[str, str]) -> bool:
    """Whether OUT is there, made by this job. Raises OutputError when it is another's."""
    if os.path.lexists(target) and _job(target) != key:
        refuse_present(target)
    return os.path.lexists(target)


def finished(target: Path, key: Mapping[str, str]) -> dict[str, Any] | None:
    """What run.json says in an OUT that this very job has published: it was killed after that, or is repeated. None where
    there is no OUT. Raises OutputError when it is another's, or damaged."""
    if not made_by(target, key):
        return None
    problems: list[str] = []
    check_hashes(target, problems)
    if problems:
        problem = f"{target} exists: this command has made it, and since then {problems[0]}"
        raise OutputError(problem, "remove it, or choose another OUT")
    _clean(target)
    return load_json(target / RECORD)


def _job(target: Path) -> Any:
    try:
        return load_json(target / RECORD).get("job") if os.path.isfile(target / RECORD) else None
    except CheckpointError:
        return None


def shortage(target: Path, needed: int) -> str | None:
    """What to say where the disk lacks room for `needed` bytes, of which OUT.partial holds a part, or None."""
    partial = partial_of(target)
    folder = next(place for place in (partial, *partial.absolute().parents) if place.exists())
    present = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.exists() else 0
    missing, free = needed - present, shutil.disk_usage(folder).free
    return f"{folder} has {free:,} bytes free, and {missing:,} are needed" if free < missing else None


def drop_orphans(partial: Path, committed: Collection[str]) -> None:
    """Remove what a killed run left behind in OUT.partial and no journal line vouches for. committed: names of files for
    which one does."""
    work = partial / WORK
    for path in [*partial.iterdir(), *work.iterdir()]:
        if path == work or path.name in (JOURNAL, LOCK, *committed):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def set_aside_damaged(target: Path, hashes: Mapping[str, str]) -> list[str]:
    """Which of OUT.partial's files are not what was written (sha256 by name), in words; what is there of them is kept."""
    problems = []
    for name, digest in hashes.items():
        path = partial_of(target) / name
        if not os.path.lexists(path):
            problems.append(f"{path} is gone")
        elif path.is_symlink() or not path.is_file() or sha256(path) != digest:
            problems.append(f"{path} is no longer what was written, and is kept as {keep_failed(path, target)}")
    return problems


def keep_failed(path: Path, target: Path) -> Path:
    """Move a file or folder into OUT.failed, under a name that is free; the new path."""
    folder = target.with_name(target.name + ".failed")
    with disk_errors(folder):
        folder.mkdir(exist_ok=True)
        number, place = 1, folder / path.name
        while os.path.lexists(place):
            number, place = number + 1, folder / f"{path.name}.{number + 1}"
        os.rename(path, place)
        fsync_folder(folder)
        fsync_folder(path.absolute().parent)
    return place


def publish(partial: Path, target: Path) -> None:
    """Give the finished folder its name, and remove what the work needed."""
    with disk_errors(target):
        os.rename(partial, target)
        fsync_folder(target.absolute().parent)
    _clean(target)


def _clean(target: Path) -> None:
    """Open OUT to those to whom new folders are open here, and remove what the work needed. The same command, started once
    more by now, may be at it too."""
    work = target / WORK
    with suppress(OSError):  # OUT is complete: what cannot be tidied does not make it less so
        usual = work / "usual"
        usual.mkdir(exist_ok=True)
        os.chmod(target, os.stat(usual).st_mode & 0o777)
    shutil.rmtree(work, ignore_errors=True)
