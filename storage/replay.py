"""A log into a fold: what opening does, for a writer (`open_log`) and for those who only read (`load`).

Opening never destroys. Damage is refused, with path, offset and reason, and the file stays as it was. A torn tail, which a
stopped writer leaves, is set aside beside the log before it is cut. Only the holder of the writer's lock repairs.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

import msgpack

from foldlog.protocol.errors import CorruptLogError, InvalidFormatError, LogChangedError, LogRegressedError, StoreLocked
from foldlog.protocol.frames import (
    FILE_HEAD,
    FRAME_HEAD,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    KIND_SEAL,
    FileHead,
    FrameHead,
    parse_file_head,
)
from foldlog.protocol.tokens import MAX_TOKEN_BYTES, WatchCursor
from foldlog.protocol.updates import DecodedBatch, decode_batches
from foldlog.storage.base import Base
from foldlog.storage.delta import EMPTY_DELTA, Run
from foldlog.storage.files import Files, ReadHandle, read_all, remove_quietly, write_all
from foldlog.storage.fold import FoldSnapshot
from foldlog.storage.lock import WriterLock, beside, sweep_temporaries, temporary
from foldlog.storage.log import Log, LogFile, boot_id
from foldlog.storage.recovery import Verdict, gather, judge
from foldlog.storage.rewrite import FrameWriter, Progress, new_head, write_base
from foldlog.storage.scan import BadFrame, Chain, read_frames

NO_CURSOR = WatchCursor.none()
OnDamage: TypeAlias = Literal["refuse", "cut"]
SETTLE_ENTRIES = 65_536
"""Changes that replay collects before they settle: nobody reads meanwhile, so larger pieces of work do no harm."""


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
    """Where the cut bytes are kept."""
    compacted: bool = False
    """Opening compacted the log."""
    rewritten: bool = False
    """An earlier fsync had failed, so the fold was written to a new file."""


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
    boot: str
    """The boot id of the last OPEN frame; "" if there is none."""
    sealed: bool
    bad: BadFrame | None


def read_head(handle: ReadHandle) -> FileHead:
    """The head of a log file. InvalidFormatError if it is none, or of a newer format."""
    raw = handle.files.read(handle.fd, FILE_HEAD.size, 0)
    try:
        return parse_file_head(raw)
    except ValueError as error:
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
        self._delta = EMPTY_DELTA
        self._collected = Run()
        self._seq = head.base_seq
        self._cursor = WatchCursor.none()

    def feed(self, frame: FrameHead, body: memoryview) -> list[DecodedBatch]:
        """Take the next frame; returns its batches. ValueError if its body is not what its kind says."""
        batches: list[DecodedBatch] = []
        if (frame.kind in (KIND_LEAF, KIND_BASE_END)) == bool(self.base_end):
            raise ValueError("a frame of the base behind its end" if self.base_end else "a frame before the end of the base")
        if frame.kind == KIND_LEAF:
            self.base.add_leaf(frame.offset + FRAME_HEAD.size, body, frame.body_crc)
        elif frame.kind == KIND_BASE_END:
            self._cursor = _end_of_base(body, self.base)
            self.base_end = frame.offset + frame.size
        elif frame.kind == KIND_BATCHES:
            batches = decode_batches(body)
            if len(batches) != frame.batches:
                raise ValueError(f"{len(batches)} batches, but the head says {frame.batches}")
            for batch in batches:
                for changes in batch.changes():
                    self._collected.update(changes)
            self._cursor = batches[-1].cursor
            if len(self._collected) >= SETTLE_ENTRIES:
                self._delta = self._delta.with_runs((self._collected,))
                self._collected = Run()
        elif frame.kind == KIND_OPEN:
            self.boot = _boot_of(body)
        self.sealed = frame.kind == KIND_SEAL
        self._seq = frame.seq
        self.frames += 1
        return batches

    def fold(self) -> FoldSnapshot:
        """The state after all frames so far."""
        delta, runs = self._delta, (self._collected,) if self._collected else ()
        if len(self._collected) >= SETTLE_ENTRIES // 8:
            delta, runs = delta.with_runs(runs), ()
        return FoldSnapshot(self.base, delta, runs, self._seq, self._cursor)


def _end_of_base(body: memoryview, base: Base) -> WatchCursor:
    try:
        end = msgpack.unpackb(body, max_map_len=8)
        cursor, leaves, entries, digest = end["cursor"], end["leaves"], end["entries"], end["digest"]
    except Exception as error:
        raise ValueError(f"an undecodable end of the base: {type(error).__name__}") from None
    if type(cursor) is not bytes or len(cursor) > MAX_TOKEN_BYTES or type(digest) is not bytes:
        raise ValueError("the end of the base has a bad field")
    if leaves != len(base) or entries != base.entries:
        raise ValueError(f"the base has {len(base)} leaves and {base.entries} entries, but its end says {leaves} and {entries}")
    return WatchCursor(cursor)


def _boot_of(body: memoryview) -> str:
    try:
        boot = msgpack.unpackb(body, max_map_len=8)["boot"]
    except Exception as error:
        raise ValueError(f"an undecodable OPEN frame: {type(error).__name__}") from None
    if type(boot) is not str:
        raise ValueError("an OPEN frame without a boot id")
    return boot


def load(handle: ReadHandle, progress: Progress | None = None) -> Loaded:
    """Read a log file to its end, or to the first bad frame, which is returned and not judged.

    Cost: 1,000,000 entries of 100 bytes take 30 ms compacted, 0.6 s in batches (measured with the file in the page cache).
    """
    head = read_head(handle)
    size = handle.files.fstat(handle.fd).st_size
    chain = Chain.start(head)
    replay = Replay(handle, head)
    bad: BadFrame | None = None
    try:
        for frame, body in read_frames(handle, head, chain, size):
            try:
                replay.feed(frame, body)
            except ValueError as error:
                raise BadFrame(frame.offset, str(error), final=True) from None
            chain = chain.after(frame)
            if progress is not None:
                progress(frame.offset + frame.size, size)
    except BadFrame as error:
        bad = error
    if bad is None and not replay.base_end:
        bad = BadFrame(chain.offset, "the file ends before the base does", final=True)
    return Loaded(head, replay.fold(), chain, size, replay.base_end, replay.frames, replay.boot, replay.sealed, bad)


def diagnose(handle: ReadHandle, loaded: Loaded) -> tuple[Verdict, str]:
    """Whether what follows the last good frame of `loaded` is torn or corrupt, and the reason."""
    bad = loaded.bad
    assert bad is not None
    if bad.final:
        return Verdict.CORRUPT, bad.reason
    if not loaded.base_end:
        return Verdict.CORRUPT, f"the base is damaged: {bad.reason}"  # it was synced before it got its name
    try:
        rest = handle.read(loaded.size - bad.offset, bad.offset)
    except EOFError as error:
        raise LogChangedError(handle.path, str(error)) from None
    verdict, why = judge(
        gather(rest, bad.offset, loaded.head.seed, loaded.chain.seq, bool(loaded.boot) and loaded.boot == boot_id())
    )
    return verdict, f"{why} ({bad.reason})"


def load_intact(handle: ReadHandle, progress: Progress | None = None) -> Loaded:
    """`load`, for one that only reads: CorruptLogError or InvalidFormatError for damage; a torn tail is left out."""
    loaded = load(handle, progress)
    if loaded.bad is not None:
        verdict, why = diagnose(handle, loaded)
        if verdict is Verdict.CORRUPT:
            raise damage_error(handle.path, loaded, why)
    return loaded


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


def open_log(
    path: Path,
    files: Files,
    *,
    on_damage: OnDamage = "refuse",
    sync_each: bool = False,
    progress: Progress | None = None,
    lock: WriterLock | None = None,
) -> tuple[Log, FoldSnapshot, OpenReport]:
    """Open or create the log at `path` (absolute, links resolved) for writing. `lock`: held already, and kept on an error.

    StoreLocked, CorruptLogError, InvalidFormatError, LogRegressedError or OSError, with the file as it was.
    """
    if on_damage not in ("refuse", "cut"):
        raise ValueError(f'on_damage is "refuse" or "cut", not {on_damage!r}')
    if files.exists(path):
        files.close(files.open_read(path))  # OSError for a device or a folder, before a lock file is made beside it
    given_lock, lock = lock, lock or WriterLock(files, path)
    fd = -1
    try:
        sweep_temporaries(files, path)
        created = not files.exists(path)
        if created:
            create_log(path, files)
        handle = ReadHandle(files, path)
        fd = files.open_write(path)
        if not files.lock(fd):
            raise StoreLocked(path, None)  # under another name: a hard link
        loaded = load(handle, progress)
        cut_reason = ""
        if loaded.bad is not None:
            verdict, cut_reason = diagnose(handle, loaded)
            if verdict is Verdict.CORRUPT and (on_damage == "refuse" or not loaded.base_end or loaded.bad.unsupported):
                raise damage_error(path, loaded, cut_reason)
        mark = lock.watermark
        if on_damage == "refuse" and mark is not None and mark.log_id == loaded.head.log_id and mark.seq > loaded.chain.seq:
            raise LogRegressedError(path, f"ends with batch {loaded.chain.seq}, but batch {mark.seq} was synced to it")
        kept_at, cut_bytes = None, 0
        if loaded.bad is not None:
            kept_at, cut_bytes = _set_aside(files, path, fd, handle, loaded)
        log = Log(files, path, lock, LogFile(loaded.head, fd, handle, loaded.chain, loaded.base_end, False), sync_each=sync_each)
    except BaseException:
        if fd >= 0:
            files.close(fd)
        if given_lock is None:
            lock.release()
        raise
    try:
        if files.exists(beside(path, "poison")):
            log.poison = "an fsync failed in an earlier process"
        elif not loaded.sealed and loaded.chain.seq > loaded.head.base_seq:
            log.sync()  # what a killed writer left may stand in the page cache only
    except BaseException:
        log.abandon(keep_lock=given_lock is not None)
        raise
    report = OpenReport(
        path,
        created,
        loaded.chain.offset,
        loaded.frames,
        loaded.fold.base.entries,
        loaded.chain.seq - loaded.head.base_seq,
        loaded.chain.seq,
        loaded.fold.cursor(),
        loaded.sealed,
        cut_bytes,
        cut_reason,
        kept_at,
    )
    return log, loaded.fold, report


def create_log(path: Path, files: Files) -> None:
    """Make an empty log at `path`, whole or not at all. FileExistsError if the name is taken."""
    out = FrameWriter(files, temporary(path), new_head())
    try:
        write_base(out, FoldSnapshot.empty())
        out.sync()
        files.link_new(out.path, path)
        files.sync_dir(path.parent)
    finally:
        out.discard()


def _set_aside(files: Files, path: Path, fd: int, handle: ReadHandle, loaded: Loaded) -> tuple[Path, int]:
    """Keep what follows the last good frame in a file of its own, durably, and only then cut it off."""
    start = loaded.chain.offset
    size = files.fstat(fd).st_size
    number = 1
    while True:
        kept_at = beside(path, f"torn-{loaded.chain.seq}-{number}")
        with contextlib.suppress(FileExistsError):
            copy = files.create(kept_at, exclusive=True)
            break
        number += 1
    try:
        step = 1024 * 1024
        for at in range(start, size, step):
            write_all(files, copy, read_all(files, handle.fd, min(step, size - at), at), at - start)
        files.sync(copy)
    except BaseException:
        files.close(copy)
        remove_quietly(files, kept_at)
        raise
    files.close(copy)
    files.sync_dir(path.parent)
    files.truncate(fd, start)
    files.sync(fd)  # or a later append could mix with what was cut, sector by sector
    return kept_at, size - start
