"""One writer per log: a lock on a file beside it, which also remembers how far the log was known to be synced.

The lock is the operating system's (`flock`), on `LOG.lock`, which is never renamed or removed: a lock on the log itself
would be lost when compaction replaces it. It goes with the process that holds it, however that ends. `fcntl` of the
standard library is used directly: the lock libraries tried truncate the file that they lock, and with it the note.

The note is one line of JSON: the holder's pid, and a watermark (log id, sequence, size) that is written after each sync. A log
that ends before its watermark was cut at the boundary of a frame, which nothing inside the log could show.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import weakref
from pathlib import Path
from typing import NamedTuple

from foldlog.protocol.errors import StoreLocked
from foldlog.storage.log.files import Files, Retiring, remove_quietly, write_all

_NOTE_BYTES = 256


class Watermark(NamedTuple):
    """What was on disk for certain, when the note was written."""

    log_id: bytes
    seq: int
    size: int


def beside(path: Path, suffix: str) -> Path:
    """The name of a companion of the log: LOG.suffix."""
    return path.with_name(f"{path.name}.{suffix}")


def temporary(path: Path) -> Path:
    """A name for a new file that is to take the log's place, or to become it."""
    return beside(path, "tmp-" + secrets.token_hex(4))


def sweep_temporaries(files: Files, path: Path) -> None:
    """Remove what rewrites of dead processes left. Only for the holder of the lock: nobody else may have any under way."""
    pattern = re.compile(re.escape(path.name) + r"\.tmp-[0-9a-f]{8}")
    fd = files.open_dir(path.parent)
    try:
        names = files.list_dir(fd)
    finally:
        files.close(fd)
    for name in filter(pattern.fullmatch, names):
        remove_quietly(files, path.with_name(name))


class Note(NamedTuple):
    """What the last writer left beside the log."""

    watermark: Watermark | None = None


def read_note(files: Files, path: Path) -> Note | None:
    """The note of the log at `path`, for those who only read: None if there is none, or none that
    is valid."""
    try:
        files.stat(beside(path, "lock"))  # most logs that are only read have none
        fd = files.open_read(beside(path, "lock"))
    except OSError:
        return None
    try:
        note = json.loads(files.read(fd, _NOTE_BYTES, 0))
    except (OSError, ValueError, RecursionError):
        return None
    finally:
        files.close(fd)
    return Note(_watermark(note)) if type(note) is dict else None


class WriterLock:
    """The right to write the log at `path`, until `release` or the end of the process."""

    def __init__(self, files: Files, path: Path) -> None:
        """Take the lock, at once. StoreLocked if somebody else has it."""
        self._files = files
        self._retiring: Retiring | None = None
        lock_path = beside(path, "lock")
        try:
            self._fd = files.create(lock_path, exclusive=True)
        except FileExistsError:
            self._fd = files.open_write(lock_path)
        try:
            note = self._read()
            if not files.lock(self._fd):
                pid = note.get("pid")
                raise StoreLocked(path, pid if type(pid) is int else None)
            self.watermark = _watermark(note)
            self.write(self.watermark)
            _held.add(self)
        except BaseException:
            files.close(self._fd)
            self._fd = -1
            raise

    def _read(self) -> dict[str, object]:
        try:
            note = json.loads(self._files.read(self._fd, _NOTE_BYTES, 0))
        except ValueError:  # empty, torn or foreign: a note is a help, not a truth
            return {}
        return note if type(note) is dict else {}

    def write(self, watermark: Watermark | None) -> None:
        """Note this process and the watermark. Best effort, not synced."""
        self.watermark = watermark
        note: dict[str, object] = {"pid": os.getpid()}
        if watermark is not None:
            note |= {"log_id": watermark.log_id.hex(), "seq": watermark.seq, "size": watermark.size}
        write_all(
            self._files, self._fd, json.dumps(note).ljust(_NOTE_BYTES - 1).encode() + b"\n", 0
        )

    def release(self) -> None:
        """Give the lock back. In a forked child, closes the child's copy only. Can be done again if it was interrupted."""
        if self._fd >= 0:
            if self._retiring is None:
                self._retiring = Retiring(self._files, self._fd)
            self._retiring.close()
            self._fd = -1


def _watermark(note: dict[str, object]) -> Watermark | None:
    log_id, seq, size = note.get("log_id"), note.get("seq"), note.get("size")
    if type(log_id) is not str or type(seq) is not int or type(size) is not int:
        return None
    try:
        return Watermark(bytes.fromhex(log_id), seq, size)
    except ValueError:
        return None


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # Close the child's copies, and do not unlock: an unlock through any copy would free the parent's lock. Left open, they
    # would hold the lock after the parent's death.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_after_fork_in_child)
