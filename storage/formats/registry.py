"""What differs between file formats, and what a log, a rewrite and opening need of each.

    foldlog          frames, leaves, a chain       log.py, rewrite.py, replay.py
    slipstream-v2    the origin's records          slipstream.py, slipstream_log.py

Everything else exists once, whatever the format: the lock, the check that a file is unchanged, the undoing of a failed write, the
poison, the swap at the end of a rewrite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias

from foldlog.protocol.frames import FileHead
from foldlog.protocol.store import FormatName
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.log.files import Files, ReadHandle, remove_quietly, write_all
from foldlog.storage.log.recovery import Verdict
from foldlog.storage.log.scan import BadFrame, Chain

BUFFER_BYTES = 1024 * 1024
PRIVATE = 0o600
"""The mode of a new file that is to hold what another file holds, until it has that file's."""
Progress: TypeAlias = Callable[[int, int], None]
"""Told of long work as it goes on: (done, total), in entries or bytes."""


class LogFile(NamedTuple):
    """An open log file, as opening or a rewrite hands it to its `Log`."""

    format: LogFormat
    head: FileHead
    """As it stands in the file; made up in memory for a format without ids."""
    fd: int
    """To write; locked, so that a hard link to the file finds it taken."""
    handle: ReadHandle
    """To read, shared with the snapshots."""
    chain: Chain
    """Behind its last write."""
    base_end: int
    """The offset behind its base."""
    session: bool
    """It holds what this writer's session begins with."""


class Known(NamedTuple):
    """What a writer that is opened again remembers of a file: where its base ends, and who it is."""

    head: FileHead
    base_end: int


class Loaded(NamedTuple):
    """What was read from a log file, up to its end or its first bad frame."""

    head: FileHead
    fold: FoldSnapshot
    chain: Chain
    size: int
    """Of the file, when reading began: a writer may have appended since."""
    base_end: int
    """The offset behind the base; 0 if the base is not whole."""
    frames: int
    """Frames, or records."""
    boot: str
    """The boot id of the last OPEN frame; "" if there is none."""
    sealed: bool
    bad: BadFrame | None
    format: LogFormat
    base_entries: int


class Codec(Protocol):
    """How one log's appends look in its file: the bytes, and where the log stands behind them. No I/O."""

    def group(self, items: Sequence[bytes], chain: Chain, synced_seq: int) -> tuple[bytes, Chain]:
        """A commit group: the encoded batches `items`."""

    def opening(self, chain: Chain, synced_seq: int) -> tuple[bytes, Chain] | None:
        """What a session writes before its first group, if anything."""

    def seal(self, chain: Chain, synced_seq: int) -> tuple[bytes, Chain] | None:
        """What a clean close writes, if anything, when all before it is synced."""


class NewFile(ABC):
    """A new log file, written front to back under a temporary name."""

    def __init__(
        self,
        files: Files,
        path: Path,
        head: FileHead,
        first: bytes,
        chain: Chain,
        mode: int = PRIVATE,
    ) -> None:
        """`first`: the bytes of the file's header, written with what follows; `chain` is after
        them.

        `mode`: of the file. Whoever makes it lets in others, before anything is written.
        """
        self.files, self.path, self.head, self.chain = files, path, head, chain
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
    def carry(self, source: LogFile, chain: Chain, stop: int) -> Chain:
        """Append what stands in `source`, of the same format, from `chain` to `stop`. Returns the chain at `stop`."""

    @abstractmethod
    def fold_with(self, since: FoldSnapshot) -> FoldSnapshot:
        """The fold that was written, with what was committed `since` on top of it."""

    def log_file(self, format: LogFormat, handle: ReadHandle) -> LogFile:
        """This file, as a log goes on in it. `handle` reads it; the fold that was written reads from there, too."""
        return LogFile(format, self.head, self.fd, handle, self.chain, self.base_end, self.session)

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
    backend: str
    """How an artifact's manifest names it, with `backend_version`."""
    backend_version: str
    payload_path: str
    """The file of its artifacts that holds the state."""
    keeps_origin = True
    """Its batches name the upstream of their cursor. If not, `storage/log/origins.py` does, beside the log."""

    @abstractmethod
    def codec(self, head: FileHead, *, sync_each: bool) -> Codec:
        """For appends to the file with this head. `sync_each`: each is synced before the next is written."""

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
        """Read a file of this format to its end, or to the first bad frame, which is returned and not judged.

        InvalidFormatError if its head is not of this format. `known`: what this process knows of it from before.
        """

    @abstractmethod
    def diagnose(self, handle: ReadHandle, loaded: Loaded) -> tuple[Verdict, str]:
        """Whether what follows the last good frame of `loaded` is torn or corrupt, and the reason."""

    @abstractmethod
    def is_compact(self, head: FileHead, base_end: int, chain: Chain) -> bool:
        """Whether nothing of meaning stands behind the base."""

    @abstractmethod
    def may_be_unsynced(self, loaded: Loaded) -> bool:
        """Whether a file that was not sealed may hold something that is not on disk yet."""

    @abstractmethod
    def check_payload(self, loaded: Loaded) -> None:
        """ValueError unless `loaded`, which has no bad frame and is compact, verifies in full as an artifact's payload."""

    def __repr__(self) -> str:
        return f"<LogFormat {self.name}>"
