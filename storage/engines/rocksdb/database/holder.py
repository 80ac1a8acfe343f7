"""Which process has a database open, if the operating system can tell."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
from pathlib import Path

_FLOCK = struct.Struct("hhqqi4x")  # type, whence, start, length, pid: struct flock of 64-bit Linux


def lock_holder(path: Path) -> int | None:
    """The pid of the process that holds RocksDB's lock on the database at `path`.

    None if it is unknown. Not for a database that this process itself has open: closing any
    descriptor of a file drops all POSIX locks that the process holds on it.
    """
    if not sys.platform.startswith("linux") or struct.calcsize("P") != 8:
        return None
    try:
        fd = os.open(path / "LOCK", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
    except OSError:
        return None
    finally:
        os.close(fd)
    return None if kind == fcntl.F_UNLCK or pid <= 0 else int(pid)
