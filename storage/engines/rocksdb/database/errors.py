"""RocksDB's errors as foldlog's.

The binding raises a bare Exception with RocksDB's message for everything. An exception of another
type is not RocksDB's: memory ran out, or a signal handler raised it. It is passed on as it is.
So each use of the binding that may fail is in a block of `translated`, or in hot paths has

    except Exception as error:
        if not is_rocksdbs(error):
            raise
        raise typed(error, path) from error
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

from foldlog.protocol.errors import (
    CorruptLogError,
    FoldlogError,
    InvalidFormatError,
    StoreClosed,
    StoreLocked,
)
from foldlog.storage.engines.rocksdb.database.holder import lock_holder

ABSENT = ("key not found",)
"""The arguments of the exception that reading an absent key through a snapshot raises."""
STALLED = "Write stall"

_ERRNOS = {os.strerror(number): number for number in errno.errorcode}
_UNSUPPORTED = re.compile(
    r"unsupported|not supported|not implemented|unknown footer version"
    r"|does not match existing comparator|column families not opened|unrecognized",
    re.IGNORECASE,
)
_FILE = re.compile(r"(/[^:\n]*?/(?:[0-9]{6,}\.(?:sst|log|blob)|MANIFEST-[0-9]+|CURRENT))")
_OFFSET = re.compile(r"offset (\d+)")


def is_stall(error: Exception) -> bool:
    """True if RocksDB refused a write because writers should wait. None of it was written."""
    return STALLED in str(error)


def is_rocksdbs(error: Exception) -> bool:
    """True for an error of RocksDB or its binding, False for one that only struck the thread."""
    return type(error) is Exception or type(error).__name__ == "DbClosedError"


def typed(error: Exception, path: Path, *, opening: bool = False) -> Exception:
    """The error to raise for one of RocksDB's. Its message decides the type.

    `opening`: treat a missing file as damage to the database.
    """
    words = str(error)
    if type(error).__name__ == "DbClosedError":
        return StoreClosed(f"{path} is closed")
    if "lock hold by current process" in words:
        return StoreLocked(path, os.getpid())
    if "While lock file" in words and "temporarily unavailable" in words:
        return StoreLocked(path, lock_holder(path))
    if _UNSUPPORTED.search(words):
        return InvalidFormatError(*_place(words, path), words)
    if "IO error: " in words and "Corruption" not in words:  # perhaps within another error
        return _io_error(words, path, opening)
    if "Corruption" in words or opening:
        return CorruptLogError(*_place(words, path), words)
    return FoldlogError(f"{path}: {words}")


class translated:
    """Raises RocksDB's errors in its block as what `translate` makes of them; others pass.

    Whoever keeps the error that it raises must not keep the database open, or a writer could not
    heal. So it never raises the error that it was given: its frame and the error would hold each
    other. It drops that error's traceback, whose frames have the database as an argument. Blocks
    for which a writer may heal have the database in no variable.
    """

    def __init__(self, translate: Callable[[Exception], Exception]) -> None:
        self._translate = translate

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        del traceback
        if isinstance(error, Exception) and is_rocksdbs(error):
            error.__traceback__ = None
            raise self._translate(error) from error


def _io_error(words: str, path: Path, opening: bool) -> Exception:
    """OSError with the operating system's errno, which RocksDB reports as text only."""
    tail = words.rsplit(": ", 1)[-1]
    number = _ERRNOS.get(tail, errno.EIO)
    if number == errno.ENOENT and opening:
        return CorruptLogError(*_place(words, path), words)
    return OSError(number, words, str(path))


def _place(words: str, path: Path) -> tuple[Path, int]:
    """The file and offset that a message names; else the database itself, and 0."""
    file, offset = _FILE.search(words), _OFFSET.search(words)
    return Path(file[1]) if file else path, int(offset[1]) if offset else 0
