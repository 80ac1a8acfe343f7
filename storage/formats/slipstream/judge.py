"""Judges a file by its records: where its base ends, and whether its tail is torn or corrupt."""

from __future__ import annotations

from foldlog.protocol.tokens import WatchCursor
from foldlog.storage.formats.format import Known, Verdict
from foldlog.storage.formats.slipstream.records import (
    CURSOR,
    HEADER,
    MAX_RECORD_BYTES,
    PUT,
    BadRecord,
    Record,
    read_part,
)
from foldlog.storage.formats.slipstream.search import (
    find_cursor_record,
    find_record,
    one_bit_fixes,
)
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.log.recovery import SECTOR

_REPORT_BYTES = 1024 * 1024


class Count:
    """Finds where a file's base ends, and counts the batches after it, from its records in order.

    The base is what a compaction would have written, if the file begins so; otherwise it is empty.
    """

    def __init__(self, known: Known | None = None) -> None:
        self.cursor = WatchCursor.none()
        self.records = 0
        self.entries = 0
        """Of the base."""
        self.base_end = HEADER.size if known is None else known.base_end
        self.batches = 0
        """Cursor records after the base."""
        self.base_seq = 0 if known is None else known.header.base_seq
        """The sequence of the base. If it is not known, 1 for a base with a cursor, else 0."""
        self._known = known is not None
        self._in_base = True  # so far only puts, in key order
        self._last_key: str | None = None

    @property
    def seq(self) -> int:
        """The sequence of the last batch."""
        return self.base_seq + self.batches

    def feed(self, record: Record) -> None:
        """Take the next record."""
        self.records += 1
        kind, key, _, token, end = record
        if kind == CURSOR:
            self.cursor = WatchCursor(token)
            if self._in_base and not self._known and token:
                self.base_end, self.base_seq = end, 1
            elif end > self.base_end:
                self.batches += 1
            self._in_base = False
        elif self._in_base:
            if kind == PUT and (self._last_key is None or key > self._last_key):
                self._last_key = key
                self.entries += 1
            else:
                self._in_base = False

    def may_be_in_base(self, offset: int) -> bool:
        """True if what is at `offset`, after the records so far, may belong to the base."""
        return offset < self.base_end if self._known else self._in_base

    def end(self, offset: int) -> None:
        """Tell that the records end at `offset`."""
        if self._in_base and not self._known:
            self.base_end = offset
        if self.base_end == HEADER.size:
            self.entries = 0


def judge(handle: ReadHandle, bad: BadRecord, size: int) -> tuple[Verdict, str]:
    """Judge the bytes from the bad record to `size`. Returns the verdict and the reason.

    `docs/interchange.md` has the rule. LogChangedError if the file ends before `size`. Memory: one
    record. Cost: see `search.py`.
    """
    if bad.final:
        return Verdict.CORRUPT, bad.reason
    written = _end_of_data(handle, bad.offset, size)
    zeros_from = written + -written % SECTOR
    if written == bad.offset:
        lost_sector, reason = True, "nothing but zeros"
    elif bad.cut_short:
        lost_sector, reason = False, f"the last record ends early ({bad.reason})"
    elif zeros_from < bad.end:
        lost_sector, reason = True, f"a sector of the last record is missing ({bad.reason})"
    else:
        return Verdict.CORRUPT, bad.reason
    if lost_sector and bad.in_base and written > HEADER.size:
        return Verdict.CORRUPT, f"zeros where the base, which was synced, may be ({reason})"
    if written > bad.offset and (damage := _damaged_length(handle, bad, size)):
        return Verdict.CORRUPT, f"a damaged length: {damage} ({bad.reason})"
    return Verdict.TORN, reason


def _damaged_length(handle: ReadHandle, bad: BadRecord, size: int) -> str:
    """Evidence that the bad record, which looks torn, has a damaged length; "" if there is none.

    A complete batch ends with a cursor record: if none follows, no acknowledged batch follows. A
    base may end without one, so there a put is evidence, too.
    """
    rest = read_part(handle, bad.offset, min(size, bad.offset + MAX_RECORD_BYTES))
    if one_bit_fixes(rest):
        return "flipping one bit makes the record whole"
    at = find_cursor_record(rest, 1)
    follows = None if at is None else bad.offset + at
    if follows is None and bad.in_base:
        follows = find_record(handle, bad.offset + 1, size)
    return "" if follows is None else f"a whole record follows at byte {follows}"


def _end_of_data(handle: ReadHandle, start: int, size: int) -> int:
    """The offset after the last nonzero byte from `start` to `size`; `start` if there is none."""
    while (size := _end_before_hole(handle, start, size)) > start:
        low = max(start, size - _REPORT_BYTES)
        if data := read_part(handle, low, size).rstrip(b"\0"):
            return low + len(data)
        size = low
    return start


def _end_before_hole(handle: ReadHandle, start: int, size: int) -> int:
    """The least offset from `start` on after which there is only a hole up to `size`."""
    end = size
    while start < end:
        middle = (start + end) // 2
        data = handle.files.data_after(handle.fd, middle)
        if data is None or data >= size:
            end = middle
        else:
            start = data + 1
    return end
