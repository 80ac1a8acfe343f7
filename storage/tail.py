"""Following a log that another process writes: frame by frame, with the same checks and the same fold, and no right to repair.

The chain and the generation tell what happened to the file. A file that grew is read on. A new file under the name, with the
same log id, is a compaction: the old one is read to its end first, and no batch is seen twice or missed; had the follower
fallen behind the new base, it takes the state as it stands there. Another log id, a lower sequence or a cut file are a rewind,
which is told. Half a frame is a write under way, and is waited for.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from foldlog.protocol.errors import FoldlogError
from foldlog.protocol.frames import KIND_BATCHES, FileHead
from foldlog.protocol.updates import DecodedBatch, decode_batches
from foldlog.storage.files import Files, ReadHandle
from foldlog.storage.fold import FoldSnapshot
from foldlog.storage.recovery import Verdict
from foldlog.storage.replay import Replay, damage_error, diagnose, load, read_head
from foldlog.storage.scan import BadFrame, Chain, read_frames

STALLED_POLLS = 5
"""Polls that half a frame may stay as it is before it is judged. A writer needs milliseconds."""


class Advance(NamedTuple):
    """The log has grown."""

    fold: FoldSnapshot
    """After all of the batches."""
    first_seq: int
    batches: list[DecodedBatch]


class Jump(NamedTuple):
    """The state was read anew: the steps in between are not known."""

    fold: FoldSnapshot
    rewound: str
    """Why it went back, or to another log; "" if it went forward."""


class Tail:
    """A log that is followed. One thread polls it."""

    def __init__(self, files: Files, path: Path) -> None:
        self._files, self._path = files, path
        self._handle: ReadHandle | None = None
        self._inode = (0, 0)
        self._head: FileHead | None = None
        self._chain = Chain(0, 0, 0, 0)
        self._stalled = (0, 0)  # the size at which half a frame was seen, and how often
        self.fold = FoldSnapshot.empty()
        self.missing = False
        """There is no file under the name just now."""

    @property
    def started(self) -> bool:
        """Whether a log was found and read."""
        return self._handle is not None

    def poll(self) -> list[Advance | Jump]:
        """What happened since the last call. OSError, CorruptLogError or InvalidFormatError as they come; call again later.

        Cost: two calls to the system if nothing happened.
        """
        steps = [] if self._handle is None else self._read_on()
        try:
            stat = self._files.stat(self._path)
        except (FileNotFoundError, NotADirectoryError):
            self.missing = True
            return steps
        self.missing = False
        if (stat.st_dev, stat.st_ino) != self._inode:
            steps.append(self._switch())
        return steps

    def _read_on(self) -> list[Advance | Jump]:
        handle, head = self._handle, self._head
        assert handle is not None
        assert head is not None
        size = self._files.fstat(handle.fd).st_size
        if size == self._chain.offset:
            return []
        if size < self._chain.offset:
            return [self._reload("the log was cut")]
        fold, chain = self.fold, self._chain
        batches: list[DecodedBatch] = []
        try:
            for frame, body in read_frames(handle, head, chain, size):
                if frame.kind == KIND_BATCHES:
                    try:
                        decoded = decode_batches(body)
                    except ValueError as error:
                        raise BadFrame(frame.offset, str(error), final=True) from None
                    for batch in decoded:
                        fold = fold.with_batch(batch.changes(), fold.seq + 1, batch.cursor)
                    batches += decoded
                chain = chain.after(frame)
        except BadFrame as bad:
            if bad.final:
                return [self._reload(f"the log is another behind byte {chain.offset}: {bad.reason}")]
            self._check_stalled(size)
        first_seq, self.fold, self._chain = self.fold.seq + 1, fold, chain
        return [Advance(fold, first_seq, batches)] if batches else []

    def _check_stalled(self, size: int) -> None:
        """Half a frame is waited for; if it stays, it is judged as opening would."""
        self._stalled = (size, self._stalled[1] + 1) if self._stalled[0] == size else (size, 1)
        if self._stalled[1] % STALLED_POLLS == 0:
            assert self._handle is not None
            loaded = load(self._handle)
            if loaded.bad is not None:
                verdict, why = diagnose(self._handle, loaded)
                if verdict is Verdict.CORRUPT:
                    raise damage_error(self._path, loaded, why)

    def _reload(self, reason: str) -> Jump:
        """Read the file under the name from its start."""
        _, fold = self._open()
        self.fold = fold
        return Jump(fold, reason)

    def _switch(self) -> Advance | Jump:
        """Go over to the file that stands under the name now."""
        old, old_head = self.fold, self._head
        news, fold = self._open()
        self.fold = fold
        assert self._head is not None
        if old_head is None:
            return Jump(fold, "")
        if self._head.log_id != old_head.log_id:
            return Jump(fold, "the log was replaced by another")
        if fold.seq < old.seq:
            return Jump(fold, f"the log went back from batch {old.seq} to {fold.seq}")
        if self._head.base_seq > old.seq:
            return Jump(fold, "")
        return Advance(fold, old.seq + 1, news)

    def _open(self) -> tuple[list[DecodedBatch], FoldSnapshot]:
        """Read the file under the name. Returns its batches that are newer than the fold so far, and its fold."""
        handle = ReadHandle(self._files, self._path)
        stat = self._files.fstat(handle.fd)
        head = read_head(handle)
        chain = Chain.start(head)
        replay = Replay(handle, head)
        news: list[DecodedBatch] = []
        try:
            for frame, body in read_frames(handle, head, chain, stat.st_size):
                batches = replay.feed(frame, body)
                chain = chain.after(frame)
                news += batches[max(0, len(batches) - max(0, frame.seq - self.fold.seq)) :]
        except (BadFrame, ValueError):
            loaded = load(handle)
            if loaded.bad is not None:
                verdict, why = diagnose(handle, loaded)
                if verdict is Verdict.CORRUPT:
                    raise damage_error(self._path, loaded, why) from None
        self._handle, self._head, self._chain = handle, head, chain
        self._inode = (stat.st_dev, stat.st_ino)
        return news, replay.fold()


def batches_since(
    handle: ReadHandle, head: FileHead, size: int, cursor: bytes, last_seq: int
) -> list[tuple[int, DecodedBatch]] | None:
    """The batches of a log behind the first that stands at `cursor`, up to `last_seq`, with their sequences.

    None if no batch behind the base, nor the base, stands there. Cost: reads the file.
    """
    chain = Chain.start(head)
    replay = Replay(handle, head)
    found = False
    result: list[tuple[int, DecodedBatch]] = []
    try:
        for frame, body in read_frames(handle, head, chain, size):
            batches = replay.feed(frame, body)
            chain = chain.after(frame)
            for seq, batch in enumerate(batches, frame.seq - len(batches) + 1):
                if seq > last_seq:
                    break
                if found:
                    result.append((seq, batch))
                elif batch.cursor == cursor:
                    found = True
            if replay.base_end and not batches and not found and frame.offset + frame.size == replay.base_end:
                found = replay.fold().cursor() == cursor
    except BadFrame as bad:
        raise FoldlogError(f"{handle.path}: byte {bad.offset}: {bad.reason}") from None
    return result if found else None
