"""Writes a fold to a new file in foldlog's own format. `formats/rewrite.py` tells its promises."""

from __future__ import annotations

from pathlib import Path

import msgpack
from blake3 import blake3
from crc32c import crc32c

from foldlog.protocol.frames import (
    FLAG_ORIGIN,
    FLAG_SYNC_EACH,
    FRAME_HEADER,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    FileHeader,
)
from foldlog.storage.fold.base import Base
from foldlog.storage.fold.leaf import encode_leaf, leaf_end
from foldlog.storage.fold.reading import Writable
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.foldlog.codec import open_body
from foldlog.storage.formats.format import PRIVATE, LogFile, LogFormat, NewFile, Progress
from foldlog.storage.log.files import Files, ReadHandle
from foldlog.storage.log.scan import Chain, read_frames


class FrameWriter(NewFile):
    """A new file of foldlog's own format."""

    base: Base
    header: FileHeader
    position: Chain

    def __init__(
        self,
        files: Files,
        path: Path,
        header: FileHeader,
        *,
        sync_each: bool = False,
        mode: int = PRIVATE,
    ) -> None:
        super().__init__(files, path, header, header.pack(), Chain.start(header), mode)
        self._seed = header.seed
        self._carried_flags = FLAG_SYNC_EACH if sync_each else 0

    def add(
        self,
        kind: int,
        body: bytes,
        *,
        batches: int = 0,
        body_crc: int | None = None,
        flags: int = 0,
    ) -> int:
        """Append a frame. Returns the offset of its body."""
        body_at = self.position.offset + FRAME_HEADER.size
        frame, self.position = self.position.next_frame(
            self._seed, kind, body, self.header.base_seq, flags, batches, body_crc
        )
        self.put(frame)
        return body_at

    def write_fold(self, fold: Writable, progress: Progress | None = None) -> None:
        self.base, self._copied = write_base(self, fold, progress)
        self.base_end = self.position.offset

    def keep_warm(self, fold: FoldSnapshot) -> None:
        fold.hand_over(self.base, self._copied)

    def carry(self, source: LogFile, start: Chain, stop: int) -> Chain:
        header = source.header
        assert isinstance(header, FileHeader)
        chain = start
        for frame, body in read_frames(source.handle, header, chain, stop):
            if frame.kind == KIND_BATCHES:
                self._begin_session()
                self.add(
                    KIND_BATCHES,
                    bytes(body),
                    batches=frame.batches,
                    body_crc=frame.body_crc,
                    flags=self._carried_flags | (frame.flags & FLAG_ORIGIN),
                )
            chain = chain.after(frame)
        return chain

    def _begin_session(self) -> None:
        if not self.session:
            self.add(KIND_OPEN, open_body(), flags=self._carried_flags)
            self.session = True

    def fold_with(self, since: FoldSnapshot) -> FoldSnapshot:
        return since.over(self.base)

    def log_file(self, format: LogFormat, handle: ReadHandle) -> LogFile:
        self.base.handle = handle
        return super().log_file(format, handle)


def write_base(
    out: FrameWriter, fold: Writable, progress: Progress | None = None
) -> tuple[Base, dict[int, int]]:
    """Write `fold` as leaves and a BASE_END frame.

    Returns the new base, without a handle yet, and the leaves that are copies: new number -> old
    number. Cost: a copy for unchanged leaves, about 1 us an entry for the others.
    """
    base = Base(None)
    copies: dict[int, int] = {}
    digest = blake3()
    keys: list[str] = []
    values: list[bytes] = []
    versions: list[bytes] = []
    total = fold.base_entries

    def emit(body: bytes, crc: int | None = None) -> None:
        digest.update(body)
        offset = out.add(KIND_LEAF, body, body_crc=crc)
        base.add_leaf(offset, body, crc32c(body) if crc is None else crc)

    def emit_leaves(last: bool) -> None:
        start = 0
        while start < len(keys):
            end = leaf_end(keys, values, start)
            if end is None:
                if not last:
                    break
                end = len(keys)
            emit(encode_leaf(keys[start:end], values[start:end], versions[start:end]))
            start = end
        del keys[:start], values[:start], versions[:start]

    for segment in fold.segments():
        carried = segment.carried() if segment.is_leaf and not keys else None
        if carried is not None:
            if segment.unchanged_leaf is not None:
                copies[len(base)] = segment.unchanged_leaf
            emit(*carried)
        else:
            columns = segment.columns()
            keys += columns.keys
            values += columns.values
            versions += columns.versions
            emit_leaves(last=False)
        if progress is not None:
            progress(base.entries, max(total, base.entries))
    emit_leaves(last=True)
    end = {
        "cursor": bytes(fold.cursor()),
        "leaves": len(base),
        "entries": base.entries,
        "digest": digest.digest(),
    }
    if fold.origin:
        end["origin"] = fold.origin
    out.add(KIND_BASE_END, msgpack.packb(end))
    return base, copies
