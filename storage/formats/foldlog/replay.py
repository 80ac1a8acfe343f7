"""Builds the fold from a log in foldlog's own format, frame by frame."""

from __future__ import annotations

from foldlog.protocol.decoding import Undecodable, decode_batches
from foldlog.protocol.errors import InvalidFormatError
from foldlog.protocol.frames import (
    FILE_HEADER,
    FRAME_HEADER,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    KIND_SEAL,
    FileHeader,
    FrameHeader,
    parse_base_end,
    parse_base_origin,
    parse_file_header,
    parse_open,
)
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import DecodedBatch
from foldlog.storage.fold.base import Base
from foldlog.storage.fold.delta import EMPTY_DELTA, Collected
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.log.files import ReadHandle

FRAME_AFTER_BASE = "a frame of the base after its end"
FRAME_BEFORE_BASE_END = "a frame before the end of the base"


def read_header(handle: ReadHandle) -> FileHeader:
    """The header of a log file. InvalidFormatError if it is not valid, or of a newer format."""
    raw = handle.files.read(handle.fd, FILE_HEADER.size, 0)
    try:
        return parse_file_header(raw)
    except ValueError as error:
        raise InvalidFormatError(handle.path, 0, str(error)) from None


class Replay:
    """Builds a fold from frames: the base first, then batch by batch."""

    def __init__(self, handle: ReadHandle, header: FileHeader) -> None:
        self._handle = handle
        self.base = Base(handle)
        self.base_end = 0
        self.boot = ""
        self.sealed = False
        self.frames = 0
        self._collected = Collected()
        self._seq = header.base_seq
        self._cursor = WatchCursor.none()
        self._origin = b""

    def feed(self, frame: FrameHeader, body: memoryview) -> list[DecodedBatch]:
        """Take the next frame. Returns its batches. Undecodable if its body is not valid."""
        batches: list[DecodedBatch] = []
        if (frame.kind in (KIND_LEAF, KIND_BASE_END)) == bool(self.base_end):
            raise Undecodable(FRAME_AFTER_BASE if self.base_end else FRAME_BEFORE_BASE_END)
        if frame.kind == KIND_LEAF:
            self.base.add_leaf(frame.offset + FRAME_HEADER.size, body, frame.body_crc)
        elif frame.kind == KIND_BASE_END:
            self._cursor = _end_of_base(body, self.base)
            self._origin = parse_base_origin(body)
            self.base_end = frame.offset + frame.size
        elif frame.kind == KIND_BATCHES:
            batches = decode_batches(body, frame.batches)
            for batch in batches:
                self._collected.add_batch(batch)
            self._cursor, self._origin = batches[-1].cursor, batches[-1].origin
        elif frame.kind == KIND_OPEN:
            self.boot = parse_open(body)
        self.sealed = frame.kind == KIND_SEAL
        self._seq = frame.seq
        self.frames += 1
        return batches

    def fold(self) -> FoldSnapshot:
        """The state after all frames so far. Cost: see `Collected.settled`."""
        collected = self._collected.settled()
        return FoldSnapshot(self.base, *collected, self._seq, self._cursor, self._origin)

    def fold_of_base(self, seq: int, cursor: WatchCursor) -> FoldSnapshot:
        """What the base alone holds, with the batch and cursor at its end."""
        return FoldSnapshot(self.base, EMPTY_DELTA, (), seq, cursor)


def _end_of_base(body: memoryview, base: Base) -> WatchCursor:
    cursor, leaves, entries, digest = parse_base_end(body)
    if leaves != len(base) or entries != base.entries:
        raise Undecodable(wrong_counts(len(base), base.entries, leaves, entries))
    base.digest = digest
    return cursor


def wrong_counts(leaves: int, entries: int, told_leaves: int, told_entries: int) -> str:
    """What is wrong with a base that has other counts than its end says."""
    return (
        f"the base has {leaves} leaves and {entries} entries,"
        f" but its end says {told_leaves} and {told_entries}"
    )
