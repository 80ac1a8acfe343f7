"""The format "slipstream-v2" behind the seam of the formats: loading, appending, rewriting.

The format stores no ids and no sequences. What the rest of foldlog needs of them is kept in memory
while the process lives: a random log id, and the number of cursor records after the base, one for
each batch. They survive rewrites, and a restart of the writer through `Log.known`. A new process
starts counting anew.

All entries are kept in memory, as in the Rust crate: as a delta over an empty base.

When in doubt, the Rust crate drops the end of a file; foldlog refuses the log. See `judge.py`.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from foldlog.protocol.updates import Change
from foldlog.storage.fold.base import EMPTY_BASE
from foldlog.storage.fold.collector import no_full_collections
from foldlog.storage.fold.delta import EMPTY_DELTA, PIECE_ENTRIES, Collected, Delta, Run
from foldlog.storage.fold.reading import Writable
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.format import (
    BUFFER_BYTES,
    PRIVATE,
    FileFacts,
    Header,
    Known,
    Loaded,
    LogFile,
    LogFormat,
    NewFile,
    Progress,
    Verdict,
)
from foldlog.storage.formats.slipstream.judge import Count, judge
from foldlog.storage.formats.slipstream.records import (
    CURSOR,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    BadRecord,
    Record,
    check_header,
    encode_cursor,
    encode_item,
    encode_put,
    read_records,
)
from foldlog.storage.formats.slipstream.walk import check_records, walk_records
from foldlog.storage.log.files import Files, ReadHandle

_REPORT_BYTES = 1024 * 1024


class RecordHeader(NamedTuple):
    """What this process knows of a file. None of it is written."""

    log_id: bytes
    base_seq: int

    @classmethod
    def new(cls, base_seq: int, log_id: bytes | None = None) -> RecordHeader:
        """With a new random log id, unless one is given."""
        return cls(log_id or secrets.token_bytes(16), base_seq)


class RecordPosition(NamedTuple):
    """See `Position`."""

    offset: int
    seq: int
    synced_seq: int = 0


class RecordCodec:
    """Encodes appends as records. Sessions leave no trace. See `formats.format.Codec`."""

    def group(
        self, items: Sequence[bytes], position: RecordPosition, synced_seq: int
    ) -> tuple[bytes, RecordPosition]:
        data = encode_item(items[0]) if len(items) == 1 else b"".join(map(encode_item, items))
        return data, RecordPosition(position.offset + len(data), position.seq + len(items))

    def opening(self, position: RecordPosition, synced_seq: int) -> None:
        return None

    def seal(self, position: RecordPosition, synced_seq: int) -> None:
        return None


class RecordFile(NewFile):
    """A new file in this format."""

    position: RecordPosition

    def __init__(self, files: Files, path: Path, header: Header, mode: int = PRIVATE) -> None:
        start = RecordPosition(HEADER.size, header.base_seq, header.base_seq)
        super().__init__(files, path, header, HEADER_BYTES, start, mode)
        self._delta = EMPTY_DELTA

    def write_fold(self, fold: Writable, progress: Progress | None = None) -> None:
        # If all entries are in memory already, keep them, compacted, for `fold_with`.
        pieces = _Pieces()
        done, total = 0, fold.base_entries
        for segment in fold.segments():
            live = segment.live_changes() if fold.is_in_memory else None
            if live is not None:
                pieces.add(live)
                keys: Sequence[str] = [change[0] for change in live]
                values: Sequence[bytes] = [change[1] for change in live]  # type: ignore[misc]
                versions: Sequence[bytes] = [change[2] for change in live]
            else:
                keys, values, versions = segment.columns()
            self._add_puts(keys, values, versions)
            done += len(keys)
            if progress is not None:
                progress(done, max(total, done))
        if fold.cursor():
            self._add(encode_cursor(fold.cursor()))
        self.base_end = self.position.offset
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
        offset, seq, synced_seq = self.position
        self.position = RecordPosition(offset + len(data), seq + batches, synced_seq)
        self.put(data)

    def carry(self, source: LogFile, start: RecordPosition, stop: int) -> RecordPosition:
        cursors = 0
        for record in read_records(source.handle, start.offset, stop):
            cursors += record.kind == CURSOR
        for at in range(start.offset, stop, _REPORT_BYTES):
            self._add(source.handle.read(min(_REPORT_BYTES, stop - at), at))
        self.position = self.position._replace(seq=self.position.seq + cursors)
        return start._replace(offset=stop, seq=start.seq + cursors)

    def fold_with(self, since: FoldSnapshot) -> FoldSnapshot:
        return since.over(EMPTY_BASE, self._delta)


class _Pieces:
    """Collects live entries, in key order, as the pieces of a delta."""

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


class _Replay(Count):
    """Builds a fold from records."""

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
        """The live entries. Tombstones are dropped: the base is empty, so they hide nothing."""
        delta, runs = self._collected.settled()
        pieces = _Pieces()
        for piece in (*delta, *runs):
            changes = map(piece.__getitem__, piece.order())
            pieces.add([change for change in changes if change[1] is not None])
        return pieces.delta()


class SlipstreamFormat(LogFormat):
    """The log of the Rust crate `beyond-slipstream`, version 2."""

    name = "slipstream-v2"
    magic = MAGIC
    backend = "append-log"
    backend_version = "2"
    payload_path = "data/fold.snap"
    keeps_origin = False

    def codec(self, header: Header, *, sync_each: bool) -> RecordCodec:
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
        return RecordFile(files, path, RecordHeader.new(seq, log_id), mode)

    def is_compact(self, file: LogFile, position: RecordPosition) -> bool:
        return position.offset == file.base_end

    def may_be_unsynced(self, loaded: Loaded) -> bool:
        return True  # the file does not say

    def load(
        self, handle: ReadHandle, progress: Progress | None = None, known: Known | None = None
    ) -> Loaded:
        """See `LogFormat`. Records after the last cursor record are applied, as in the Rust crate.

        Cost: 2 us a record.
        """
        check_header(handle)
        size = handle.files.fstat(handle.fd).st_size
        if known is not None and known.base_end > size:
            known = None  # the file was cut or replaced: the changed log id tells the writer
        replay = _Replay(known)
        offset = reported = HEADER.size
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
        header: Header = RecordHeader.new(replay.base_seq)
        if known is not None and offset >= known.base_end:
            header = known.header
        return Loaded(
            self,
            header,
            FoldSnapshot(EMPTY_BASE, replay.delta(), (), replay.seq, replay.cursor),
            RecordPosition(offset, replay.seq),
            size,
            replay.base_end,
            replay.entries,
            replay.records,
            False,
            bad,
        )

    def diagnose(self, handle: ReadHandle, loaded: Loaded) -> tuple[Verdict, str]:
        bad = loaded.bad
        assert isinstance(bad, BadRecord)
        return judge(handle, bad, loaded.size)

    def check_payload(self, loaded: Loaded) -> None:
        """Nothing is left to check: loading checked every record, and the base's key order."""

    check = staticmethod(check_records)
    walk = staticmethod(walk_records)

    def facts(self, loaded: Loaded) -> FileFacts:
        return FileFacts(None, None, None, None, None)


SLIPSTREAM = SlipstreamFormat()
