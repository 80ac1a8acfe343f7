"""Following a log that another process writes: frame by frame, with the same checks and the same
fold as its writer, but without repairing anything.

The chain and the generation tell what happened to the file:

- It grew: the new frames are read.
- A new file has its name, with the same log id: the log was compacted. The old file is first read
  to its end, so that no batch is missed or seen twice. A follower that is older than the new base
  takes the state from there.
- Another log id, a lower sequence, a shorter file, or batches other than those read: the log was
  rewound, which is reported.
- Half a frame: a write under way, which is waited for.
"""

from __future__ import annotations

import time
from math import inf
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

from foldlog.protocol.decoding import Undecodable
from foldlog.protocol.errors import (
    CorruptLogError,
    FoldlogError,
    InvalidFormatError,
    LogChangedError,
    LogRegressedError,
    RequestTimeout,
)
from foldlog.protocol.frames import (
    FRAME_HEADER,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    TRAILER,
    FileHeader,
    FrameHeader,
    parse_base_end,
    parse_frame_header,
    parse_open,
)
from foldlog.protocol.options import CACHE_BYTES
from foldlog.protocol.updates import SLICE, Change, DecodedBatch
from foldlog.storage.fold.diff import diff
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.foldlog.replay import FRAME_AFTER_BASE, Replay
from foldlog.storage.formats.registry import load_intact, read_own_header
from foldlog.storage.log.backlog import decoded
from foldlog.storage.log.files import Files, ReadHandle
from foldlog.storage.log.scan import BadFrame, Chain, read_frames
from foldlog.storage.log.sidecars.regression import lost_since

STALLED_POLLS = 5
"""Polls that find the same half a frame before it is judged. A writer needs milliseconds."""
STEP_BYTES = 4 * 1024 * 1024
"""One poll reads so much, or one frame: this bounds the memory of a follower that catches up."""
WINDOW_BYTES = 256 * 1024
"""Read by one call: small enough for a processor's cache."""
FRAMES_A_LOOK = 64
"""Frames read between two looks at the clock."""
NEWS_BYTES = 16 * 1024 * 1024
"""Batches of a new file that are reported one by one; if there are more, the follower jumps."""


class Advance(NamedTuple):
    """The log has grown. Without batches, it was compacted: `fold` is the same state in the new
    file."""

    fold: FoldSnapshot
    """The state after the batches."""
    first_seq: int
    length: int
    """The number of batches."""
    size: int
    """Of the batches in the log, in bytes."""
    batches: list[DecodedBatch] | None
    """None if they were not to be kept."""


class Jump(NamedTuple):
    """The state was read anew; the batches in between are not known."""

    fold: FoldSnapshot
    rewound: str
    """Why it went back, or to another log; "" if it went forward."""


class _Place(NamedTuple):
    """How far which file has been read."""

    handle: ReadHandle
    inode: tuple[int, int]
    header: FileHeader
    chain: Chain
    batches_chain: Chain | None
    """The chain after the last BATCHES frame; None if there was none."""
    batches_size: int
    """Size of that frame's body. A compaction copies the body: it identifies the batches."""

    def ends_with(self, body: memoryview) -> bool:
        """True if the last BATCHES frame has this body. Compares the bytes, since a checksum can be
        forged."""
        if self.batches_chain is None or len(body) != self.batches_size:
            return False
        start = self.batches_chain.offset - len(TRAILER) - self.batches_size
        try:
            return body == self.handle.read(self.batches_size, start)
        except EOFError:
            return False


class Tail:
    """A log that is being followed. Not thread-safe: one thread polls it."""

    def __init__(self, files: Files, path: Path, cache_bytes: int = CACHE_BYTES.default) -> None:
        self._files, self._path, self._cache_bytes = files, path, cache_bytes
        self._place: _Place | None = None
        self._before: _Place | None = None  # the place before the last poll, if that read on
        self._stalled = (0, 0)  # offset of half a frame, and the file's size when it was seen
        self._stalled_polls = 0  # how often it was seen
        self._patience = STALLED_POLLS  # how often it may be seen before it is judged
        # A file that was refused, by inode, size and time: not read again until it changes.
        self._refused: tuple[tuple[int, ...], FoldlogError] | None = None
        self.fold = FoldSnapshot.empty()
        self.keeps_batches = True
        """If not, an Advance comes without its batches, at less cost. `batches_again` reads them,
        until the next poll."""
        self.give_up_at = inf
        """When to raise RequestTimeout in the middle of reading (time.monotonic()). A later poll
        reads the rest."""
        self.written_at = 0.0
        """When the log was last written to, as far as it was read (time.time())."""
        self.missing = False
        """True if the last poll found no file at the path."""
        self.is_directory = False
        """True if the last poll found a directory there."""
        self.behind = False
        """True if there is more to read at once."""

    @property
    def started(self) -> bool:
        """True if a log has been found and read."""
        return self._place is not None

    def poll(self) -> Advance | Jump | None:
        """The next change since the last call; None if there is none.

        OSError, CorruptLogError, InvalidFormatError or LogRegressedError: call again later, no
        batch is lost. Cost: two system calls if nothing changed; 7 us for a frame of one update,
        11 us for one of ten, and a third more with `keeps_batches`.
        """
        self.behind, self._before = False, None
        try:
            return self._poll()
        except FileNotFoundError:
            self.missing = True  # removed between two system calls
            return None

    def batches_again(self) -> list[DecodedBatch]:
        """The batches of the last poll, read again, if it was an Advance in the same file.

        OSError or FoldlogError if they cannot be read any more.
        """
        before, after = self._before, self._place
        if before is None or after is None:
            return []
        frames = read_frames(before.handle, before.header, before.chain, after.chain.offset)
        try:
            return [
                batch
                for frame, body in frames
                if frame.kind == KIND_BATCHES
                for batch in decoded(frame, body)
            ]
        except BadFrame as bad:
            raise LogChangedError(self._path, f"changed at byte {bad.offset} meanwhile") from None

    def _poll(self) -> Advance | Jump | None:
        if self._place is not None and (step := self._read_on(self._place)):
            return step
        try:
            stat = self._files.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            self.missing = True
            return None
        self.missing = False
        self.is_directory = S_ISDIR(stat.st_mode)
        if self.is_directory:
            raise InvalidFormatError(
                self._path, 0, "is a directory: only logs are followed, a RocksDB store is not"
            )
        if self._place is not None:
            if (stat.st_dev, stat.st_ino) == self._place.inode:
                return None
            # Its writer may have appended after our read, before the rename. Nothing follows now.
            if step := self._read_on(self._place):
                self.behind = True
                return step
        return self._read_anew("")

    def _read_on(self, place: _Place) -> Advance | Jump | None:
        handle, _, header, chain, batches_chain, batches_size = place
        stat = self._files.fstat(handle.fd)
        self.written_at, size = stat.st_mtime, stat.st_size
        start = chain.offset
        if size == start:
            return None
        if size < start:
            return self._read_anew("the log was cut")
        gathered = _Gathered(self.fold, self.keeps_batches)
        last: FrameHeader | None = None
        last_batches: FrameHeader | None = None
        bad: BadFrame | None = None
        try:
            for frame, body in read_frames(handle, header, chain, size, window_bytes=WINDOW_BYTES):
                if frame.kind == KIND_BATCHES:
                    gathered.add(decoded(frame, body))
                    last_batches = frame
                else:
                    _check_appended(frame, body)
                last = frame
                if frame.offset + frame.body_len - start >= STEP_BYTES:
                    break
        except BadFrame as error:
            bad = error
        except LogChangedError:
            self.behind = True  # cut meanwhile: the next poll will see that
        if last is None:
            return None if bad is None else self._wait_or_judge(place, bad, size)
        chain = Chain.after(last)
        if last_batches is not None:
            batches_chain, batches_size = Chain.after(last_batches), last_batches.body_len
        self.behind = self.behind or chain.offset < size
        self._patience, self._stalled_polls = STALLED_POLLS, 0
        first_seq = self.fold.seq + 1
        fold = gathered.fold()
        # Only now, and both: after a failure (no memory, say) the frames are read again.
        self.fold, self._place = (
            fold,
            place._replace(chain=chain, batches_chain=batches_chain, batches_size=batches_size),
        )
        if not gathered.count:
            return None
        self._before = place
        return Advance(fold, first_seq, gathered.count, chain.offset - start, gathered.batches)

    def _wait_or_judge(self, place: _Place, bad: BadFrame, size: int) -> Advance | Jump | None:
        """Wait for the rest of half a frame. If it does not come, or the bytes cannot be half a
        frame, read the file anew, as opening would.

        Each time that changes nothing, the polls until the next double: a torn tail may stay for
        days.
        """
        if self._stalled != (bad.offset, size) and _is_growing(place, size):
            self._stalled_polls = 0
        self._stalled = (bad.offset, size)
        self._stalled_polls += 1
        if not bad.final and self._stalled_polls < self._patience:
            return None
        self._stalled_polls, self._patience = 0, self._patience * 2
        return self._read_anew(f"the log was changed from byte {bad.offset} on: {bad.reason}")

    def _read_anew(self, why: str) -> Advance | Jump | None:
        """Read the file at the path from its start, and continue there."""
        old, fold = self._place, self.fold
        place, opened, joint = self._open()
        if (
            old is not None
            and joint.found
            and (place.inode, place.header, place.chain) == (old.inode, old.header, old.chain)
        ):
            return None  # a torn tail: nothing has changed
        opened.limit_cache(self._cache_bytes)
        fold.retire()
        self._place, self.fold = place, opened
        self.missing = False
        if old is None:
            return Jump(opened, "")
        if place.header.log_id != old.header.log_id:
            return Jump(opened, "the log was replaced by another")
        if opened.seq < fold.seq:
            back = why or "the log went back"
            return Jump(opened, f"{back}: from batch {fold.seq} to {opened.seq}")
        if place.header.base_seq > fold.seq:
            return Jump(opened, "")
        if not joint.found:
            other = f"the log's batches up to {fold.seq} are not those that were read"
            return Jump(opened, why or other)
        if joint.news is None:
            return Jump(opened, "")
        return Advance(opened, fold.seq + 1, len(joint.news), joint.news_bytes, joint.news)

    def _open(self) -> tuple[_Place, FoldSnapshot, _Joint]:
        """Read the file at the path from its start. FoldlogError again at once, if it was refused
        and has not changed."""
        handle = ReadHandle(self._files, self._path)
        try:
            stat = self._files.fstat(handle.fd)
            self.written_at = stat.st_mtime
            mark = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._refused is not None and self._refused[0] == mark:
                raise self._refused[1].with_traceback(None)
            try:
                opened = self._load(handle, mark[:2], stat.st_size)
            except (CorruptLogError, InvalidFormatError, LogRegressedError) as error:
                self._refused = (mark, error)
                raise
        except BaseException:
            handle.close()
            raise
        self._refused = None
        return opened

    def _load(
        self, handle: ReadHandle, inode: tuple[int, int], size: int
    ) -> tuple[_Place, FoldSnapshot, _Joint]:
        header = read_own_header(handle)
        chain = Chain.start(header)
        replay = Replay(handle, header)
        joint = _Joint(self._place, self.fold, handle, inode, header)
        batches_chain, batches_size = None, 0
        whole = True
        try:
            for frame, body in read_frames(handle, header, chain, size):
                batches = replay.feed(frame, body)
                chain = chain.after(frame)
                joint.feed(frame, body, chain, batches)
                if batches:
                    batches_chain, batches_size = chain, frame.body_len
                if not replay.frames % FRAMES_A_LOOK and time.monotonic() >= self.give_up_at:
                    raise RequestTimeout(
                        f"{self._path}: only {chain.offset} of {size} bytes were read in time"
                    )
        except (BadFrame, Undecodable):
            whole = False
        if not whole or not replay.base_end:
            load_intact(handle)
            if not replay.base_end:
                raise LogChangedError(self._path, "changed while it was read")
        elif self._place is None and lost_since(handle, header.log_id, chain.seq, size) is not None:
            load_intact(handle)  # raises LogRegressedError
        if joint.is_to_be_compared:
            base = replay.fold_of_base(header.base_seq, self.fold.cursor())
            joint.found = _are_equal(self.fold, base)
        place = _Place(handle, inode, header, chain, batches_chain, batches_size)
        return place, replay.fold(), joint


class _Joint:
    """Finds, in a file read from its start, the place up to which the log was read before."""

    def __init__(
        self,
        place: _Place | None,
        fold: FoldSnapshot,
        handle: ReadHandle,
        inode: tuple[int, int],
        header: FileHeader,
    ) -> None:
        self._place, self._seq, self._cursor = place, fold.seq, bytes(fold.cursor())
        self._handle, self._inode = handle, inode
        self._is_copy = place is not None and place.header == header
        self._possible = (
            place is not None
            and place.header.log_id == header.log_id
            and header.base_seq <= fold.seq
        )
        self.found = False
        self.is_to_be_compared = False
        """True if only a look at the new base can tell whether it is the state that was read."""
        self.news: list[DecodedBatch] | None = []
        """The batches after those read before; None if they are too many."""
        self.news_bytes = 0

    def feed(
        self, frame: FrameHeader, body: memoryview, end: Chain, batches: list[DecodedBatch]
    ) -> None:
        """Take the next frame, the chain after it, and its batches."""
        if not self._possible:
            return
        assert self._place is not None
        if self._is_copy:
            ends = self._place.chain, self._place.batches_chain
            self.found = self.found or (end in ends and self._is_same_up_to(end.offset))
        elif frame.seq == self._seq and batches:
            self.found = self._place.ends_with(body)
        elif frame.seq == self._seq and frame.kind == KIND_BASE_END:
            # The batches themselves are gone. Equal positions in a stream mean equal states; the
            # none-cursor is no position.
            self.found = parse_base_end(body)[0] == self._cursor
            self.is_to_be_compared = self.found and not self._cursor
        if batches and frame.seq > self._seq and self.news is not None:
            self.news += batches
            self.news_bytes += frame.size
            if self.news_bytes > NEWS_BYTES:
                self.news = None

    def _is_same_up_to(self, stop: int) -> bool:
        """True if the file is the one that was read, or holds the same bytes. A chain of checksums
        can be forged. Cost: reads both files, unless it is the same one."""
        assert self._place is not None
        if self._place.inode == self._inode:
            return True
        try:
            return all(
                self._place.handle.read(size, at) == self._handle.read(size, at)
                for at in range(0, stop, STEP_BYTES)
                for size in (min(STEP_BYTES, stop - at),)
            )
        except EOFError:
            return False


class _Gathered:
    """Batches that are folded while they are read.

    What is then not kept needs no fresh memory and no garbage collection, which cost as much as the
    decoding.
    """

    def __init__(self, before: FoldSnapshot, keep_batches: bool) -> None:
        self._before = before
        self._pieces: list[dict[str, Change]] = [{}]  # small batches share a dict
        self._last: DecodedBatch
        self.count = 0
        self.batches: list[DecodedBatch] | None = [] if keep_batches else None

    def add(self, batches: list[DecodedBatch]) -> None:
        """Take the batches of one frame."""
        piece = self._pieces[-1]
        for batch in batches:
            length = len(batch.keys)
            if length > SLICE:
                self._pieces += batch.changes()
                piece = self._pieces[-1]
                continue
            if len(piece) + length > SLICE:
                piece = {}
                self._pieces.append(piece)
            batch.change_into(piece)
        self.count += len(batches)
        self._last = batches[-1]
        if self.batches is not None:
            self.batches += batches

    def fold(self) -> FoldSnapshot:
        """The fold after all batches so far."""
        if not self.count:
            return self._before
        before, last = self._before, self._last
        return before.with_batch(
            tuple(self._pieces), before.seq + self.count, last.cursor, last.origin
        )


def _check_appended(frame: FrameHeader, body: memoryview) -> None:
    """BadFrame for a frame without batches that no writer appends, as when the log is opened."""
    if frame.kind in (KIND_LEAF, KIND_BASE_END):
        raise BadFrame(frame.offset, FRAME_AFTER_BASE, final=True)
    if frame.kind == KIND_OPEN:
        try:
            parse_open(body)
        except Undecodable as error:
            raise BadFrame(frame.offset, str(error), final=True) from None


def _are_equal(read: FoldSnapshot, there: FoldSnapshot) -> bool:
    try:
        return next(diff(read, there), None) is None
    except CorruptLogError:  # what was read was overwritten, mostly
        return False


def _is_growing(place: _Place, size: int) -> bool:
    """True if the rest of the file, `size` bytes long, can be a frame that is being written."""
    rest = size - place.chain.offset
    if rest < FRAME_HEADER.size:
        return True
    header = parse_frame_header(
        place.handle.files.read(place.handle.fd, FRAME_HEADER.size, place.chain.offset),
        0,
        place.header.seed,
    )
    return header is not None and header.size > rest
