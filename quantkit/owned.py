"""What on disk only this user can have written. A job trusts no folder, and runs no library, that another could change."""

from __future__ import annotations

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

__all__ = ["distrust", "make_private", "no_links"]

_OTHERS = stat.S_IWGRP | stat.S_IWOTH


def distrust(path: Path) -> str | None:
    """Why the folder or file at `path` may not be what this user has left there: it is a link, it belongs to another user,
    or others may write to it. None where it is to be trusted. Raises OSError when it is not there."""
    info = os.lstat(path)
    if stat.S_ISLNK(info.st_mode):
        return f"{path} is a symbolic link"
    if info.st_uid == os.geteuid() and not info.st_mode & _OTHERS:
        return None
    owner, others = _shown(path.parent)
    if info.st_uid != owner:
        return f"{path} belongs to another user (uid {info.st_uid})"
    return f"others may write to {path}" if info.st_mode & _OTHERS & ~others else None


def _shown(folder: Path) -> tuple[int, int]:
    """Owner, and write bits for others, that this file system shows of a private folder: some shares and FAT know none."""
    try:
        with tempfile.TemporaryDirectory(prefix=".owner-", dir=folder) as fresh:
            info = os.lstat(fresh)
    except OSError:
        return os.geteuid(), 0
    return info.st_uid, info.st_mode & _OTHERS


def make_private(folder: Path) -> str | None:
    """Make a folder for this user alone (its parents as usual), unless it is there. Why it may not be trusted, or None.
    Raises OSError when it cannot be made."""
    with suppress(FileExistsError):
        folder.mkdir(0o700, parents=True)
    return distrust(folder) or (None if folder.is_dir() else f"{folder} is no folder")


def no_links(path: str, flags: int) -> int:
    """An opener for `open`: the file itself and never what a link points to, for this user alone."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
