"""The writer's side of a log: append, sync, close; and what happens when one of them fails.

Each commit group is one `write`, unbuffered. A failed or short write is cut back to the last good
byte, and the cut is synced, before the error is raised. If that fails, or an fsync fails, the log
is poisoned: the kernel may have dropped the pages and marked them clean, so a retry, or a replay
from the page cache, would report success for data that is not on disk. Nothing is acknowledged
through that file again. The fold in memory is intact; writing it to a new file (`rewrite.py`)
clears the poison.

A write that is complete when an exception strikes the thread is kept: a follower may have read it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from foldlog.protocol.errors import (
    FoldlogError,
    ForkedStore,
    LogChangedError,
    LogPoisonedError,
    StoreClosed,
    drop_system_errors,
    is_from_system,
)
from foldlog.protocol.frames import MAX_GROUP
from foldlog.protocol.tokens import U64_MAX
from foldlog.protocol.updates import MAX_BODY_BYTES
from foldlog.storage.forks import Rank, tell_after_fork
from foldlog.storage.formats.format import Known, LogFile, Position
from foldlog.storage.handover import Turns
from foldlog.storage.log.access import keep_access
from foldlog.storage.log.files import Access, Files, Retiring, remove_quietly, write_all
from foldlog.storage.log.sidecars.lock import WriterLock
from foldlog.storage.log.sidecars.note import Watermark

_getframe = sys._getframe
_ARRAY_HEADER_BYTES = 5  # at most: the header of the array around the items


class Log:
    """A log that this process writes, with the writer's lock held."""

    owns_file = False
    """True once nobody else would close its file."""

    def __init__(
        self, files: Files, path: Path, lock: WriterLock, file: LogFile, *, sync_each: bool = False
    ) -> None:
        self.files, self.path, self.sync_each = files, path, sync_each
        self.file = file
        # Replaced whole by each append, after the write: its offset is the size of the file.
        self.position = file.position
        self.poison: str | None = None
        self.synced_seq = file.position.synced_seq
        """The last batch that is known to survive a power loss."""
        self._synced_offset = -1  # the end of the file at the last sync
        self._lock = lock
        self._path = os.fspath(path)
        self._inode = self.identity(file.fd)
        self._access = files.access(file.fd)  # as it was last seen
        self._codec = file.format.codec(file.header, sync_each=sync_each)
        self._session = file.session
        # Bytes that a failed write may have left at the end, if it could not be cut back.
        self._leftover_bytes = 0
        self._successor: tuple[tuple[int, int], LogFile] | None = None
        # Any thread may sync the file. It is not replaced or closed during an fsync.
        self._turns = Turns()
        self.closed = False
        self._released = False
        self.unsettled: Position | None = None
        """Where a write that was interrupted would have ended: the file may be longer than
        `position`. See `settle_write`."""
        self._replaced: Retiring | None = None  # by `adopt`, and not closed yet
        self._retiring: list[Retiring] | None = None
        self._sealed: Position | None = None
        """Where the file ends with the session's SEAL frame."""
        self._forked = False
        tell_after_fork(self, Rank.ENGINE)

    def __del__(self) -> None:
        if self.owns_file and not self._released:  # interrupted before the log was stored
            self._close_file()

    def identity(self, fd: int) -> tuple[int, int]:
        """(device, inode): tells apart files that have had the same name."""
        stat = self.files.fstat(fd)
        return stat.st_dev, stat.st_ino

    @property
    def appended_bytes(self) -> int:
        """Bytes after the base."""
        return self.position.offset - self.file.base_end

    @property
    def is_compact(self) -> bool:
        """True if no batch follows the base, and the log is not poisoned."""
        file = self.file
        return self.poison is None and file.format.is_compact(file, self.position)

    def here(self) -> tuple[LogFile, int]:
        """The file and its end, consistent with each other. Any thread may call it."""
        try:
            self._turns.enter(_getframe())
            return self.file, self.position.offset
        finally:
            self._turns.leave(_getframe())

    def check_usable(self) -> None:
        """StoreClosed, ForkedStore or LogPoisonedError unless the log can be written."""
        if self._forked:
            raise ForkedStore(
                f"{self.path} was opened before this process was forked from its writer"
            )
        if self.closed:
            raise StoreClosed(f"{self.path} is closed")
        if self.poison is not None:
            raise LogPoisonedError(self.path, self.poison)

    def check_unchanged(self) -> None:
        """LogChangedError if the path leads to another file, or the file's size is not as expected.

        Cost: one `stat`, 1.5 us.
        """
        try:
            stat = self.files.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            raise LogChangedError(self.path, "was deleted while it was open") from None
        if (stat.st_dev, stat.st_ino) != self._inode:
            raise LogChangedError(self.path, "was replaced by another file while it was open")
        if stat.st_size != self.position.offset:
            self._check_size(stat.st_size)

    def _check_size(self, size: int) -> None:
        if size != self.position.offset:
            raise LogChangedError(
                self.path,
                f"has {size} bytes, expected {self.position.offset}: another program changed it",
            )

    def access(self) -> Access:
        """Who may use the log's file, now or when the log was closed. Writer's thread only."""
        if self.file.fd >= 0:
            self._access = self.files.access(self.file.fd)
        return self._access

    def was_deleted(self) -> bool:
        """True if nothing has the log's name. LogChangedError if its directory was replaced."""
        self._lock.check_directory()
        return not self.files.exists(self.path)

    def confirm_lock(self) -> None:
        """Make sure that the lock file is still ours: see `WriterLock.confirm`.

        LogChangedError if it is not, or if the log's path leads to another file. Writer's thread
        only.
        """
        self._own_stat()  # if the log was replaced, the lock file may be its writer's
        try:
            self._turns.enter(_getframe())  # a sync writes the note
            self._lock.confirm()
        finally:
            self._turns.leave(_getframe())

    def _own_stat(self) -> os.stat_result | None:
        """The status of the log's own file under its name; None if nothing has the name.

        LogChangedError if another file has it.
        """
        try:
            there = self.files.stat(self._path, follow=False)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if (there.st_dev, there.st_ino) != self._inode:
            raise LogChangedError(self.path, "was replaced by another file while it was open")
        return there

    def has_its_side_files(self) -> bool:
        """True if the lock file and the note are in place. Any thread may call it."""
        return self._lock.is_in_place()

    def check_place(self, fd: int) -> bool:
        """True if the log's name, which the complete file `fd` is to get, is free.

        False if the log's own file has it. LogChangedError for any other file, which is never
        replaced; LogAccessError or OSError. A rename cannot check what it replaces, so call this
        right before.
        """
        keep_access(self.files, fd, self.access(), self.path)
        self.confirm_lock()
        there = self._own_stat()
        if there is None:
            if self.poison is None:
                raise LogChangedError(self.path, "was deleted while it was open")
            return True
        if there.st_size - self.position.offset not in range(self._leftover_bytes + 1):
            self._check_size(there.st_size)
        return False

    def put_in_place(self, new: Path, *, free: bool) -> None:
        """Give the file `new` the log's name, which is `free`, or that of the log's own file."""
        if not free:
            self.files.replace(new, self.path)
            return
        try:
            self.files.link_new(new, self.path)
        except FileExistsError:
            raise LogChangedError(self.path, "was replaced by another file") from None
        remove_quietly(self.files, new)

    def append(self, items: Sequence[bytes]) -> None:
        """Write encoded batches as one commit group, in one write.

        On return they survive a killed process. On an error none of them is in the log, or the log
        is poisoned. ValueError for a group over the limits that readers enforce.
        """
        if self._forked or self.closed or self.poison is not None:
            self.check_usable()
        count = len(items)
        if not 0 < count <= MAX_GROUP:
            raise ValueError(f"a commit group takes 1 to {MAX_GROUP} batches, got {count}")
        size = _ARRAY_HEADER_BYTES + (len(items[0]) if count == 1 else sum(map(len, items)))
        if size > MAX_BODY_BYTES:
            raise ValueError(
                f"a commit group of {size} bytes is over the limit of {MAX_BODY_BYTES}"
            )
        if self.position.seq + count > U64_MAX:
            raise FoldlogError(f"{self.path}: the sequence is exhausted")
        if self.unsettled is not None:
            self.settle_write()
        self.check_unchanged()
        if not self._session:
            self._begin_session()
        self._write(*self._codec.group(items, self.position, self.synced_seq))

    def _begin_session(self) -> None:
        """Begin this writer's session, before its first group. Opening alone writes nothing."""
        opening = self._codec.opening(self.position, self.synced_seq)
        if opening is not None:
            self._write(*opening)
        self._session = True
        if opening is not None and self.sync_each:
            self.sync()

    def _write(self, data: bytes, end: Position) -> None:
        position = self.position
        self.unsettled = end
        self._leftover_bytes = len(data)
        try:
            files, fd = self.files, self.file.fd
            done = files.write(fd, data, position.offset)
            if done != len(data):
                write_all(files, fd, memoryview(data)[done:], position.offset + done)
            self.position = end
        except BaseException as error:
            if self.position is position:
                if is_from_system(error):
                    self.unsettled = position  # what the system failed to write is not trusted
                self.settle_write(error)
            raise
        finally:
            if self.position is end:
                self.unsettled = None
                self._leftover_bytes = 0

    def settle_write(self, error: object = "it was interrupted") -> None:
        """After a write that was interrupted: keep what is complete, as a follower may have read
        it, and cut off what is not. If this is interrupted, too, call it again."""
        end = self.unsettled
        if end is None or self.closed or self._forked:
            return
        if end is not self.position and self._is_complete(end):
            self.position = end
            self.unsettled = None
            self._leftover_bytes = 0
        else:
            self._undo(error)

    def _is_complete(self, end: Position) -> bool:
        """True if the file ends there: everything was written."""
        with drop_system_errors():
            return self.files.fstat(self.file.fd).st_size == end.offset
        return False

    def _undo(self, error: object) -> None:
        """Cut off a failed write, durably: later frames must not mix with its remains."""
        try:
            self.files.truncate(self.file.fd, self.position.offset)
            self.files.sync(self.file.fd)
        except OSError as second:
            if not is_from_system(second):
                raise  # undone later
            self.poison_with(f"a write failed ({error}), and undoing it failed ({second})")
        else:
            self._leftover_bytes = 0
        self.unsettled = None

    def sync(self) -> None:
        """Make all that was appended survive a power loss. Any thread may call it at any time.

        LogPoisonedError if it fails: nothing is acknowledged through this file again.
        """
        try:
            self._turns.enter(_getframe())
            if not self.closed:
                self._sync()
        finally:
            self._turns.leave(_getframe())

    def _sync(self) -> None:
        self.check_usable()
        position = self.position
        try:
            self.files.sync(self.file.fd)
        except OSError as error:
            if not is_from_system(error):
                raise
            self.poison_with(f"fsync failed: {error}")
            raise LogPoisonedError(self.path, f"fsync failed: {error}") from error
        self._note_synced(position)

    def _note_synced(self, position: Position) -> None:
        self._synced_offset = position.offset
        self.synced_seq = max(self.synced_seq, position.seq)
        with drop_system_errors():
            self._lock.write(Watermark(self.file.header.log_id, position.seq, position.offset))

    def poison_with(self, reason: str) -> None:
        """Acknowledge nothing more through this file. A rewrite into a new file clears that."""
        self.poison = reason
        with drop_system_errors():  # for the next process only
            self._lock.write_poison(self._inode[1])

    def announce(self, file: LogFile | None) -> None:
        """`file`, complete and synced, is about to replace the log's file. None: it did not.

        If the writer dies in between, `known` recognizes the file, and its descriptor, which is
        locked, is closed with the log.
        """
        self._successor = None if file is None else (self.identity(file.fd), file)

    def known(self, identity: tuple[int, int]) -> Known | None:
        """What is known of the file with this (device, inode); None if it is not this log's.

        Works for an abandoned log, too.
        """
        if identity == self._inode:
            return Known(self.file.header, self.file.base_end)
        if self._successor is not None and identity == self._successor[0]:
            return Known(self._successor[1].header, self._successor[1].base_end)
        return None

    def adopt(self, file: LogFile, inode: tuple[int, int], directory: int | None = None) -> None:
        """Continue in a rewritten file, which is complete, synced and now at `path`.

        Clears the poison. Makes the rename durable, through the open `directory` if given; if that
        fails, the log is poisoned again.
        """
        try:
            self._turns.enter(_getframe())
            self._adopt(file, inode, directory)
        finally:
            self._turns.leave(_getframe())

    def _adopt(self, file: LogFile, inode: tuple[int, int], directory: int | None) -> None:
        """Each step can be repeated, for a rewrite that was interrupted after its rename."""
        if self.file is not file:
            self._replaced = Retiring(self.files, self.file.fd)
            self.file, self.position = file, file.position
        self._inode = inode
        self._codec = file.format.codec(file.header, sync_each=self.sync_each)
        self._session = file.session
        self.unsettled = None
        self._leftover_bytes = 0
        self.synced_seq = file.position.seq
        if self.poison is not None:
            self.poison = None
            with drop_system_errors():  # the note names the old file
                self._lock.write_poison(None)
        self._synced_offset = -1
        try:
            self.files.sync_dir(self.path.parent, directory)
        except OSError as error:
            if not is_from_system(error):
                raise  # done again by whoever settles this
            # After a power loss the old file may be back, without what is acknowledged from now on.
            self.poison_with(f"syncing the directory failed after a rewrite: {error}")
        else:
            self._note_synced(file.position)
        self._successor = None
        if self._replaced is not None:
            with drop_system_errors():  # the file no longer has a name
                self._replaced.close()
            self._replaced = None

    def close(self) -> None:
        """Sync and seal what was appended, and release the lock.

        Closing twice is fine: the second call finishes the first.
        """
        if self._released:
            return
        try:
            if not self.closed and self._session and self.poison is None and not self._forked:
                self._seal()
        finally:
            self.abandon()

    def _seal(self) -> None:
        self.settle_write()
        if self._synced_offset != self.position.offset:
            self.sync()
        if self.position is self._sealed:
            return  # by a call that was interrupted then
        try:
            self.check_unchanged()
        except LogChangedError:
            return  # this is no longer the file at the path: nothing to seal
        seal = self._codec.seal(self.position, self.synced_seq)
        if seal is not None:
            self._sealed = seal[1]
            self._write(*seal)
            self.sync()

    def _close_file(self) -> None:
        if self._retiring is None:
            fds = ({self.file.fd} | self._successors_fd()) - {-1}
            still_open = [Retiring(self.files, fd) for fd in fds]
            if self._replaced is not None and self._replaced.fd not in fds:
                still_open.append(self._replaced)
            self._retiring = still_open
        self.file = self.file._replace(fd=-1)
        if self._successor is not None:
            inode, successor = self._successor
            self._successor = inode, successor._replace(fd=-1)
        with contextlib.ExitStack() as stack:  # one that fails keeps no other open, and locked
            for retiring in self._retiring:
                stack.callback(retiring.close)

    def _successors_fd(self) -> set[int]:
        """Its descriptor, unless whoever wrote that file has closed it: the number may then be
        another file's."""
        if self._successor is None:
            return set()
        inode, successor = self._successor
        is_open = False
        with drop_system_errors():
            is_open = self.identity(successor.fd) == inode
        return {successor.fd} if is_open else set()

    def after_fork(self) -> None:
        """In a forked child: the log is the parent's."""
        if not self.closed:
            self._turns = Turns()
            self._forked = True
            with drop_system_errors():
                self._close_file()

    def discard(self, *, keep_lock: bool = False) -> None:
        """`abandon` a log that nobody has read from: its file is closed for reading, too."""
        self.file.handle.close()
        self.abandon(keep_lock=keep_lock)

    def abandon(self, *, keep_lock: bool = False) -> None:
        """Close the log as a killed process would: no sync, no seal.

        `keep_lock`: the same process is going to open it again.
        """
        try:
            self._turns.enter(_getframe())
            if not self._released:
                self.closed = True
                try:
                    self._close_file()
                finally:
                    if not keep_lock:
                        self._lock.release()
                self._released = True  # else the next call closes what this one could not
        finally:
            self._turns.leave(_getframe())
