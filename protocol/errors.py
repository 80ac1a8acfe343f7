"""One family of errors, which differ by what the caller does next.

Bad arguments are the built-in TypeError and ValueError. Everything else that foldlog raises on purpose is a
`FoldlogError`. Paths, offsets and reasons are attributes; the message is made from them; every error pickles.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from foldlog.protocol.tokens import VersionToken, WatchCursor, has_reached


class FoldlogError(Exception):
    """Above all errors of foldlog."""


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
    """Bytes that were written no longer verify. The file was left as it is.

    Recover: replay from upstream into a new log, import an artifact, open with `on_damage="cut"` if upstream can
    replay what follows the damage, or `foldlog salvage`.
    """


class InvalidFormatError(_FrameError):
    """Not a foldlog log, or one of a format that this version does not read. The file was left as it is."""


class LogChangedError(_FileError):
    """The log's file was deleted, replaced, truncated or grown by someone else while it was open."""


class LogRegressedError(_FileError):
    """The log ends before a batch that its lock file remembers as synced: it was cut or restored from an older copy.

    Accept the older state with `on_damage="cut"`.
    """


class LogPoisonedError(_FileError):
    """An fsync or the undoing of a failed write failed: nothing is acknowledged through this file again.

    The fold in memory is whole. `compact()` writes it to a new file, and only that clears the poison.
    """


class LogAccessError(_FileError):
    """A new file could not be given the log's owner, group, mode or access list, and did not take
    its place.

    The log goes on as it was, not compacted. Recover: compact it as its owner, or as root.
    """


class ForeignFileError(_FileError):
    """A name that foldlog needs beside the log is taken by something that is not foldlog's. It was
    left as it is.

    Recover: look at what has the name `path`, and move it away.
    """


class StoreLocked(FoldlogError):
    """Another writer has the log open: `pid` is its process, or None where that cannot be told or
    is no process of ours.

    `holder` says then who it is, if that is known: a process of another pid namespace, or of
    another machine.
    """

    def __init__(self, path: Path | str, pid: int | None, holder: str = "") -> None:
        super().__init__(path, pid, holder)
        self.path, self.pid, self.holder = Path(path), pid, holder

    def __str__(self) -> str:
        known = f"process {self.pid}" if self.pid is not None else self.holder
        return f"{self.path}: is open in {known or 'another writer'}"


class ArtifactInvalidError(_FileError):
    """An exported artifact does not verify. Nothing was written at the destination; fetch the artifact again."""


class StoreClosed(FoldlogError):
    """The store, or the thing asked of it, was closed."""


class StoreFailed(FoldlogError):
    """The supervisor gave up, for `reason`. Reads go on from the last snapshot; `store.reopen()` tries again.

    `applied` is False where the batch is known not to have been written: it was refused, or had not
    been begun. It is None where that is unknown: the writer had the batch in hand. Then compare
    `store.cursor()` after reopening.
    """

    def __init__(self, reason: str, applied: Literal[False] | None = None) -> None:
        super().__init__(reason, applied)
        self.reason, self.applied = reason, applied

    def __str__(self) -> str:
        return self.reason


class ForkedStore(FoldlogError):
    """A store that was opened before a fork was written to in the child. Open a follower there, or open after the fork."""


class CursorExpired(FoldlogError):
    """Changes since this cursor are no longer in the log: it was compacted. Start again from the state."""


class Backpressure(FoldlogError):
    """The batch was not taken. Retry later, or pass `timeout_s` to wait for room.

    The writer's mailbox is full; or the log is at its bound, `3 x (live + compact_threshold)`, and cannot
    be compacted, for the reason told. The store tries again by itself.
    """


class RequestTimeout(FoldlogError, TimeoutError):
    """No answer by the deadline. The request may still be carried out: its outcome is unknown."""


class ReentrantCall(FoldlogError):
    """Refused at once: called within a call of the same thread that it would have to wait for.

    From a signal handler, a finalizer or a callback that came within a write, say. Nothing was written. `apply_async` works
    there, and so do reads.
    """


class WriterCrashed(FoldlogError):
    """The writer died while it held this request, and the replayed log shows that it was **not** applied."""


def _shown(version: bytes) -> str:
    return VersionToken(version).shown if version else "unknown"


class CursorRegressed(FoldlogError):
    """`apply(..., forward_only=True)` met a cursor that is not at or after the last one. Nothing was written."""

    def __init__(self, cursor: bytes, last: bytes) -> None:
        super().__init__(cursor, last)
        self.cursor, self.last = cursor, last

    def __str__(self) -> str:
        return f"{self.cursor!r} is not at or after {self.last!r}, the cursor of the store"


def check_forward(cursor: WatchCursor, last: WatchCursor) -> None:
    """CursorRegressed unless `cursor` is at or after `last`."""
    if not has_reached(cursor, last):
        raise CursorRegressed(cursor, last)


class KeyExists(FoldlogError):
    """`create` found the key taken. Nothing was written. `version` is that of the entry.

    It is decided by what is written and published: a read after it sees that entry, or a newer one.
    """

    def __init__(self, key: str, version: bytes) -> None:
        super().__init__(key, version)
        self.key, self.version = key, version

    def __str__(self) -> str:
        return f"key {self.key!r} exists, at version {_shown(self.version)}"


class VersionMismatch(FoldlogError):
    """The entry is not at the expected version. Nothing was written. `actual` is None if there is no entry.

    It is decided by what is written and published, as `KeyExists` is.
    """

    def __init__(self, key: str, expected: bytes, actual: bytes | None) -> None:
        super().__init__(key, expected, actual)
        self.key, self.expected, self.actual = key, expected, actual

    def __str__(self) -> str:
        found = "no entry" if self.actual is None else f"version {_shown(self.actual)}"
        return f"key {self.key!r}: expected version {_shown(self.expected)}, found {found}"


class EncodeError(FoldlogError):
    """A view's codec raised `cause` when it was to encode a value for `key`. Nothing was written."""

    def __init__(self, key: str, cause: Exception) -> None:
        super().__init__(key, cause)
        self.key, self.cause = key, cause

    def __str__(self) -> str:
        return f"key {self.key!r}: the value does not encode: {_told(self.cause)}"


class DecodeError(FoldlogError):
    """The value of `key`, at `version`, is none that a view's codec decodes: it raised `cause`. Other keys are not affected."""

    def __init__(self, key: str, version: bytes, cause: Exception) -> None:
        super().__init__(key, version, cause)
        self.key, self.version, self.cause = key, version, cause

    def __str__(self) -> str:
        return f"key {self.key!r}, version {_shown(self.version)}: does not decode: {_told(self.cause)}"


class KeyOutsideView(FoldlogError, KeyError, ValueError):
    """The key does not start with the prefix of the view. Nothing was read or written."""

    def __init__(self, key: str, prefix: str) -> None:
        super().__init__(key, prefix)
        self.key, self.prefix = key, prefix

    def __str__(self) -> str:
        return f"key {self.key!r} is outside of the view, which is of the prefix {self.prefix!r}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
