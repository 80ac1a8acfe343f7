"""The format "slipstream-v2" as a log: reading it into a fold, telling torn from corrupt, appending, rewriting.

The format has no ids and no sequence numbers. What the rest of foldlog needs of them is made up in memory, for as long as the
process lives: a random log id, and a count of the cursor records behind the base (one to a batch), which goes on across
rewrites, and across a writer's restart, by what `Log.known` remembers. A new process begins to count anew.

All entries are kept in memory, as the origin does: as a delta over an empty base.

Where it is not sure, the origin drops the end of a file; this refuses. See `diagnose`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from foldlog.protocol.errors import InvalidFormatError, LogChangedError
from foldlog.protocol.frames import FileHead
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Change
from foldlog.storage.fold.base import EMPTY_BASE
from foldlog.storage.fold.collector import no_full_collections
from foldlog.storage.fold.delta import EMPTY_DELTA, PIECE_ENTRIES, Collected, Delta, Run
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.registry import (
    BUFFER_BYTES,
    PRIVATE,
    Known,
    Loaded,
    LogFile,
    LogFormat,
    NewFile,
    Progress,
)
from foldlog.storage.formats.rewrite import new_head
from foldlog.storage.formats.slipstream import (
    CURSOR,
    HEAD,
    HEAD_BYTES,
    MAX_CURSOR_BYTES,
    MAX_RECORD_BYTES,
    PUT,
    BadRecord,
    Record,
    check_head,
    encode_cursor,
    encode_item,
    encode_put,
    read_records,
)
from foldlog.storage.formats.slipstream_search import (
    find_cursor_record,
    find_record,
    one_bit_fixes,
)
from foldlog.storage.log.files import Files, ReadHandle
from foldlog.storage.log.recovery import SECTOR, Verdict
from foldlog.storage.log.scan import Chain

_REPORT_BYTES = 1024 * 1024


class RecordCodec:
    """Appends as records. A session begins and ends without a trace. See `format.Codec`."""

    def group(self, items: Sequence[bytes], chain: Chain, synced_seq: int) -> tuple[bytes, Chain]:
        data = encode_item(items[0]) if len(items) == 1 else b"".join(map(encode_item, items))
        return data, Chain(chain.offset + len(data), 0, chain.seq + len(items), synced_seq)

    def opening(self, chain: Chain, synced_seq: int) -> None:
        return None

    def seal(self, chain: Chain, synced_seq: int) -> None:
        return None


class RecordFile(NewFile):
    """A new file of this format."""

    def __init__(self, files: Files, path: Path, head: FileHead, mode: int = PRIVATE) -> None:
        chain = Chain(HEAD.size, 0, head.base_seq, head.base_seq)
        super().__init__(files, path, head, HEAD_BYTES, chain, mode)
        self._delta = EMPTY_DELTA

    def write_fold(self, fold: FoldSnapshot, progress: Progress | None = None) -> None:
        # What is in memory already is kept, in its compacted form, for the log that goes on in this file.
        pieces = _Pieces() if fold.base is EMPTY_BASE else None
        done, total = 0, fold.base.entries
        for span in fold.spans("", None):
            if span.leaf < 0:
                live = [
                    change for _, change in sorted(span.changes.items()) if change[1] is not None
                ]
                if pieces is not None:
                    pieces.add(live)
                keys: Sequence[str] = [change[0] for change in live]
                values: Sequence[bytes] = [change[1] for change in live]  # type: ignore[misc]
                versions: Sequence[bytes] = [change[2] for change in live]
            else:
                keys, values, versions = fold.span_columns(span)
            self._add_puts(keys, values, versions)
            done += len(keys)
            if progress is not None:
                progress(done, max(total, done))
        if fold.cursor():
            self._add(encode_cursor(fold.cursor()))
        self.base_end = self.chain.offset
        if pieces is not None:
            self._delta = pieces.delta()

    def _add_puts(
        self, keys: Sequence[str], values: Sequence[bytes], versions: Sequence[bytes]
    ) -> None:
        records: list[bytes] = []
        size = 0
        for record in map(encode_put, map(str.encode, keys), values, versions):
            records.append(record)
            size += len(record)
            if size >= BUFFER_BYTES:
                self._add(b"".join(records))
                records, size = [], 0
        self._add(b"".join(records))

    def _add(self, data: bytes, batches: int = 0) -> None:
        chain = self.chain
        self.chain = Chain(chain.offset + len(data), 0, chain.seq + batches, chain.synced_seq)
        self.put(data)

    def carry(self, source: LogFile, chain: Chain, stop: int) -> Chain:
        cursors = 0
        for record in read_records(source.handle, chain.offset, stop):
            cursors += record.kind == CURSOR
        for start in range(chain.offset, stop, _REPORT_BYTES):
            self._add(source.handle.read(min(_REPORT_BYTES, stop - start), start))
        self.chain = self.chain._replace(seq=self.chain.seq + cursors)
        return chain._replace(offset=stop, seq=chain.seq + cursors)

    def fold_with(self, since: FoldSnapshot) -> FoldSnapshot:
        newest_first = tuple(since.delta)[::-1]
        delta = self._delta.with_runs(newest_first) if newest_first else self._delta
        return FoldSnapshot(EMPTY_BASE, delta, since.runs, since.seq, since.cursor(), since.origin)


class _Pieces:
    """Live entries, which come in key order, as the pieces of a delta."""

    def __init__(self) -> None:
        self._firsts: list[str] = []
        self._pieces: list[Run] = []

    def add(self, changes: Sequence[Change]) -> None:
        for start in range(0, len(changes), PIECE_ENTRIES // 2):
            part = changes[start : start + PIECE_ENTRIES // 2]
            self._firsts.append(part[0][0] if self._pieces else "")
            self._pieces.append(Run({change[0]: change for change in part}))

    def delta(self) -> Delta:
        return Delta(self._firsts, self._pieces) if self._pieces else EMPTY_DELTA


class Count:
    """Where a file's base ends, and how many batches follow: told by its records, in order.

    The base is what a compaction would have written, if the file begins with that; else it is empty.
    """

    def __init__(self, known: Known | None = None) -> None:
        self.cursor = WatchCursor.none()
        self.records = 0
        self.entries = 0
        """Of the base."""
        self.base_end = HEAD.size if known is None else known.base_end
        self.batches = 0
        """Cursor records behind the base."""
        self.base_seq = 0 if known is None else known.head.base_seq
        """The sequence of the base. Where it is not known, 1 for a base with a cursor."""
        self._known = known is not None
        self._in_base = True  # only puts so far, ascending
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
        """True if what comes at `offset`, after the records so far, may belong to the base."""
        return offset < self.base_end if self._known else self._in_base

    def end(self, offset: int) -> None:
        """The records end there."""
        if self._in_base and not self._known:
            self.base_end = offset
        if self.base_end == HEAD.size:
            self.entries = 0


class _Replay(Count):
    """Records on their way into a fold."""

    def __init__(self, known: Known | None) -> None:
        super().__init__(known)
        self._collected = Collected()

    def feed(self, record: Record) -> None:
        if self._in_base or record[0] == CURSOR:
            super().feed(record)
        else:
            self.records += 1
        kind, key, value, token, _ = record
        if kind != CURSOR:
            self._collected.add({key: (key, value, token)})

    def delta(self) -> Delta:
        """The live entries: what was removed needs no memory, for there is nothing below that it hides."""
        delta, runs = self._collected.settled()
        pieces = _Pieces()
        for piece in (*delta, *runs):
            pieces.add(
                [
                    change
                    for change in map(piece.__getitem__, piece.order())
                    if change[1] is not None
                ]
            )
        return pieces.delta()


class SlipstreamFormat(LogFormat):
    """The log of the Rust crate `beyond-slipstream`, version 2."""

    name = "slipstream-v2"
    backend = "append-log"
    backend_version = "2"
    payload_path = "data/fold.snap"
    keeps_origin = False

    def codec(self, head: FileHead, *, sync_each: bool) -> RecordCodec:
        return RecordCodec()

    def new_file(
        self,
        files: Files,
        path: Path,
        *,
        seq: int,
        log_id: bytes | None = None,
        sync_each: bool = False,
        mode: int = PRIVATE,
    ) -> RecordFile:
        return RecordFile(files, path, new_head(log_id, seq), mode)

    def is_compact(self, head: FileHead, base_end: int, chain: Chain) -> bool:
        return chain.offset == base_end

    def may_be_unsynced(self, loaded: Loaded) -> bool:
        return True  # nothing in the file tells

    def load(
        self, handle: ReadHandle, progress: Progress | None = None, known: Known | None = None
    ) -> Loaded:
        """See `LogFormat`. Records behind the last cursor record are applied, as the origin does. Cost: 2 us a record."""
        try:
            check_head(handle.files.read(handle.fd, HEAD.size, 0))
        except ValueError as error:
            raise InvalidFormatError(handle.path, 0, str(error)) from None
        size = handle.files.fstat(handle.fd).st_size
        if known is not None and known.base_end > size:
            known = None  # it was cut, or is another: its writer finds the log id changed
        replay = _Replay(known)
        offset = reported = HEAD.size
        bad: BadRecord | None = None
        try:
            with no_full_collections():
                for record in read_records(handle, offset, size):
                    replay.feed(record)
                    offset = record.end
                    if progress is not None and offset - reported >= _REPORT_BYTES:
                        reported = offset
                        progress(offset, size)
        except BadRecord as error:
            bad = error
            bad.in_base = replay.may_be_in_base(offset)
        replay.end(offset)
        head = (
            known.head
            if known is not None and offset >= known.base_end
            else new_head(None, replay.base_seq)
        )
        fold = FoldSnapshot(EMPTY_BASE, replay.delta(), (), replay.seq, replay.cursor)
        chain = Chain(offset, 0, replay.seq, 0)
        return Loaded(
            head,
            fold,
            chain,
            size,
            replay.base_end,
            replay.records,
            "",
            False,
            bad,
            self,
            replay.entries,
        )

    def diagnose(self, handle: ReadHandle, loaded: Loaded) -> tuple[Verdict, str]:
        bad = loaded.bad
        assert isinstance(bad, BadRecord)
        return judge(handle, bad, loaded.size)

    def check_payload(self, loaded: Loaded) -> None:
        """Every record was checked when it was read, and a base is in key order."""


SLIPSTREAM = SlipstreamFormat()


def judge(handle: ReadHandle, bad: BadRecord, size: int) -> tuple[Verdict, str]:
    """Whether the bytes from the bad record to `size` are torn or corrupt, and the reason. `docs/interchange.md` has the rule.

    LogChangedError if the file ends before `size`. Memory: one record. Cost: see `slipstream_search`.
    """
    if bad.final:
        return Verdict.CORRUPT, bad.reason
    written = _end_of_data(handle, bad.offset, size)
    zeros_from = written + -written % SECTOR
    if written == bad.offset:
        lost_sector, reason = True, "nothing but zeros"
    elif bad.cut_short:
        lost_sector, reason = False, f"the last record ends early ({bad.reason})"
    elif zeros_from < bad.end and size - zeros_from >= MAX_CURSOR_BYTES:
        lost_sector, reason = True, f"a sector of the last record is missing ({bad.reason})"
    else:
        return Verdict.CORRUPT, bad.reason
    if lost_sector and bad.in_base and written > HEAD.size:
        return Verdict.CORRUPT, f"zeros in what may be the base, which was synced ({reason})"
    if written > bad.offset and (damage := _damaged_length(handle, bad, size)):
        return Verdict.CORRUPT, f"a damaged length: {damage} ({bad.reason})"
    return Verdict.TORN, reason


def _damaged_length(handle: ReadHandle, bad: BadRecord, size: int) -> str:
    """What shows that the bad record, which seems to be torn, has a damaged length; "" if nothing does.

    A batch that was written whole ends with a cursor record: if none follows, no answered batch does. A base may end without
    one, so a put is evidence there, too.
    """
    rest = read_rest(handle, bad.offset, min(size, bad.offset + MAX_RECORD_BYTES))
    if one_bit_fixes(rest):
        return "one bit makes a whole record of it"
    at = find_cursor_record(rest, 1)
    follows = None if at is None else bad.offset + at
    if follows is None and bad.in_base:
        follows = find_record(handle, bad.offset + 1, size)
    return "" if follows is None else f"a whole record follows at byte {follows}"


def _end_of_data(handle: ReadHandle, start: int, size: int) -> int:
    """Where the last byte from `start` to `size` that is not zero ends; `start` if there is none."""
    while size > start:
        low = max(start, size - _REPORT_BYTES)
        if data := read_rest(handle, low, size).rstrip(b"\0"):
            return low + len(data)
        size = low
    return start


def read_rest(handle: ReadHandle, offset: int, size: int) -> bytes:
    """The bytes from `offset` to `size`. LogChangedError if the file ends before."""
    try:
        return handle.read(size - offset, offset)
    except EOFError as error:
        raise LogChangedError(handle.path, str(error)) from None
