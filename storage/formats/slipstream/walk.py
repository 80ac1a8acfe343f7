"""Reads all of a log in the format "slipstream-v2", damaged or not, and reports what is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from foldlog.storage.formats.format import Known, Problem, Progress, Verdict, VerifyReport
from foldlog.storage.formats.slipstream.judge import Count, judge
from foldlog.storage.formats.slipstream.records import (
    HEADER,
    BadRecord,
    Record,
    check_header,
    read_records,
)
from foldlog.storage.formats.slipstream.search import find_record
from foldlog.storage.log.files import ReadHandle

_REPORT_RECORDS = 4096


class RecordPiece(NamedTuple):
    """A record, or a stretch of bytes that is not one."""

    offset: int
    size: int
    record: Record | None
    reason: str
    """Why it is not a record; "" for a record."""
    torn: bool
    """True if it is a torn tail."""

    @property
    def is_damage(self) -> bool:
        """True if it is neither a record nor a torn tail."""
        return bool(self.reason) and not self.torn


def walk_records(
    handle: ReadHandle, size: int, *, tail_may_be_torn: bool = True, count: Count | None = None
) -> Iterator[RecordPiece]:
    """The pieces of a file, from its header to `size`, without gaps. `count` is fed the records.

    After damage, it continues with the next whole record. InvalidFormatError if the header is not
    of this format. Cost: 2 us a record; a search for each damaged piece.
    """
    check_header(handle)
    offset = HEADER.size
    count = count or Count()
    while offset < size:
        try:
            for record in read_records(handle, offset, size):
                count.feed(record)
                yield RecordPiece(offset, record.end - offset, record, "", False)
                offset = record.end
        except BadRecord as bad:
            bad.in_base = count.may_be_in_base(offset)
            verdict, reason = judge(handle, bad, size)
            if verdict is Verdict.TORN and tail_may_be_torn:
                yield RecordPiece(offset, size - offset, None, reason, True)
                return
            at = find_record(handle, offset + 1, size)
            stop = size if at is None else at
            yield RecordPiece(offset, stop - offset, None, reason, False)
            offset = stop


def check_records(
    handle: ReadHandle,
    size: int,
    *,
    tail_may_be_torn: bool,
    known: Known | None = None,
    progress: Progress | None = None,
) -> VerifyReport:
    """Check the checksum and the limits of every record of a file up to `size`.

    The format has nothing else to check.
    """
    count = Count(known)
    torn, bad = None, []
    end = HEADER.size
    for piece in walk_records(handle, size, tail_may_be_torn=tail_may_be_torn, count=count):
        if piece.record is not None:
            end = piece.offset + piece.size
            if progress is not None and count.records % _REPORT_RECORDS == 0:
                progress(end, size)
        elif piece.torn:
            torn = piece
        else:
            bad.append(piece)
    count.end(end)
    return VerifyReport(
        path=handle.path,
        size=size,
        frames=count.records,
        leaves=0,
        entries=count.entries,
        batches=count.batches,
        seq=count.seq,
        cursor=count.cursor,
        sealed=False,
        torn_bytes=torn.size if torn is not None else 0,
        torn_reason=torn.reason if torn is not None else "",
        problems=tuple(Problem(piece.offset, piece.size, piece.reason) for piece in bad),
    )
