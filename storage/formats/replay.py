"""A log into a fold, for a writer (`opening.py`) and for those who only read (`load`). Nothing is changed here.

The format is told by the file's head. Here is how foldlog's own is read; the other is in `slipstream_log.py`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from foldlog.protocol.errors import (
    CorruptLogError,
    InvalidFormatError,
    LogChangedError,
    LogRegressedError,
)
from foldlog.protocol.frames import (
    FILE_HEAD,
    FORMAT_VERSION,
    FRAME_HEAD,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    KIND_SEAL,
    FileHead,
    FrameHead,
    parse_base_end,
    parse_base_origin,
    parse_file_head,
    parse_open,
)
from foldlog.protocol.options import OnDamage as OnDamage
from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.undecodable import Undecodable
from foldlog.protocol.updates import DecodedBatch, decode_batches
from foldlog.storage.fold import leaf
from foldlog.storage.fold.base import Base
from foldlog.storage.fold.collector import no_full_collections
from foldlog.storage.fold.delta import Collected
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats import slipstream
from foldlog.storage.formats.registry import PRIVATE, Known, LogFormat
from foldlog.storage.formats.registry import Loaded as Loaded
from foldlog.storage.formats.rewrite import FrameWriter, Progress, new_head
from foldlog.storage.formats.slipstream_log import SLIPSTREAM
from foldlog.storage.log.files import Files, ReadHandle
from foldlog.storage.log.log import FrameCodec, boot_id
from foldlog.storage.log.note import Watermark
from foldlog.storage.log.recovery import Rest, Verdict, gather, judge
from foldlog.storage.log.regression import lost_since, regression_text
from foldlog.storage.log.scan import BadFrame, Chain, read_frames

NO_CURSOR = WatchCursor.none()


@dataclass(frozen=True, slots=True)
class OpenReport:
    """What opening a log found and did."""

    path: Path
    created: bool = False
    """There was no file; an empty log was made."""
    size: int = 0
    """Bytes of the file that hold, after any cut."""
    frames: int = 0
    entries: int = 0
    """Entries of the base."""
    batches: int = 0
    """Batches replayed on top of the base."""
    seq: int = 0
    cursor: WatchCursor = NO_CURSOR
    sealed: bool = False
    """The last writer closed it cleanly."""
    cut_bytes: int = 0
    """Bytes of a torn tail (or, with on_damage="cut", of damage) that were cut off."""
    cut_reason: str = ""
    kept_at: Path | None = None
    """Where the cut bytes are kept; None if nothing was cut, or nothing but zeros."""
    compacted: bool = False
    """Opening compacted the log."""
    compaction_error: str = ""
    """Why it could not (no room, no right to write beside it), in `AppendLogSnapshot.open`. The log is served as it is."""
    rewritten: bool = False
    """An earlier fsync had failed, so the fold was written to a new file."""
    missing_batches: int = 0
    """Batches that were synced to the log of which this is a copy, and that the copy does not hold:
    its directory was copied while it was written to. 0 also where the original's note was not
    copied along."""


def read_head(handle: ReadHandle) -> FileHead:
    """The head of a log file. InvalidFormatError if it is none, or of a newer format."""
    raw = handle.files.read(handle.fd, FILE_HEAD.size, 0)
    try:
        return parse_file_head(raw)
    except ValueError as error:
        check_own_format(handle)
        raise InvalidFormatError(handle.path, 0, str(error)) from None


class Replay:
    """Frames on their way into a fold: the base first, then batch by batch."""

    def __init__(self, handle: ReadHandle, head: FileHead) -> None:
        self._handle = handle
        self.base = Base(handle)
        self.base_end = 0
        self.boot = ""
        self.sealed = False
        self.frames = 0
        self._collected = Collected()
        self._seq = head.base_seq
        self._cursor = WatchCursor.none()
        self._origin = b""

    def feed(self, frame: FrameHead, body: memoryview) -> list[DecodedBatch]:
        """Take the next frame; returns its batches. Undecodable if its body is not what its kind
        says."""
        batches: list[DecodedBatch] = []
        if (frame.kind in (KIND_LEAF, KIND_BASE_END)) == bool(self.base_end):
            raise Undecodable(
                "a frame of the base behind its end"
                if self.base_end
                else "a frame before the end of the base"
            )
        if frame.kind == KIND_LEAF:
            self.base.add_leaf(frame.offset + FRAME_HEAD.size, body, frame.body_crc)
        elif frame.kind == KIND_BASE_END:
            self._cursor = _end_of_base(body, self.base)
            self._origin = parse_base_origin(body)
            self.base_end = frame.offset + frame.size
        elif frame.kind == KIND_BATCHES:
            batches = decode_batches(body, frame.batches)
            for batch in batches:
                for changes in batch.changes():
                    self._collected.add(changes)
            self._cursor, self._origin = batches[-1].cursor, batches[-1].origin
        elif frame.kind == KIND_OPEN:
            self.boot = parse_open(body)
        self.sealed = frame.kind == KIND_SEAL
        self._seq = frame.seq
        self.frames += 1
        return batches

    def fold(self) -> FoldSnapshot:
        """The state after all frames so far."""
        collected = self._collected.settled()
        return FoldSnapshot(self.base, *collected, self._seq, self._cursor, self._origin)


def _end_of_base(body: memoryview, base: Base) -> WatchCursor:
    cursor, leaves, entries, digest = parse_base_end(body)
    if leaves != len(base) or entries != base.entries:
        raise Undecodable(
            f"the base has {len(base)} leaves and {base.entries} entries, but its end says {leaves} and {entries}"
        )
    base.digest = digest
    return cursor


def load(
    handle: ReadHandle, progress: Progress | None = None, known: Known | None = None
) -> Loaded:
    """Read a log file, of the format that its head tells, to its end or to the first bad frame, which is returned and not judged.

    Cost: 1,000,000 entries of 100 bytes take 30 ms compacted, 0.6 s in batches (measured with the file in the page cache).
    The other format: 2 s.
    """
    return format_of(handle).load(handle, progress, known)


def format_of(handle: ReadHandle) -> LogFormat:
    """The format of a log file, by its first bytes; foldlog's own for a file of no format, which it will refuse."""
    first = handle.files.read(handle.fd, len(slipstream.MAGIC), 0)
    return SLIPSTREAM if first == slipstream.MAGIC else FRAMES


def check_own_format(handle: ReadHandle) -> None:
    """InvalidFormatError, with the remedy, for a log of another format than foldlog's own: for who reads frames only."""
    found = format_of(handle)
    if found is not FRAMES:
        raise InvalidFormatError(
            handle.path,
            0,
            f"a log of the format {found.name}, for which this is not supported: "
            "`foldlog convert` makes a foldlog log of it",
        )


class FrameFormat(LogFormat):
    """foldlog's own format: `protocol/frames.py`."""

    name = "foldlog"
    backend = "foldlog"
    backend_version = str(FORMAT_VERSION)
    payload_path = "data/fold.log"

    def codec(self, head: FileHead, *, sync_each: bool) -> FrameCodec:
        return FrameCodec(head, sync_each=sync_each)

    def new_file(
        self,
        files: Files,
        path: Path,
        *,
        seq: int,
        log_id: bytes | None = None,
        sync_each: bool = False,
        mode: int = PRIVATE,
    ) -> FrameWriter:
        return FrameWriter(files, path, new_head(log_id, seq), sync_each=sync_each, mode=mode)

    def is_compact(self, head: FileHead, base_end: int, chain: Chain) -> bool:
        return (
            chain.seq == head.base_seq
        )  # what opens and seals a session takes bytes, and means nothing

    def may_be_unsynced(self, loaded: Loaded) -> bool:
        return loaded.chain.offset > loaded.base_end

    def load(
        self, handle: ReadHandle, progress: Progress | None = None, known: Known | None = None
    ) -> Loaded:
        head = read_head(handle)
        size = handle.files.fstat(handle.fd).st_size
        chain = Chain.start(head)
        replay = Replay(handle, head)
        bad: BadFrame | None = None
        try:
            with no_full_collections():
                for frame, body in read_frames(handle, head, chain, size):
                    try:
                        replay.feed(frame, body)
                    except Undecodable as error:
                        raise BadFrame(frame.offset, str(error), final=True) from None
                    chain = chain.after(frame)
                    if progress is not None:
                        progress(frame.offset + frame.size, size)
        except BadFrame as error:
            bad = error
        if bad is None and not replay.base_end:
            bad = BadFrame(chain.offset, "the file ends before the base does", final=True)
        fold = replay.fold()
        return Loaded(
            head,
            fold,
            chain,
            size,
            replay.base_end,
            replay.frames,
            replay.boot,
            replay.sealed,
            bad,
            self,
            fold.base.entries,
        )

    def diagnose(self, handle: ReadHandle, loaded: Loaded) -> tuple[Verdict, str]:
        bad = loaded.bad
        assert bad is not None
        if bad.final:
            return Verdict.CORRUPT, bad.reason
        if not loaded.base_end:
            return (
                Verdict.CORRUPT,
                f"the base is damaged: {bad.reason}",
            )  # it was synced before it got its name
        rest = Rest(handle, bad.offset, loaded.size - bad.offset)
        same_boot = bool(loaded.boot) and loaded.boot == boot_id()
        try:
            verdict, why = judge(
                gather(rest, bad.offset, loaded.head.seed, loaded.chain.seq, same_boot)
            )
        except EOFError as error:
            raise LogChangedError(handle.path, str(error)) from None
        return verdict, f"{why} ({bad.reason})"

    def check_payload(self, loaded: Loaded) -> None:
        base = loaded.fold.base
        last_key = None
        digest = blake3()
        for number in range(len(base)):
            body = base.body(number)
            keys = leaf.check_order(body)
            if last_key is not None and keys[0] <= last_key:
                raise Undecodable(f"leaf {number} overlaps the one before it")
            last_key = keys[-1]
            digest.update(body)
        if digest.digest() != base.digest:
            raise Undecodable("the digest of the leaves is not what the end of the base says")


FRAMES = FrameFormat()
FORMATS: dict[FormatName, LogFormat] = {format.name: format for format in (FRAMES, SLIPSTREAM)}


def diagnose(handle: ReadHandle, loaded: Loaded) -> tuple[Verdict, str]:
    """Whether what follows the last good frame of `loaded` is torn or corrupt, and the reason."""
    return loaded.format.diagnose(handle, loaded)


def load_intact(handle: ReadHandle, progress: Progress | None = None) -> Loaded:
    """`load`, for one that only reads: CorruptLogError or InvalidFormatError for damage; a torn
    tail is left out.

    LogRegressedError for a log that ends before what the note beside it remembers as synced.
    """
    loaded = _undamaged(handle, progress)
    if regressed(handle, loaded) is None:
        return loaded
    loaded = _undamaged(handle, progress)  # its writer may have been about to end the last frame
    if (mark := regressed(handle, loaded)) is not None:
        raise LogRegressedError(handle.path, regression_text(handle.path, loaded.chain.seq, mark))
    return loaded


def _undamaged(handle: ReadHandle, progress: Progress | None) -> Loaded:
    loaded = load(handle, progress)
    if loaded.bad is not None:
        verdict, why = diagnose(handle, loaded)
        if verdict is Verdict.CORRUPT:
            raise damage_error(handle.path, loaded, why)
    return loaded


def regressed(handle: ReadHandle, loaded: Loaded) -> Watermark | None:
    """What the note beside the log remembers as synced, if `loaded` lost some of it."""
    return lost_since(handle, loaded.head.log_id, loaded.chain.seq, loaded.size)


def damage_error(path: Path, loaded: Loaded, why: str) -> CorruptLogError | InvalidFormatError:
    """The error for a log whose first bad frame is no torn tail."""
    assert loaded.bad is not None
    kind = InvalidFormatError if loaded.bad.unsupported else CorruptLogError
    if not loaded.base_end:
        return kind(path, loaded.bad.offset, why)
    return kind(path, loaded.bad.offset, why, loaded.fold.seq, bytes(loaded.fold.cursor()))


def resolve(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a log, links followed. FileNotFoundError for a link that leads nowhere."""
    given = Path(os.fsdecode(path) if isinstance(path, bytes) else path)
    real = Path(os.path.realpath(given))
    if given.is_symlink() and not real.exists():
        raise FileNotFoundError(2, "the link leads nowhere", str(given))
    return real
