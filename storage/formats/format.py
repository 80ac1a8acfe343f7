"""The seam between a log and the format of its file: batches, bases and positions.

Each format is a package beside this module, and a row of the table in `registry.py`. Everything
else exists once for all formats: the lock, the check that a file is unchanged, the undoing of a
failed write, the poison, the swap at the end of a rewrite.
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
from foldlog.storage.fold.reading import Writable
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.log.files import Files, ReadHandle, remove_quietly, write_all

BUFFER_BYTES = 1024 * 1024
PRIVATE = 0o600
"""The mode of a new file with another file's content, until it is given that file's access."""
Progress: TypeAlias = Callable[[int, int], None]
"""Called during long work with (done, total), in entries or bytes."""


class Header(Protocol):
    """Which log a file belongs to, and the sequence of its base. Each format has its own class."""

    @property
    def log_id(self) -> bytes:
        """16 random bytes, constant; if the format stores none, only while this process lives."""

    @property
    def base_seq(self) -> int:
        """The sequence of the base."""


class Position(Protocol):
    """A place between two batches of a log. Each format has its own class."""

    @property
    def offset(self) -> int:
        """In the file, in bytes."""

    @property
    def seq(self) -> int:
        """The sequence of the last batch before it."""

    @property
    def synced_seq(self) -> int:
        """The last batch that was synced according to the file itself; 0 if it does not say."""


class Verdict(enum.Enum):
    """What the bytes after the last valid one are."""

    TORN = "torn"
    """The remains of a stopped writer's last write: they are cut."""
    CORRUPT = "corrupt"
    """Damage to written data: the log is refused."""


class BadBytes(Exception):
    """The bytes at `offset` are not what must come next.

    `final`: no torn write explains them. `unsupported`: a newer foldlog wrote them.
    """

    def __init__(self, offset: int, reason: str, *, final: bool, unsupported: bool = False) -> None:
        super().__init__(offset, reason)
        self.offset, self.reason, self.final, self.unsupported = offset, reason, final, unsupported


class LogFile(NamedTuple):
    """An open log file, as an open or a rewrite hands it to its `Log`."""

    format: LogFormat
    header: Header
    fd: int
    """For writing; locked, so that the file cannot be opened for writing through a hard link."""
    handle: ReadHandle
    """For reading; shared with the snapshots."""
    position: Position
    """After its last write."""
    base_end: int
    """The offset after its base."""
    session: bool
    """True if this writer's session has begun in it."""


class Known(NamedTuple):
    """What a writer that is opened again remembers of a file that does not record it."""

    header: Header
    base_end: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was read from a log file, up to its end or first bad bytes. A format may add fields."""

    format: LogFormat
    header: Header
    fold: FoldSnapshot
    position: Position
    size: int
    """Of the file in bytes, when reading began: a writer may have appended since."""
    base_end: int
    """The offset after the base; 0 if the base is incomplete."""
    base_entries: int
    parts: int
    """Frames or records: whatever the format checks one by one."""
    sealed: bool
    """True if the last writer closed the log cleanly, and the format records that."""
    bad: BadBytes | None
    """The first bad bytes; None if the file is valid to its end."""


class FileFacts(NamedTuple):
    """What a file records about itself; None for what its format does not have."""

    log_id: str | None
    generation: str | None
    seq: int | None
    leaves: int | None
    sealed: bool | None


class Problem(NamedTuple):
    """A fault in a log."""

    offset: int
    """Where the frame, or the stretch of bytes, begins."""
    size: int
    """Of the frame or stretch, in bytes; 0 if something is missing there."""
    reason: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found; `ok` sums it up."""

    path: Path
    size: int
    """Bytes checked."""
    frames: int
    """Valid frames or records. The next five fields count only what is valid, too."""
    leaves: int
    entries: int
    """Of the base."""
    batches: int
    """After the base."""
    seq: int
    cursor: WatchCursor
    sealed: bool
    torn_bytes: int
    """Of the torn tail: legal, and cut when the log is next opened for writing."""
    torn_reason: str
    problems: tuple[Problem, ...]
    """All faults, by offset."""

    @property
    def ok(self) -> bool:
        """True if there are no problems. A torn tail is not a problem."""
        return not self.problems


class Stretch(Protocol):
    """A stretch of a file, as `LogFormat.walk` yields it. Each format has its own class."""

    @property
    def offset(self) -> int:
        """Where it begins."""

    @property
    def is_damage(self) -> bool:
        """True if it is neither valid nor a torn tail."""


class Codec(Protocol):
    """Encodes what is appended to one log: the bytes, and the position after them. No I/O.

    A `position` comes from this codec or its format.
    """

    def group(
        self, items: Sequence[bytes], position: Any, synced_seq: int
    ) -> tuple[bytes, Position]:
        """A commit group of the encoded batches `items`. Batches up to `synced_seq` are synced."""

    def opening(self, position: Any, synced_seq: int) -> tuple[bytes, Position] | None:
        """What a session begins with, before its first group; None if nothing."""

    def seal(self, position: Any, synced_seq: int) -> tuple[bytes, Position] | None:
        """What a clean close writes once all before it is synced; None if nothing."""


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
        """Create the file. FileExistsError if `path` exists.

        `first`: the file header, written with what follows; `position` is after it. `mode`: of the
        file; the caller may widen it before anything is written.
        """
        self.files, self.path, self.header, self.position = files, path, header, position
        self.fd = files.create(path, exclusive=True, mode=mode)
        self.base_end = 0
        """The offset after the fold that was written."""
        self.session = False
        """True if a session has begun: something was carried over."""
        self._buffer: list[bytes] = [first]
        self._buffered = len(first)
        self._written = 0

    @abstractmethod
    def write_fold(self, fold: Writable, progress: Progress | None = None) -> None:
        """Write `fold`, before anything else. Equal states give equal bytes, except for ids."""

    def keep_warm(self, fold: FoldSnapshot) -> None:  # noqa: B027 - not abstract
        """Take over what `fold`, which was written, has cached: hot keys stay hot in a compaction.

        A format that keeps all entries in memory has nothing to do.
        """

    @abstractmethod
    def carry(self, source: LogFile, start: Any, stop: int) -> Position:
        """Append what `source`, of the same format, holds from `start` to the offset `stop`.

        Returns the position in `source` at `stop`.
        """

    @abstractmethod
    def fold_with(self, since: FoldSnapshot) -> FoldSnapshot:
        """The fold that was written, with what was committed `since` on top."""

    def log_file(self, format: LogFormat, handle: ReadHandle) -> LogFile:
        """This file, for a `Log` to continue in. The written fold reads through `handle`, too."""
        return LogFile(
            format, self.header, self.fd, handle, self.position, self.base_end, self.session
        )

    def put(self, data: bytes) -> None:
        """Add to the buffer; write it out when it is full."""
        self._buffer.append(data)
        self._buffered += len(data)
        if self._buffered >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the buffer out to the operating system."""
        data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
        if data:
            write_all(self.files, self.fd, data, self._written)
        self._written += len(data)
        self._buffer, self._buffered = [], 0

    def sync(self) -> None:
        """Flush, and make all of it survive a power loss."""
        self.flush()
        self.files.sync(self.fd)

    def discard(self) -> None:
        """Close the file, and remove its temporary name."""
        try:
            self.files.close(self.fd)
        finally:
            remove_quietly(self.files, self.path)


class LogFormat(ABC):
    """One file format. Stateless; there is one instance of each."""

    name: FormatName
    magic: bytes
    """What its files begin with."""
    backend: str
    """Its name in an artifact's manifest, with `backend_version`."""
    backend_version: str
    payload_path: str
    """The file in its artifacts that holds the state."""
    keeps_origin = True
    """True if batches record the upstream of their cursor. If not, a file beside the log does:
    `storage/log/sidecars/origins.py`."""

    @abstractmethod
    def codec(self, header: Any, *, sync_each: bool) -> Codec:
        """A codec for the file with this header. `sync_each`: each append is synced before the
        next."""

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
        """Create a file at `path` whose base is at batch `seq`. `log_id` None: of a new log.

        FileExistsError if `path` exists.
        """

    @abstractmethod
    def load(
        self, handle: ReadHandle, progress: Progress | None = None, known: Known | None = None
    ) -> Loaded:
        """Read a file to its end, or to its first bad bytes, which are returned and not judged.

        `known`: what this process remembers of it. InvalidFormatError if its header is not of this
        format; LogChangedError if it becomes shorter meanwhile; OSError.
        """

    @abstractmethod
    def diagnose(self, handle: ReadHandle, loaded: Loaded) -> tuple[Verdict, str]:
        """Judge what follows the last valid bytes of `loaded`. Returns the verdict and the reason.

        LogChangedError if the file becomes shorter meanwhile.
        """

    @abstractmethod
    def is_compact(self, file: LogFile, position: Any) -> bool:
        """True if no batch follows the base of `file`, which ends at `position`."""

    @abstractmethod
    def may_be_unsynced(self, loaded: Loaded) -> bool:
        """True if `loaded`, which is not sealed, may hold something that is not synced yet."""

    @abstractmethod
    def check_payload(self, loaded: Loaded) -> None:
        """ValueError unless `loaded` is valid in full as an artifact's payload.

        It is compact and has no bad bytes.
        """

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
        """Check every invariant of a file up to `size`.

        `known`: what its writer, in this process, knows of it. InvalidFormatError if it is not of
        this format; LogChangedError if it ends before `size`; OSError.
        """

    @abstractmethod
    def walk(self, handle: ReadHandle, size: int) -> Iterator[Stretch]:
        """All of a file up to `size`, damaged or not, as stretches without gaps.

        Errors: those of `check`.
        """

    @abstractmethod
    def facts(self, loaded: Loaded) -> FileFacts:
        """What the file of `loaded` records about itself."""
