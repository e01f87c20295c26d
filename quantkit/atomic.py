"""Writing files so that a name never points at something half written, even across a crash."""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantkit.errors import CheckpointError, OutputError, shown

__all__ = ["disk_errors", "fsync_folder", "sha256", "temporary_name", "unreadable", "write_bytes"]


@contextmanager
def disk_errors(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn what a full, read-only, forbidden or failing disk says into one OutputError that names the path."""
    fixes = {
        errno.ENOSPC: "free space and repeat the command; it resumes",
        errno.EDQUOT: "free quota and repeat the command; it resumes",
        errno.EROFS: "choose an output on a writable disk",
        errno.EACCES: "choose an output folder you may write to",
        errno.EPERM: "choose an output folder you may write to",
        errno.ENOTDIR: "choose an output whose parent is a folder",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.EEXIST: "remove it, or choose another OUT",
        errno.ENOTEMPTY: "remove it, or choose another OUT",
        errno.ELOOP: "remove the link that lies there",
        errno.EIO: "check the disk, and repeat the command; it resumes",
        errno.EMFILE: "allow this process more open files (ulimit -n), and repeat the command; it resumes",
        errno.ENOMEM: "free memory, and repeat the command; it resumes",
        errno.EFBIG: "choose a file system (or a limit) that allows files of this size",
    }
    try:
        yield
    except OSError as error:
        if error.errno not in fixes:
            raise
        raise OutputError(f"cannot {doing} {path}: {error.strerror}", fixes[error.errno]) from error


def fsync_folder(folder: Path) -> None:
    """Make renames and new names in this folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody else has: process ids are the same in different containers."""
    return path.with_name(f".quantkit-{secrets.token_hex(8)}.tmp")


def write_bytes(path: Path, data: bytes) -> None:
    """Create or replace a whole file: temporary name, fsync, rename, fsync of the folder."""
    temporary = temporary_name(path)
    with disk_errors(path):
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            fsync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """What the system says of a file that it does not give."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return CheckpointError(
        f"{shown(path)} cannot be read: {reason}", "check the file, its disk, and this process's limits (ulimit -a)"
    )


def sha256(path: Path) -> str:
    """The digest of a file's bytes. Raises CheckpointError when they cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from error
