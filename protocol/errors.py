"""One family of errors, distinguished by what the caller does next.

Bad arguments are the built-in TypeError and ValueError. Every other error that foldlog raises is a
`FoldlogError`. Paths, offsets and reasons are attributes, and the message is built from them. Every
error pickles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from foldlog.protocol.tokens import VersionToken, WatchCursor, has_reached


def is_from_system(error: object) -> bool:
    """True for an OSError that the system reports. One that a signal handler raises, a TimeoutError
    say, has no errno."""
    return isinstance(error, OSError) and error.errno is not None


def is_own_fault(error: object) -> bool:
    """True for errors that foldlog raises or the system reports; False for an exception that struck
    the thread from outside."""
    return isinstance(error, FoldlogError) or is_from_system(error)


class drop_system_errors:
    """A with block in which an OSError of the system does not matter, and is dropped. Whatever else
    strikes the thread passes, also an OSError that a signal handler raises."""

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        return is_from_system(error)


class FoldlogError(Exception):
    """The base class of foldlog's errors."""


class _FileError(FoldlogError):
    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class _FrameError(FoldlogError):
    def __init__(
        self,
        path: Path | str,
        offset: int,
        reason: str,
        last_good_seq: int | None = None,
        last_good_cursor: bytes = b"",
    ) -> None:
        super().__init__(path, offset, reason, last_good_seq, last_good_cursor)
        self.path, self.offset, self.reason = Path(path), offset, reason
        self.last_good_seq, self.last_good_cursor = last_good_seq, last_good_cursor

    def __str__(self) -> str:
        good = "" if self.last_good_seq is None else f" (good up to batch {self.last_good_seq})"
        return f"{self.path}: byte {self.offset}: {self.reason}{good}"


class CorruptLogError(_FrameError):
    """The log is damaged: bytes that were written no longer verify. The file was not modified.

    Recover: replay from upstream into a new log; import an artifact; open with `on_damage="cut"` if
    upstream can replay what follows the damage; or run `foldlog salvage`.
    """


class InvalidFormatError(_FrameError):
    """Not a foldlog log, or in a format this version cannot read. The file was not modified."""


class LogChangedError(_FileError):
    """Something else deleted, replaced, truncated or extended the log file while it was open."""


class LogRegressedError(_FileError):
    """The log ends before a batch that the note beside it records as synced: it was truncated, or
    restored from an older copy.

    To accept the older state, open with `on_damage="cut"`.
    """


class LogPoisonedError(_FileError):
    """An fsync failed, or a failed write could not be undone: no write to this file is acknowledged
    again.

    The fold in memory is intact. `compact()` writes it to a new file; nothing else clears this
    state.
    """


class LogAccessError(_FileError):
    """A new file could not be given the log's owner, group, mode or ACL, so it did not replace the
    log.

    The log stays in use, uncompacted. Recover: compact it as its owner or as root.
    """


class ForeignFileError(_FileError):
    """A file name that foldlog needs next to the log is taken by a file that is not foldlog's. That
    file was not modified.

    Recover: inspect the file at `path`, and move it elsewhere.
    """


class StoreLocked(FoldlogError):
    """Another writer has the log open. `pid` is its process ID, or None if that is unknown or means
    nothing on this machine or in this PID namespace.

    In that case `holder` describes the writer, if known: a process in another PID namespace or on
    another machine.
    """

    def __init__(self, path: Path | str, pid: int | None, holder: str = "") -> None:
        super().__init__(path, pid, holder)
        self.path, self.pid, self.holder = Path(path), pid, holder

    def __str__(self) -> str:
        known = f"process {self.pid}" if self.pid is not None else self.holder
        return f"{self.path}: already open for writing in {known or 'another writer'}"


class ArtifactInvalidError(_FileError):
    """An artifact does not verify. Nothing was written to the destination. Fetch the artifact
    again."""


class StoreClosed(FoldlogError):
    """The store, watch or follower is closed."""


class StoreFailed(FoldlogError):
    """The supervisor gave up, for `reason`. Reads continue from the last snapshot; `store.reopen()`
    tries again.

    `applied` is False if the batch was certainly not written: it was refused or never started. It
    is None if that is unknown because the writer was processing the batch; compare `store.cursor()`
    after reopening.
    """

    def __init__(self, reason: str, applied: Literal[False] | None = None) -> None:
        super().__init__(reason, applied)
        self.reason, self.applied = reason, applied

    def __str__(self) -> str:
        return self.reason


class ForkedStore(FoldlogError):
    """A store opened before a fork was used in the child process. Open a follower in the child, or
    open the store after the fork."""


class CursorExpired(FoldlogError):
    """The log no longer holds the changes since this cursor, because it was compacted. Start again
    from the state."""


class Backpressure(FoldlogError):
    """The batch was not accepted. Retry later, or pass `timeout_s` to wait for room.

    Either the writer's mailbox is full; or the log has reached its size limit, `3 x (live +
    compact_threshold)`, and cannot be compacted, for the reason in the message. The store keeps
    trying to compact.
    """


class RequestTimeout(FoldlogError, TimeoutError):
    """No answer by the deadline. Unless the message says that it was withdrawn, the request may
    still be carried out: its outcome is unknown."""


class ReentrantCall(FoldlogError):
    """Refused at once: the call would wait for another call further up the same thread's stack.

    This happens in a signal handler, a finalizer or a callback that runs during a write. Nothing
    was written. Reads and `apply_async` work there.
    """


class WriterCrashed(FoldlogError):
    """The writer died while processing this request, and the replayed log shows that it was **not**
    applied."""


def _shown(version: bytes) -> str:
    return VersionToken(version).shown if version else "unknown"


class CursorRegressed(FoldlogError):
    """`apply(..., forward_only=True)` was given a cursor before the store's, or not comparable with
    it. Nothing was written."""

    def __init__(self, cursor: bytes, last: bytes) -> None:
        super().__init__(cursor, last)
        self.cursor, self.last = cursor, last

    def __str__(self) -> str:
        return f"{self.cursor!r} is not at or after {self.last!r}, the store's cursor"


def check_forward(cursor: WatchCursor, last: WatchCursor) -> None:
    """Raise CursorRegressed unless `cursor` is at or after `last`."""
    if not has_reached(cursor, last):
        raise CursorRegressed(cursor, last)


class KeyExists(FoldlogError):
    """`create` found an entry with this key, at `version`. Nothing was written.

    Decided from what is written and published: a read after this error sees that entry or a newer
    one.
    """

    def __init__(self, key: str, version: bytes) -> None:
        super().__init__(key, version)
        self.key, self.version = key, version

    def __str__(self) -> str:
        return f"key {self.key!r} already exists, at version {_shown(self.version)}"


class VersionMismatch(FoldlogError):
    """The entry is not at the expected version. Nothing was written. `actual` is its version, or
    None if there is no entry.

    Decided from what is written and published, as for `KeyExists`.
    """

    def __init__(self, key: str, expected: bytes, actual: bytes | None) -> None:
        super().__init__(key, expected, actual)
        self.key, self.expected, self.actual = key, expected, actual

    def __str__(self) -> str:
        found = "no entry" if self.actual is None else f"version {_shown(self.actual)}"
        return f"key {self.key!r}: expected version {_shown(self.expected)}, found {found}"


class EncodeError(FoldlogError):
    """A view's codec could not encode the value for `key`: it raised `cause`. Nothing was
    written."""

    def __init__(self, key: str, cause: Exception) -> None:
        super().__init__(key, cause)
        self.key, self.cause = key, cause

    def __str__(self) -> str:
        return f"key {self.key!r}: cannot encode the value: {_describe(self.cause)}"


class DecodeError(FoldlogError):
    """A view's codec cannot decode the value of `key` at `version`: it raised `cause`. Other keys
    are not affected."""

    def __init__(self, key: str, version: bytes, cause: Exception) -> None:
        super().__init__(key, version, cause)
        self.key, self.version, self.cause = key, version, cause

    def __str__(self) -> str:
        where = f"key {self.key!r}, version {_shown(self.version)}"
        return f"{where}: cannot decode the value: {_describe(self.cause)}"


class KeyOutsideView(FoldlogError, KeyError, ValueError):
    """The key does not start with the prefix of the view. Nothing was read or written."""

    def __init__(self, key: str, prefix: str) -> None:
        super().__init__(key, prefix)
        self.key, self.prefix = key, prefix

    def __str__(self) -> str:
        return f"key {self.key!r} is outside the view: it does not start with {self.prefix!r}"


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
