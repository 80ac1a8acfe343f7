"""Following a log that another process writes: frame by frame, with the same checks and the same fold, and no right to repair.

The chain and the generation tell what happened to the file. A file that grew is read on. A new file under the name, with the
same log id, is a compaction: the old one is read to its end first, and then no batch is seen twice or missed; had the follower
fallen behind the new base, it takes the state as it stands there. Another log id, a lower sequence, a cut file, or other batches
than were read are a rewind, which is told. Half a frame is a write under way, and is waited for.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from foldlog.protocol.errors import (
    CorruptLogError,
    FoldlogError,
    InvalidFormatError,
    LogChangedError,
    LogRegressedError,
)
from foldlog.protocol.frames import (
    FRAME_HEAD,
    KIND_BASE_END,
    KIND_BATCHES,
    TRAILER,
    FileHead,
    FrameHead,
    parse_base_end,
    parse_frame_head,
)
from foldlog.protocol.undecodable import Undecodable
from foldlog.protocol.updates import Batch, DecodedBatch
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.foldlog.replay import Replay
from foldlog.storage.formats.registry import load_intact, read_own_head
from foldlog.storage.log.backlog import decoded
from foldlog.storage.log.files import Files, ReadHandle
from foldlog.storage.log.regression import lost_since
from foldlog.storage.log.scan import BadFrame, Chain, read_frames

STALLED_POLLS = 5
"""Polls that half a frame may stay as it is before it is judged. A writer needs milliseconds."""
STEP_BYTES = 4 * 1024 * 1024
"""What one step reads, or one frame: it bounds the memory of a follower that has much to catch up with."""
NEWS_BYTES = 16 * 1024 * 1024
"""Batches of a new file that are told one by one; if there are more, the follower jumps."""


class Advance(NamedTuple):
    """The log has grown; or, without batches, it was compacted, and `fold` is the same state from the new file."""

    fold: FoldSnapshot
    """After all of the batches."""
    first_seq: int
    batches: list[DecodedBatch]
    size: int
    """Bytes that they take in the log."""


class Jump(NamedTuple):
    """The state was read anew: the steps in between are not known."""

    fold: FoldSnapshot
    rewound: str
    """Why it went back, or to another log; "" if it went forward."""


class _Place(NamedTuple):
    """What of which file has been read."""

    handle: ReadHandle
    inode: tuple[int, int]
    head: FileHead
    chain: Chain
    batches_chain: Chain | None
    """Where the chain stood behind the last BATCHES frame; None if there was none."""
    batches_size: int
    """Of the body of that frame, which a compaction keeps: it tells the batch from another of the
    same sequence."""

    def ends_with(self, body: memoryview) -> bool:
        """Whether the last BATCHES frame has this body. It is looked at: a checksum can be made to
        agree."""
        if self.batches_chain is None or len(body) != self.batches_size:
            return False
        start = self.batches_chain.offset - len(TRAILER) - self.batches_size
        try:
            return body == self.handle.read(self.batches_size, start)
        except EOFError:
            return False


class _Opened(NamedTuple):
    """A file as it was read from its start."""

    place: _Place
    fold: FoldSnapshot
    joins: bool
    """It holds, or may hold, what was read before: `news` goes on from there."""
    news: list[DecodedBatch] | None
    """The batches behind those that were read before; None if they are too many."""
    news_bytes: int


class Tail:
    """A log that is followed. One thread polls it."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files, self._path = files, path
        self._place: _Place | None = None
        self._stalled = (0, 0)  # the offset and the file's size where half a frame was seen,
        self._stalled_polls = 0  # how often,
        self._patience = STALLED_POLLS  # and how often it may be before it is judged
        # A file that was refused, by inode, size and time: it is not read again until it changes.
        self._refused: tuple[tuple[int, ...], FoldlogError] | None = None
        self.fold = FoldSnapshot.empty()
        self.missing = False
        """There is no file under the name just now."""
        self.behind = False
        """There is more to be had at once."""

    @property
    def started(self) -> bool:
        """Whether a log was found and read."""
        return self._place is not None

    def poll(self) -> Advance | Jump | None:
        """The next thing that happened since the last call; None if nothing did.

        OSError, CorruptLogError, InvalidFormatError or LogRegressedError as they come; call again
        later, nothing is lost by them. Cost: two calls to the system if nothing happened.
        """
        self.behind = False
        try:
            return self._poll()
        except FileNotFoundError:
            self.missing = True  # it went between two calls
            return None

    def _poll(self) -> Advance | Jump | None:
        if self._place is not None and (step := self._read_on(self._place)):
            return step
        try:
            stat = self._files.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            self.missing = True
            return None
        self.missing = False
        if self._place is not None:
            if (stat.st_dev, stat.st_ino) == self._place.inode:
                return None
            # Its writer may have appended between our reading and its rename; now the old file has its end.
            if step := self._read_on(self._place):
                self.behind = True
                return step
        return self._go_over("")

    def _read_on(self, place: _Place) -> Advance | Jump | None:
        handle, _, head, chain, batches_chain, batches_size = place
        size = self._files.fstat(handle.fd).st_size
        start = chain.offset
        if size == start:
            return None
        if size < start:
            return self._go_over("the log was cut")
        batches: list[DecodedBatch] = []
        bad: BadFrame | None = None
        try:
            for frame, body in read_frames(handle, head, chain, size):
                if frame.kind == KIND_BATCHES:
                    batches += decoded(frame, body)
                    batches_chain, batches_size = chain.after(frame), frame.body_len
                chain = chain.after(frame)
                if chain.offset - start >= STEP_BYTES:
                    break
        except BadFrame as error:
            bad = error
        except LogChangedError:
            self.behind = True  # it was cut meanwhile: the next poll will see that
        if chain.offset > start:
            self.behind = self.behind or chain.offset < size
            self._patience, self._stalled_polls = STALLED_POLLS, 0
            first_seq = self.fold.seq + 1
            fold = _folded(self.fold, batches) if batches else self.fold
            # Only now, and both: what fails half-way (for want of memory, say) is read again.
            self.fold, self._place = (
                fold,
                place._replace(chain=chain, batches_chain=batches_chain, batches_size=batches_size),
            )
            if batches:
                return Advance(fold, first_seq, batches, chain.offset - start)
            return None
        return None if bad is None else self._wait_or_judge(place, bad, size)

    def _wait_or_judge(self, place: _Place, bad: BadFrame, size: int) -> Advance | Jump | None:
        """Half a frame is waited for. If it stays, or cannot be half a frame, the file is read as opening would.

        Each judgement that changes nothing doubles the polls until the next: a torn tail may stay for days.
        """
        if self._stalled != (bad.offset, size) and _is_growing(place, size):
            self._stalled_polls = 0
        self._stalled = (bad.offset, size)
        self._stalled_polls += 1
        if not bad.final and self._stalled_polls < self._patience:
            return None
        self._stalled_polls, self._patience = 0, self._patience * 2
        return self._go_over(f"the log is another from byte {bad.offset} on: {bad.reason}")

    def _go_over(self, why: str) -> Advance | Jump | None:
        """Read the file that stands under the name from its start, and go on there."""
        old, fold = self._place, self.fold
        opened = self._open()
        place = opened.place
        if (
            old is not None
            and opened.joins
            and (place.inode, place.head, place.chain) == (old.inode, old.head, old.chain)
        ):
            return None  # a torn tail that was waited for in vain: nothing has changed
        self._place, self.fold = place, opened.fold
        self.missing = False
        if old is None:
            return Jump(opened.fold, "")
        if place.head.log_id != old.head.log_id:
            return Jump(opened.fold, "the log was replaced by another")
        if opened.fold.seq < fold.seq:
            return Jump(
                opened.fold,
                f"{why or 'the log went back'}: from batch {fold.seq} to {opened.fold.seq}",
            )
        if place.head.base_seq > fold.seq:
            return Jump(opened.fold, "")
        if not opened.joins:
            return Jump(
                opened.fold, why or f"the log holds other batches than were read, up to {fold.seq}"
            )
        if opened.news is None:
            return Jump(opened.fold, "")
        return Advance(opened.fold, fold.seq + 1, opened.news, opened.news_bytes)

    def _open(self) -> _Opened:
        handle = ReadHandle(self._files, self._path)
        stat = self._files.fstat(handle.fd)
        mark = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        if self._refused is not None and self._refused[0] == mark:
            raise self._refused[1].with_traceback(None)
        try:
            opened = self._load(handle, (stat.st_dev, stat.st_ino), stat.st_size)
        except (CorruptLogError, InvalidFormatError, LogRegressedError) as error:
            self._refused = (mark, error)
            raise
        self._refused = None
        return opened

    def _load(self, handle: ReadHandle, inode: tuple[int, int], size: int) -> _Opened:
        head = read_own_head(handle)
        chain = Chain.start(head)
        replay = Replay(handle, head)
        joint = _Joint(self._place, self.fold, head)
        batches_chain, batches_size = None, 0
        whole = True
        try:
            for frame, body in read_frames(handle, head, chain, size):
                batches = replay.feed(frame, body)
                chain = chain.after(frame)
                joint.feed(frame, body, chain, batches)
                if batches:
                    batches_chain, batches_size = chain, frame.body_len
        except (BadFrame, Undecodable):
            whole = False
        if not whole or not replay.base_end:
            load_intact(handle)
            if not replay.base_end:
                raise LogChangedError(self._path, "changed while it was read")
        elif self._place is None and lost_since(handle, head.log_id, chain.seq, size) is not None:
            load_intact(handle)  # to say so
        place = _Place(handle, inode, head, chain, batches_chain, batches_size)
        return _Opened(place, replay.fold(), joint.found, joint.news, joint.news_bytes)


class _Joint:
    """Finds, in a file that is read from its start, the place up to which the log was read before."""

    def __init__(self, place: _Place | None, fold: FoldSnapshot, head: FileHead) -> None:
        self._place, self._seq, self._cursor = place, fold.seq, bytes(fold.cursor())
        self._same_file = place is not None and place.head == head
        self._possible = (
            place is not None and place.head.log_id == head.log_id and head.base_seq <= fold.seq
        )
        self.found = False
        self.news: list[DecodedBatch] | None = []
        self.news_bytes = 0

    def feed(
        self, frame: FrameHead, body: memoryview, behind: Chain, batches: list[DecodedBatch]
    ) -> None:
        """The next frame, where it left the chain, and its batches."""
        if not self._possible:
            return
        assert self._place is not None
        if self._same_file:
            self.found = self.found or behind in (self._place.chain, self._place.batches_chain)
        elif frame.seq == self._seq and batches:
            self.found = self._place.ends_with(body)
        elif frame.seq == self._seq and frame.kind == KIND_BASE_END:
            self.found = (
                parse_base_end(body)[0] == self._cursor
            )  # the batches themselves are not there any more
        if batches and frame.seq > self._seq and self.news is not None:
            self.news += batches
            self.news_bytes += frame.size
            if self.news_bytes > NEWS_BYTES:
                self.news = None


def _folded(fold: FoldSnapshot, batches: list[DecodedBatch]) -> FoldSnapshot:
    return fold.with_group(
        [
            Batch(batch.cursor, b"", batch.changes(), len(batch.keys), batch.origin)
            for batch in batches
        ]
    )


def _is_growing(place: _Place, size: int) -> bool:
    """Whether the rest of the file, `size` bytes long by now, can be a frame that is being written."""
    rest = size - place.chain.offset
    if rest < FRAME_HEAD.size:
        return True
    head = parse_frame_head(
        place.handle.files.read(place.handle.fd, FRAME_HEAD.size, place.chain.offset),
        0,
        place.head.seed,
    )
    return head is not None and head.size > rest
