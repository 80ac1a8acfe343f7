"""Salvage: writes what is readable in a damaged log to a new log, and lists what was lost.

The damaged file is only read. Frames are found wherever they are, also after damage; batches are
applied in the order of their sequences. From a leaf with a damaged body, the entries whose own
checksum is right are kept. A damaged file header is reconstructed from the frames.

The store may never have been in the resulting state: if a batch was lost, the later ones are folded
without it. So the new log's cursor is before the first loss (`cursor="safe"`). An upstream that
replays from there corrects the state, since the last write of each key wins.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from crc32c import crc32c

from foldlog.protocol.decoding import Undecodable, decode_batches
from foldlog.protocol.errors import LogChangedError
from foldlog.protocol.frames import (
    FILE_HEADER,
    FRAME_HEADER,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    FileHeader,
    FrameHeader,
)
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Change, DecodedBatch
from foldlog.storage.fold import leaf
from foldlog.storage.fold.base import Base
from foldlog.storage.fold.delta import EMPTY_DELTA, Run
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.foldlog.check import base_end_of, header_and_seed
from foldlog.storage.formats.foldlog.log import FRAMES
from foldlog.storage.formats.foldlog.walk import Piece, Walker
from foldlog.storage.formats.format import Progress
from foldlog.storage.formats.registry import check_own_format
from foldlog.storage.formats.rewrite import write_new
from foldlog.storage.log.files import OS_FILES, Files, ReadHandle, resolve, unused_path
from foldlog.storage.log.sidecars.regression import lost_since, regression_text


class Loss(NamedTuple):
    """A stretch of a log that could not be kept, and what is known of its content."""

    offset: int
    size: int
    """In bytes; 0 where whole frames are missing."""
    reason: str
    first_seq: int | None = None
    """The first batch lost; None if none was."""
    last_seq: int | None = None
    """The last batch lost; None if none was, or it is not known."""
    after_cursor: WatchCursor | None = None
    """The cursor of the last batch kept before it."""
    before_cursor: WatchCursor | None = None
    """The cursor of the first batch kept after it; None if there is none."""
    entries: int | None = None
    """Entries of the base lost; None: none, or not known."""
    keys: tuple[str, ...] = ()
    """The keys of those entries, if known."""


@dataclass(frozen=True, slots=True)
class SalvageReport:
    """What a salvage kept and lost."""

    path: Path
    output: Path
    seq: int
    """The last batch kept: the sequence of the new log."""
    cursor: WatchCursor
    """The cursor of the new log."""
    last_cursor: WatchCursor
    """The cursor of the last batch kept."""
    entries: int
    """Live entries in the new log."""
    leaves: int
    """Leaves kept, in whole or in part."""
    batches: int
    """Batches kept."""
    losses: tuple[Loss, ...]
    """By offset."""


class _Found(NamedTuple):
    """A valid frame of batches."""

    first_seq: int
    last_seq: int
    offset: int
    size: int


def salvage_log(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    cursor: Literal["safe", "last"] = "safe",
    files: Files = OS_FILES,
    progress: Progress | None = None,
) -> SalvageReport:
    """Write what is readable in the log `source` to a new, compacted log at `output`.

    `cursor="last"` gives it the cursor of the last batch kept, for an upstream that cannot replay:
    what was lost stays lost. FileExistsError if `output` exists; InvalidFormatError if nothing in
    the file is recognized; OSError. After an error nothing is at `output`. Cost: that of
    `verify_log` and a compaction. Memory: the changes since the last compaction, and the largest
    frame.
    """
    if cursor not in ("safe", "last"):
        raise ValueError(f'cursor is "safe" or "last", not {cursor!r}')
    with ReadHandle(files, resolve(source)) as handle:
        dest = resolve(unused_path(files, output, "a salvage"))
        check_own_format(handle)
        try:
            salvage = _Salvage(handle)
            salvage.find(progress)
            fold = salvage.fold()
            if cursor == "safe":
                fold = fold.at(salvage.safe_cursor)
            access = files.access(handle.fd)
            write_new(files, dest, fold, FRAMES, progress, source=access)
        except EOFError as error:
            raise LogChangedError(handle.path, str(error)) from None
        return SalvageReport(
            handle.path,
            dest,
            fold.seq,
            fold.cursor(),
            salvage.last_cursor,
            len(fold),
            salvage.leaves,
            salvage.batches,
            tuple(sorted(salvage.losses, key=lambda loss: loss.offset)),
        )


class _Salvage:
    """One salvage: `find` what is there, then build a `fold` from it."""

    def __init__(self, handle: ReadHandle) -> None:
        self._handle = handle
        self.base = Base(handle)
        self.losses: list[Loss] = []
        self.rescued_leaves = 0
        self.batches = 0
        self.safe_cursor = self.last_cursor = WatchCursor.none()
        self._rescued = Run()  # entries of leaves that cannot be used as they are
        self._last_key: str | None = None
        self._found: list[_Found] = []
        self._bad: list[Piece] = []
        self._header: FileHeader | None = None
        self._size = 0
        self._base_seq: int | None = None
        self._base_end: tuple[WatchCursor, int, int, bytes] | None = None
        self._base_end_offset: int | None = None

    def find(self, progress: Progress | None) -> None:
        """Read the file; note what is valid, and what is not."""
        self._size = size = self._handle.files.fstat(self._handle.fd).st_size
        self._header, seed, reason = header_and_seed(self._handle, size)
        if self._header is not None:
            self._base_seq = self._header.base_seq
        if reason:
            self.losses.append(
                Loss(0, FILE_HEADER.size, f"{reason}; reconstructed from the frames; no data lost")
            )
        for piece in Walker(self._handle, seed, size).pieces(progress):
            frame = piece.header
            if frame is not None and self._base_seq is None:
                self._base_seq = frame.seq - frame.batches
            if frame is None or piece.reason:
                self._take_bad(piece)
            elif frame.kind == KIND_LEAF:
                self._take_leaf(piece, frame)
            elif frame.kind == KIND_BASE_END:
                try:
                    self._base_end, self._base_end_offset = base_end_of(piece.body), piece.offset
                except Undecodable as error:
                    self._bad.append(piece._replace(reason=str(error)))
            elif frame.kind == KIND_BATCHES:
                self._found.append(
                    _Found(frame.seq - frame.batches + 1, frame.seq, piece.offset, frame.body_len)
                )

    def _take_leaf(self, piece: Piece, frame: FrameHeader) -> None:
        try:
            keys = leaf.check_order(piece.body)
        except Undecodable as error:
            self._take_bad(piece._replace(reason=str(error)))
            return
        if self._last_key is None or keys[0] > self._last_key:
            self.base.add_leaf(piece.offset + FRAME_HEADER.size, piece.body, frame.body_crc)
            self._last_key = keys[-1]
        else:  # moved or repeated
            self._rescued.update(leaf.changes_of(leaf.decode_leaf(piece.body)))
            self.rescued_leaves += 1

    def _take_bad(self, piece: Piece) -> None:
        """Keep the valid entries of a damaged leaf. Other damage is reported when all is known."""
        if piece.header is None or piece.header.kind != KIND_LEAF:
            self._bad.append(piece._replace(body=b""))
            return
        kept, lost = _entries_that_verify(piece.body)
        self._rescued.update(kept)
        self.rescued_leaves += bool(kept)
        count = len(lost) if kept or lost else _count_of(piece.body)
        self.losses.append(
            Loss(piece.offset, piece.size, piece.reason, entries=count, keys=tuple(lost))
        )

    @property
    def leaves(self) -> int:
        """Leaves of which something was kept."""
        return len(self.base) + self.rescued_leaves

    def fold(self) -> FoldSnapshot:
        """The state from what was found. Completes `losses`, `safe_cursor` and `last_cursor`."""
        base_seq = self._base_seq or 0
        none = WatchCursor.none()
        base_cursor = none if self._base_end is None else self._base_end[0]
        runs = (self._rescued,) if self._rescued else ()
        fold = FoldSnapshot(self.base, EMPTY_DELTA, runs, base_seq, base_cursor)
        whole = self._report_lost_base()
        self.last_cursor = base_cursor
        self.safe_cursor = base_cursor if whole else none
        kept: set[tuple[int, int]] = set()
        taken: list[tuple[_Found, WatchCursor]] = []  # what was kept, with the cursor after it
        for found in sorted(self._found):
            if found.first_seq <= fold.seq:
                if found.last_seq > base_seq and found[:2] not in kept:
                    self.losses.append(
                        Loss(found.offset, found.size, f"repeats batches up to {fold.seq}")
                    )
                continue
            try:
                batches = self._batches_at(found)
            except Undecodable as error:
                self._bad.append(Piece(found.offset, found.size, None, b"", str(error)))
                continue
            whole = whole and found.first_seq == fold.seq + 1
            for number, batch in enumerate(batches, found.first_seq):
                fold = fold.with_batch(batch.changes(), number, batch.cursor)
            self.batches += len(batches)
            self.last_cursor = batches[-1].cursor
            if whole:
                self.safe_cursor = self.last_cursor
            taken.append((found, self.last_cursor))
            kept.add(found[:2])
        self._report_lost_batches(base_seq, base_cursor, taken)
        self._report_lost_end(fold.seq)
        return fold

    def _batches_at(self, found: _Found) -> list[DecodedBatch]:
        body = self._handle.read(found.size, found.offset + FRAME_HEADER.size)
        return decode_batches(body, found.last_seq - found.first_seq + 1)

    def _report_lost_base(self) -> bool:
        """Report what the base lost. Returns True if it is complete, and its cursor known."""
        stop = self._base_end_offset
        if stop is None:
            stop = min(
                (found.offset for found in self._found),
                default=self._bad[-1].end if self._bad else 0,
            )
        mine = [piece for piece in self._bad if piece.offset < stop]
        self._bad = [piece for piece in self._bad if piece.offset >= stop]
        kept = self.base.entries + len(self._rescued)
        missing = None if self._base_end is None else max(self._base_end[2] - kept, 0)
        told = sum(loss.entries or 0 for loss in self.losses)
        for piece in mine:
            count = None if missing is None else max(missing - told, 0)
            self.losses.append(Loss(piece.offset, piece.size, piece.reason, entries=count or None))
        if missing and missing > told and not mine:
            self.losses.append(
                Loss(
                    stop, 0, "leaves are missing before the end of the base", entries=missing - told
                )
            )
        if self._base_end is None and not mine:
            self.losses.append(Loss(stop, 0, "the end of the base is missing"))
        return self._base_end is not None and not missing

    def _report_lost_batches(
        self, base_seq: int, base_cursor: WatchCursor, taken: list[tuple[_Found, WatchCursor]]
    ) -> None:
        """Report the bad stretches after the base, and gaps in the sequence that none explains."""
        last_seq, cursor = base_seq, base_cursor
        position = self._base_end_offset or 0
        bad = sorted(self._bad, key=lambda piece: piece.offset)
        offsets = [piece.offset for piece in bad]
        for found, cursor_after in [*taken, (None, None)]:
            stop = None if found is None else found.offset
            start = bisect_left(offsets, position)
            end = len(offsets) if stop is None else max(bisect_left(offsets, stop), start)
            inside = bad[start:end]
            if inside:
                del bad[start:end], offsets[start:end]
            next_seq = None if found is None else found.first_seq
            for piece, (first, last) in zip(
                inside, _lost_ranges(inside, last_seq, next_seq), strict=True
            ):
                self.losses.append(
                    Loss(piece.offset, piece.size, piece.reason, first, last, cursor, cursor_after)
                )
            if found is None or cursor_after is None:
                break
            if found.first_seq > last_seq + 1 and not inside:
                lost = last_seq + 1, found.first_seq - 1
                self.losses.append(
                    Loss(found.offset, 0, "frames are missing here", *lost, cursor, cursor_after)
                )
            last_seq, cursor, position = found.last_seq, cursor_after, found.offset
        self.losses += [Loss(piece.offset, piece.size, piece.reason) for piece in bad]

    def _report_lost_end(self, last_seq: int) -> None:
        """Report batches that were synced according to the note, and left nothing in the file."""
        for loss in self.losses:
            if loss.first_seq is not None:
                if loss.last_seq is None:
                    return  # all up to the end are reported
                last_seq = max(last_seq, loss.last_seq)
        header, size = self._header, self._size
        if header is not None and (mark := lost_since(self._handle, header.log_id, last_seq, size)):
            reason = f"the log {regression_text(last_seq, mark)}"
            lost = last_seq + 1, mark.seq
            self.losses.append(Loss(size, 0, reason, *lost, self.last_cursor))


def _lost_ranges(
    pieces: list[Piece], last_seq: int, next_seq: int | None
) -> list[tuple[int | None, int | None]]:
    """The first and last batch in each bad stretch between two kept batches.

    Those are `last_seq` and `next_seq`, None if no batch follows. None for both if the stretch held
    no batch; for the last if it is not known.
    """
    ranges: list[tuple[int | None, int | None]] = []
    first = last_seq + 1
    for piece, later in zip(pieces, _first_later(pieces), strict=True):
        header = piece.header
        if header is not None:
            ranges.append(
                (header.seq - header.batches + 1, header.seq) if header.batches else (None, None)
            )
            first = max(first, header.seq + 1)
            continue
        stop = next_seq if later is None else later
        if stop is None:
            ranges.append((first, None))
        else:
            ranges.append((first, stop - 1) if first < stop else (None, None))
            first = max(first, stop)
    return ranges


def _first_later(pieces: list[Piece]) -> list[int | None]:
    """For each piece, the first batch that a later piece holds by its header; None if none does."""
    firsts: list[int | None] = []
    first: int | None = None
    for piece in reversed(pieces):
        firsts.append(first)
        if piece.header and piece.header.batches:
            begin = piece.header.seq - piece.header.batches + 1
            first = begin if first is None else min(first, begin)
    return firsts[::-1]


def _entries_that_verify(body: bytes) -> tuple[dict[str, Change], list[str]]:
    """From the body of a damaged leaf: the valid entries, and the keys of the others.

    Nothing if its index is damaged.
    """
    kept: dict[str, Change] = {}
    lost: list[str] = []
    if len(body) < leaf.HEADER.size:
        return {}, []
    try:
        index = leaf.Index(body[: leaf.HEADER.unpack_from(body)[1]], len(body))
    except Undecodable:
        return {}, []
    for number, key in enumerate(index.keys):
        start, size, crc, version = index.locate(number)
        value = body[start : start + size]
        if crc32c(value) == crc:
            kept[key] = (key, value, version)
        else:
            lost.append(key)
    return kept, lost


def _count_of(body: bytes) -> int | None:
    """The number of entries of a damaged leaf by its own count; None if that is impossible."""
    count: int = leaf.HEADER.unpack_from(body)[0] if len(body) >= leaf.HEADER.size else 0
    return count if 0 < count <= leaf.MAX_ENTRIES else None
