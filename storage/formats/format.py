"""The seam between a log and the format of its file: batches, bases and positions.

Each format is a package beside this module, and a row of the table in `registry.py`. Everything
else exists once, whatever the format: the lock, the check that a file is unchanged, the undoing of
a failed write, the poison, the swap at the end of a rewrite.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import WatchCursor
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.log.files import Files, ReadHandle, remove_quietly, write_all

BUFFER_BYTES = 1024 * 1024
PRIVATE = 0o600
"""The mode of a new file that is to hold what another file holds, until it has that file's."""
Progress: TypeAlias = Callable[[int, int], None]
"""Told of long work as it goes on: (done, total), in entries or bytes."""


class Header(Protocol):
    """Which log a file is of, and where its base is. Each format has its own."""

    @property
    def log_id(self) -> bytes:
        """16 random bytes, the same for ever; for a format that keeps none, while this process lives."""

    @property
    def base_seq(self) -> int:
        """The sequence of the base."""


class Position(Protocol):
    """A place in a log, after a whole number of batches. Each format has its own."""

    @property
    def offset(self) -> int:
        """In the file, in bytes."""

    @property
    def seq(self) -> int:
        """The sequence of the last batch before it."""

    @property
    def synced_seq(self) -> int:
        """The last batch that the file itself tells was synced; 0 if it tells none."""


class Verdict(enum.Enum):
    """What the bytes after the last valid one are."""

    TORN = "torn"
    """A writer that was stopped left them: they are cut."""
    CORRUPT = "corrupt"
    """Something that was written is damaged: the log is refused."""


class BadBytes(Exception):
    """The bytes at `offset` are not what must come next. `final`: no torn write explains them."""

    def __init__(self, offset: int, reason: str, *, final: bool, unsupported: bool = False) -> None:
        super().__init__(offset, reason)
        self.offset, self.reason, self.final, self.unsupported = offset, reason, final, unsupported


class LogFile(NamedTuple):
    """An open log file, as opening or a rewrite hands it to its `Log`."""

    format: LogFormat
    header: Header
    fd: int
    """To write; locked, so that a hard link to the file finds it taken."""
    handle: ReadHandle
    """To read, shared with the snapshots."""
    position: Position
    """After its last write."""
    base_end: int
    """The offset after its base."""
    session: bool
    """It holds what this writer's session begins with."""


class Known(NamedTuple):
    """What a writer that is opened again remembers of a file: where its base ends, and who it is."""

    header: Header
    base_end: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was read from a log file, up to its end or its first bad bytes. A format may add to it."""

    format: LogFormat
    header: Header
    fold: FoldSnapshot
    position: Position
    size: int
    """Of the file, when reading began: a writer may have appended since."""
    base_end: int
    """The offset after the base; 0 if the base is not whole."""
    base_entries: int
    parts: int
    """Frames or records: whatever the format checks one by one."""
    sealed: bool
    bad: BadBytes | None


class FileFacts(NamedTuple):
    """What a file tells of itself; None for what its format does not have."""

    log_id: str | None
    generation: str | None
    seq: int | None
    leaves: int | None
    sealed: bool | None


class Problem(NamedTuple):
    """Something in a log that must not be."""

    offset: int
    """Where the frame, or the stretch of bytes, begins."""
    size: int
    """Bytes of it."""
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found. `ok` is the short answer."""

    path: Path
    size: int
    """Bytes looked at."""
    frames: int
    """Sound ones, and so with the next five."""
    leaves: int
    entries: int
    """Of the base."""
    batches: int
    """Behind the base."""
    seq: int
    cursor: WatchCursor
    sealed: bool
    torn_bytes: int
    """Of a tail that a stopped writer left: legal, and cut when the log is next opened for writing."""
    torn_reason: str
    problems: tuple[Problem, ...]
    """All that is wrong, by offset."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong. A torn tail is not wrong."""
        return not self.problems


class Stretch(Protocol):
    """A stretch of a file, as a walk over all of it yields it. Each format has its own."""

    @property
    def offset(self) -> int:
        """Where it begins."""

    @property
    def is_damage(self) -> bool:
        """True if it is neither valid nor a torn tail."""


class Codec(Protocol):
    """How one log's appends look in its file: the bytes, and the position after them. No I/O.

    A position that it is given is one that it, or its format, has made.
    """

    def group(
        self, items: Sequence[bytes], position: Any, synced_seq: int
    ) -> tuple[bytes, Position]:
        """A commit group: the encoded batches `items`."""

    def opening(self, position: Any, synced_seq: int) -> tuple[bytes, Position] | None:
        """What a session writes before its first group, if anything."""

    def seal(self, position: Any, synced_seq: int) -> tuple[bytes, Position] | None:
        """What a clean close writes, if anything, when all before it is synced."""


class NewFile(ABC):
    """A new log file, written front to back under a temporary name."""

    def __init__(
        self,
        files: Files,
        path: Path,
        header: Header,
        first: bytes,
        position: Position,
        mode: int = PRIVATE,
    ) -> None:
        """`first`: the bytes of the file's header, written with what follows; `position` is
        after them.

        `mode`: of the file. Whoever makes it lets in others, before anything is written.
        """
        self.files, self.path, self.header, self.position = files, path, header, position
        self.fd = files.create(path, exclusive=True, mode=mode)
        self.base_end = 0
        """The offset behind the fold that was written."""
        self.session = False
        """Something was carried over, after whatever a session begins with."""
        self._buffer: list[bytes] = [first]
        self._buffered = len(first)
        self._written = 0

    @abstractmethod
    def write_fold(self, fold: FoldSnapshot, progress: Progress | None = None) -> None:
        """Write `fold`, as the first thing. Equal states give equal bytes, but for ids."""

    def keep_warm(self, fold: FoldSnapshot) -> None:  # noqa: B027 - a format that keeps all in memory has nothing to do
        """Remember of `fold`, which was written, what was read of it: a compaction is not to make hot keys cold."""

    @abstractmethod
    def carry(self, source: LogFile, start: Any, stop: int) -> Position:
        """Append what `source`, of the same format, holds from `start` to the offset `stop`.

        Returns the position at `stop`.
        """

    @abstractmethod
    def fold_with(self, since: FoldSnapshot) -> FoldSnapshot:
        """The fold that was written, with what was committed `since` on top of it."""

    def log_file(self, format: LogFormat, handle: ReadHandle) -> LogFile:
        """This file, as a log goes on in it. `handle` reads it; the fold that was written reads from there, too."""
        return LogFile(
            format, self.header, self.fd, handle, self.position, self.base_end, self.session
        )

    def put(self, data: bytes) -> None:
        """Add to the buffer, and write it out when it is full."""
        self._buffer.append(data)
        self._buffered += len(data)
        if self._buffered >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what is buffered to the operating system."""
        data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
        if data:
            write_all(self.files, self.fd, data, self._written)
        self._written += len(data)
        self._buffer, self._buffered = [], 0

    def sync(self) -> None:
        """Flush, and make it survive a power loss."""
        self.flush()
        self.files.sync(self.fd)

    def discard(self) -> None:
        """Give the file up."""
        try:
            self.files.close(self.fd)
        finally:
            remove_quietly(self.files, self.path)


class LogFormat(ABC):
    """One file format. It has no state; there is one object of each."""

    name: FormatName
    magic: bytes
    """What its files begin with."""
    backend: str
    """How an artifact's manifest names it, with `backend_version`."""
    backend_version: str
    payload_path: str
    """The file of its artifacts that holds the state."""
    keeps_origin = True
    """Its batches name the upstream of their cursor. If not, `storage/log/origins.py` does, beside the log."""

    @abstractmethod
    def codec(self, header: Any, *, sync_each: bool) -> Codec:
        """For appends to the file with this header. `sync_each`: each is synced before the next is written."""

    @abstractmethod
    def new_file(
        self,
        files: Files,
        path: Path,
        *,
        seq: int,
        log_id: bytes | None = None,
        sync_each: bool = False,
        mode: int = PRIVATE,
    ) -> NewFile:
        """Begin a file at `path` whose base stands at batch `seq`; of the log `log_id`, or of a new one."""

    @abstractmethod
    def load(
        self, handle: ReadHandle, progress: Progress | None = None, known: Known | None = None
    ) -> Loaded:
        """Read a file of this format to its end, or to the first bad bytes, which are returned and not judged.

        InvalidFormatError if its header is not of this format. `known`: what this process knows of it from before.
        """

    @abstractmethod
    def diagnose(self, handle: ReadHandle, loaded: Loaded) -> tuple[Verdict, str]:
        """Whether what follows the last valid bytes of `loaded` is torn or corrupt, and the reason."""

    @abstractmethod
    def is_compact(self, file: LogFile, position: Any) -> bool:
        """True if no batch follows the base of `file`, which ends at `position`."""

    @abstractmethod
    def may_be_unsynced(self, loaded: Loaded) -> bool:
        """Whether a file that was not sealed may hold something that is not on disk yet."""

    @abstractmethod
    def check_payload(self, loaded: Loaded) -> None:
        """ValueError unless `loaded`, which has no bad bytes and is compact, verifies in full as an artifact's payload."""

    @abstractmethod
    def check(
        self,
        handle: ReadHandle,
        size: int,
        *,
        tail_may_be_torn: bool,
        known: Known | None = None,
        progress: Progress | None = None,
    ) -> VerifyReport:
        """Check every invariant of a file up to `size`. `known`: what its writer, in this process, knows of it.

        InvalidFormatError if it is not of this format; LogChangedError if it ends before `size`.
        """

    @abstractmethod
    def walk(self, handle: ReadHandle, size: int) -> Iterator[Stretch]:
        """All of a file up to `size`, damaged or not, in stretches without a gap. Errors: as `check`."""

    @abstractmethod
    def facts(self, loaded: Loaded) -> FileFacts:
        """What `loaded` tells of itself."""

    def __repr__(self) -> str:
        return f"<LogFormat {self.name}>"
