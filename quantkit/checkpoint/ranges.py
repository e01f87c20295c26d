"""Plain reads and writes of a range of an open file, where mapping it would end the process by SIGBUS when a disk fails."""

from __future__ import annotations

import os

__all__ = ["read_into", "write_from"]

_AT_ONCE = 1 << 30  # a system call moves less than 2 GiB


def read_into(handle: int, view: memoryview, start: int) -> int:
    """Fill `view` with the bytes from `start`; how many there were, fewer at the file's end. Raises OSError."""
    done = 0
    while done < len(view):
        got = os.preadv(handle, [view[done : done + _AT_ONCE]], start + done)
        if not got:
            break
        done += got
    return done


def write_from(handle: int, view: memoryview, start: int) -> None:
    """Write all of `view` at `start`. Raises OSError."""
    done = 0
    while done < len(view):
        done += os.pwrite(handle, view[done : done + _AT_ONCE], start + done)
