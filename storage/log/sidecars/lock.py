"""One writer per log: a lock file beside it, and a note of how far the log is known to be synced.

The lock is an `flock` on `LOG.foldlog-lock`. That file is never renamed, and is removed only by an
open that created it and then failed. A lock on the log itself would be lost when a compaction
replaces the log. The lock ends with the process that holds it, however that ends. Only those who
may write the log can open the lock file, so that nobody else can lock a writer out.

The note, `LOG.foldlog-note`, can be read by all who can read the log; its bytes are in `note.py`.
A log that ends before the note's watermark was cut at a frame boundary, which nothing inside the
log can show.

Another program may have taken these names, with a file, a link or a pipe. What is not foldlog's own
raises ForeignFileError and is not written to; no link is followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import random
import re
import secrets
import struct
import sys
import time
from pathlib import Path
from typing import NamedTuple

from foldlog.protocol.errors import (
    ForeignFileError,
    LogChangedError,
    StoreLocked,
    drop_system_errors,
    is_from_system,
)
from foldlog.storage.forks import Rank, tell_after_fork
from foldlog.storage.log.access import share
from foldlog.storage.log.files import Access, Files, Retiring, write_all
from foldlog.storage.log.sidecars.note import (
    LOCK_BYTES,
    LOCK_MAGIC,
    NOTE_BYTES,
    NOTE_MAGIC,
    SLOT_BYTES,
    Note,
    Watermark,
    describe_holder,
    is_own,
    pack_slot,
    parse_note,
    this_process,
)

_NOT_REGULAR = {
    errno.ELOOP: "is a link",
    errno.EMLINK: "is a link",
    errno.EISDIR: "is a directory",
    errno.ENXIO: "is a socket, or a device without a driver",
    errno.EINVAL: "is not a regular file",
}
_NO_NOTE = (
    *_NOT_REGULAR,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.EACCES,
    errno.EPERM,
)
"""Errors of opening a note that will not go away: for this reader, there is none."""
_READER_WAIT_S = 0.25
_OPENER_WAIT_S = 1.0
_LONG = struct.Struct("@l")
_FS_IOC_GETVERSION = 0x80007601 | _LONG.size << 16  # the kernel fills in 32 bits
_PRIVATE = 0o600


def beside(path: Path, suffix: str) -> Path:
    """The path of a file beside the log: LOG.suffix."""
    return path.with_name(f"{path.name}.{suffix}")


def lock_path(path: Path) -> Path:
    """The lock file of the log at `path`."""
    return beside(path, "foldlog-lock")


def note_path(path: Path) -> Path:
    """The note of the log at `path`."""
    return beside(path, "foldlog-note")


def temporary(path: Path) -> Path:
    """A name for a new file that is to become the log, or to replace it."""
    return beside(path, "tmp-" + secrets.token_hex(4))


def sweep_temporaries(files: Files, path: Path, beginnings: tuple[bytes, ...]) -> None:
    """Remove temporary files that rewrites of dead processes left.

    Call it only with the lock held, so that no rewrite is under way. Removes only regular files
    that are empty, or begin as a log does: with one of `beginnings`, or with zeros.
    """
    pattern = re.compile(re.escape(path.name) + r"\.tmp-[0-9a-f]{8}")
    fd = files.open_dir(path.parent)
    try:
        names = files.list_dir(fd)
    finally:
        files.close(fd)
    for name in filter(pattern.fullmatch, names):
        with drop_system_errors():
            if _begins_with(files, path.with_name(name), beginnings):
                files.unlink(path.with_name(name))


def _begins_with(files: Files, path: Path, beginnings: tuple[bytes, ...]) -> bool:
    fd = files.open_side(path)
    try:
        raw = files.read(fd, max(map(len, beginnings)), 0)
    finally:
        files.close(fd)
    return not raw.strip(b"\0") or raw.startswith(beginnings)


def read_note(files: Files, path: Path) -> Note | None:
    """The note of the log at `path`, for readers. None if there is none that may be read, or it is
    not valid. OSError if it cannot be read just now.

    None also for a note that was copied with its directory: it describes the original log.
    """
    try:
        files.stat(note_path(path))  # most logs that are only read have none
        fd = files.open_read(note_path(path))
    except OSError as error:
        if error.errno in _NO_NOTE:
            return None
        raise
    try:
        note = parse_note(files.read(fd, NOTE_BYTES, 0))
        return note if note is not None and note.inode == inode_of(files, fd) else None
    finally:
        files.close(fd)


class Writing(NamedTuple):
    """Whether a log has a writer."""

    locked: bool | None
    """None if that is not known."""
    pid: int | None
    """Of the writer, if that is known and its pid means the same process here."""
    holder: str
    """The writer in words, if it is known but `pid` is not; else ""."""


def writer_of(files: Files, path: Path) -> Writing:
    """Whether a writer has the log at `path` open, and which.

    Takes no lock on systems that can tell without one. Elsewhere it takes a shared lock and
    releases it within microseconds; a writer that opens the log meanwhile waits for that.
    """
    try:
        fd = files.open_side(note_path(path))
    except FileNotFoundError:  # no writer has ever been here, or the note was deleted
        lock = lock_path(path)
        return Writing(files.exists(lock) and _is_locked(files, lock), None, "")
    except OSError as error:
        if not is_from_system(error):
            raise
        return Writing(None, None, "")
    try:
        held = files.marked(fd)
        if held is None:
            held = _is_locked(files, lock_path(path))
        if not held:
            return Writing(held, None, "")
        note = parse_note(files.read(fd, NOTE_BYTES, 0))
        return Writing(True, *describe_holder(note and note.holder, this_process()))
    except OSError as error:
        if not is_from_system(error):
            raise
        return Writing(None, None, "")
    finally:
        files.close(fd)


def _is_locked(files: Files, path: Path) -> bool | None:
    try:
        fd = files.open_side(path)
    except OSError as error:
        if not is_from_system(error):
            raise
        return None
    try:
        return not files.lock(fd, shared=True)
    finally:
        files.close(fd)


def lock_log(files: Files, fd: int) -> bool:
    """Lock a log file itself, against writers that open it by another name. False if one has it.

    Anyone who may read a log can hold a shared lock on it. That does not keep a writer out, unless
    the file really has another name.
    """
    return files.lock(fd) or (files.fstat(fd).st_nlink == 1 and files.lock(fd, shared=True))


class WriterLock:
    """The right to write the log at `path`, until `release` or the end of the process."""

    _fd = _note_fd = -1

    def __init__(self, files: Files, path: Path) -> None:
        """Take the lock without waiting for another writer.

        StoreLocked if one has it; ForeignFileError if another program's file has the lock's or the
        note's name.
        """
        self._files, self.path = files, path
        self._log_access: Access | None = None
        self._made: list[tuple[Path, int]] = []
        """(path, descriptor) of files created here, to be removed if the open fails."""
        self._retiring: list[Retiring] = []
        self._counter = itertools.count(1)
        self.directory = _identity(files.stat(path.parent))
        """(device, inode) of the log's directory."""
        self.copied = False
        """True if the note is a copy: the directory was copied, perhaps during a write."""
        try:
            self._take()
            found = self._open_note()
            # Replaced whole, by any thread. Until `keep`, only the holder of a copied note changes.
            self._note = Note(this_process(), self._note_inode)
            if found is not None:
                self.copied = found.inode != self._note_inode
                self._counter = itertools.count(found.counter + 1)
                self._note = found._replace(holder=self._note.holder)
            self._write_note()
            tell_after_fork(self, Rank.LOCK)
        except BaseException:
            self.release()
            raise

    @property
    def watermark(self) -> Watermark | None:
        """The note's watermark: this log's, unless the note is `copied`."""
        return self._note.watermark

    def is_poisoned(self, inode: int) -> bool:
        """True if an fsync of the log file with this inode failed in an earlier process."""
        return not self.copied and self._note.poisoned == inode

    def write(self, watermark: Watermark | None) -> None:
        """Write this process and `watermark` to the note. Not synced."""
        self._note = self._note._replace(watermark=watermark)
        self._write_note()

    def write_poison(self, inode: int | None) -> None:
        """Note that an fsync of the log file with this inode failed; None clears that."""
        self._note = self._note._replace(poisoned=inode)
        self._write_note()

    def keep(self, log_fd: int) -> None:
        """The log is open: keep the files created beside it, and adopt a copied note.

        Gives those who may use the log access to the lock and the note, as far as permitted.
        """
        self._log_access = self._files.access(log_fd)
        self._share()
        if self.copied:
            self._note = Note(self._note.holder, self._note_inode)
            self._write_note()
            self.copied = False
        elif self._note.poisoned != self._files.fstat(log_fd).st_ino:
            self._note = self._note._replace(poisoned=None)  # that file was replaced
        self._made = []

    def confirm(self) -> None:
        """Make sure that nobody else can take this log's lock; recreate a deleted lock file or
        note.

        LogChangedError if another writer was faster, or if the directory was replaced. No other
        thread may write the note meanwhile. Cost: four `stat` calls, 7 us.
        """
        self.check_directory()
        if self.is_in_place():
            return
        if not self._leads_to(lock_path(self.path), self._identity):
            self._retake()
            self._share()
        self._restore_note()

    def _retake(self) -> None:
        lost, self._fd = self._fd, -1
        try:
            self._take_from_openers()
        except (StoreLocked, ForeignFileError) as error:
            raise LogChangedError(
                self.path, f"its lock file was deleted or replaced while it was open ({error})"
            ) from error
        finally:
            if self._fd < 0:
                self._fd = lost
            else:
                self._files.close(lost)
        self._made = []

    def _take_from_openers(self) -> None:
        """Take the lock. Whoever opens the log meanwhile has it until the log itself, which is
        locked, refuses them: wait for that."""
        give_up = time.monotonic() + _OPENER_WAIT_S
        while True:
            try:
                return self._take()
            except StoreLocked:
                if time.monotonic() > give_up:
                    raise
            time.sleep(random.uniform(0.001, 0.005))

    def is_in_place(self) -> bool:
        """True if the lock file still has its name, and something that of the note.

        Any thread may call it. Cost: two `stat` calls.
        """
        lock, note = lock_path(self.path), note_path(self.path)
        return self._leads_to(lock, self._identity) and self._files.exists(note)

    def check_directory(self) -> None:
        """LogChangedError if the log's directory was moved, deleted, unmounted or mounted over."""
        try:
            directory = _identity(self._files.stat(self.path.parent))
        except (FileNotFoundError, NotADirectoryError):
            directory = None
        if directory != self.directory:
            raise LogChangedError(
                self.path, "its directory was moved, deleted or unmounted while it was open"
            )

    def release(self) -> None:
        """Release the lock. If the log was not opened, first remove the files created for it.

        Call it again if it was interrupted.
        """
        for path, fd in self._made:
            with drop_system_errors():
                if self._leads_to(path, _identity(self._files.fstat(fd))):
                    self._files.unlink(path)
        self._close()

    def __del__(self) -> None:
        if self._fd >= 0:  # whoever took it was interrupted before the lock was stored
            self._close()

    def after_fork(self) -> None:
        """In a forked child: close the copies of the descriptors, and do not unlock.

        An unlock through any copy would free the parent's lock. Left open, they would hold it after
        the parent's death.
        """
        self._close()

    def _close(self) -> None:
        fds = [fd for fd in (self._note_fd, self._fd) if fd >= 0]
        if not self._retiring:
            self._retiring = [Retiring(self._files, fd) for fd in fds]
        with contextlib.ExitStack() as stack:
            for retiring in self._retiring:
                stack.callback(retiring.close)
        self._fd = self._note_fd = -1
        self._made, self._retiring = [], []

    # The lock.

    def _take(self) -> None:
        path = lock_path(self.path)
        while True:
            fd, made = self._open(path, LOCK_MAGIC, LOCK_BYTES)
            try:
                if not _lock_alone(self._files, fd):
                    raise self._locked(fd)
                identity = _identity(self._files.fstat(fd))
                if self._leads_to(path, identity):
                    break
            except BaseException:
                self._files.close(fd)
                raise
            self._files.close(fd)  # deleted between opening and locking: its lock protects nothing
        self._fd, self._identity = fd, identity
        if made:
            self._made.append((path, fd))
        if not self._files.fstat(fd).st_size:
            write_all(self._files, fd, LOCK_MAGIC * (LOCK_BYTES // len(LOCK_MAGIC)), 0)

    def _locked(self, fd: int) -> StoreLocked:
        if self._files.lock(fd, shared=True):
            name = lock_path(self.path).name
            return StoreLocked(
                self.path, None, f"a program that is not a writer and has locked {name}"
            )
        note = read_note(self._files, self.path)
        return StoreLocked(self.path, *describe_holder(note and note.holder, this_process()))

    def _leads_to(self, path: Path, identity: tuple[int, int]) -> bool:
        try:
            there = self._files.stat(path, follow=False)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return _identity(there) == identity

    def _open(self, path: Path, magic: bytes, size: int) -> tuple[int, bool]:
        """Open or create a side file. Returns its descriptor, and True if it was created.

        ForeignFileError if it is not foldlog's own.
        """
        while True:
            with contextlib.suppress(FileExistsError):
                return self._files.create(path, exclusive=True, mode=_PRIVATE), True
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                return open_own(self._files, path, magic, size, write=True), False

    # The note.

    def _open_note(self) -> Note | None:
        path = note_path(self.path)
        fd, made = self._open(path, NOTE_MAGIC, NOTE_BYTES)
        self._note_fd = fd
        if made:
            self._made.append((path, fd))
        self._note_inode = inode_of(self._files, fd)
        self._files.mark(fd)
        return parse_note(self._files.read(fd, NOTE_BYTES, 0))

    def _restore_note(self) -> None:
        """Create the note anew if it was deleted. Best effort."""
        lost = self._note_fd
        if self._leads_to(note_path(self.path), _identity(self._files.fstat(lost))):
            return
        with contextlib.suppress(OSError, ForeignFileError):
            self._open_note()
            self._files.close(lost)
            self._share()
            self._made = []
            self._note = self._note._replace(inode=self._note_inode)
            self._write_note()

    def _share(self) -> None:
        if self._log_access is None:
            return
        for fd, writers_only in ((self._fd, True), (self._note_fd, False)):
            with contextlib.suppress(PermissionError):
                share(self._files, fd, self._log_access, writers_only=writers_only)

    def _write_note(self) -> None:
        while True:
            note, counter = self._note, next(self._counter)
            slot = pack_slot(note._replace(counter=counter))
            write_all(self._files, self._note_fd, slot, counter % 2 * SLOT_BYTES)
            if self._note is note:  # else another thread changed it, and may have written first
                return


def open_own(files: Files, path: Path, magic: bytes, size: int, *, write: bool = False) -> int:
    """Open a side file that foldlog wrote, with `magic` and at most `size` bytes.

    ForeignFileError if anything else has its name; FileNotFoundError or another OSError.
    """
    try:
        fd = files.open_side(path, write=write)
    except OSError as error:
        if error.errno in _NOT_REGULAR:
            raise ForeignFileError(path, _foreign(_NOT_REGULAR[error.errno])) from None
        raise
    try:
        if files.fstat(fd).st_nlink > 1:
            raise ForeignFileError(path, _foreign("has another name, a hard link"))
        if not is_own(files.read(fd, size + 1, 0), magic, size):
            raise ForeignFileError(path, _foreign("was not written by foldlog"))
    except BaseException:
        files.close(fd)
        raise
    return fd


def _foreign(what: str) -> str:
    return f"{what}, but foldlog needs this name for a file of its own: move it away"


def _lock_alone(files: Files, fd: int) -> bool:
    """Take the exclusive lock. False if another writer has it.

    Waits up to `_READER_WAIT_S` for a reader to release a shared lock.
    """
    give_up = time.monotonic() + _READER_WAIT_S
    while True:
        if files.lock(fd):
            return True
        if time.monotonic() > give_up or not files.lock(fd, shared=True):
            return False
        files.unlock(fd)
        time.sleep(random.uniform(0.001, 0.005))


def inode_of(files: Files, fd: int) -> int:
    """What tells the open file `fd` from a copy: the number of its inode, xor its generation << 32.

    A file that is restored from a backup may get the number of the one that was removed; it does
    not get its generation, where the file system has one.
    """
    return files.fstat(fd).st_ino ^ _generation(fd) << 32


def _generation(fd: int) -> int:
    if sys.platform != "linux":
        return 0
    with drop_system_errors():
        raw = fcntl.ioctl(fd, _FS_IOC_GETVERSION, bytes(_LONG.size))
        return int.from_bytes(raw[:4], sys.byteorder)
    return 0  # tmpfs and others


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino
