"""A fold into a new file: how a log is created, compacted and exported.

The new file is written beside the place where it shall stand, synced, and renamed; its descriptors stay open across the
rename, so that no step after it can fail. Equal states give equal bodies; only ids, and the checksums that they seed, differ.
Leaves that nothing touched are copied as they are.

A compaction runs beside the writer: `Rewrite.write` works from an immutable fold, `catch_up` carries over the frames that were
appended meanwhile, and only `finish` (the last few frames, an fsync, the rename) needs the writer to stand still.
"""

from __future__ import annotations

import secrets
from pathlib import Path

import msgpack
from blake3 import blake3
from crc32c import crc32c

from foldlog.protocol.errors import StoreClosed, StoreLocked
from foldlog.protocol.frames import (
    FLAG_SYNC_EACH,
    FRAME_HEAD,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    FileHead,
    build_frame,
)
from foldlog.storage.fold.base import Base
from foldlog.storage.fold.leaf import encode_leaf, leaf_end, patched_leaf
from foldlog.storage.fold.snapshot import FoldSnapshot, Span
from foldlog.storage.formats.registry import LogFile, LogFormat, NewFile
from foldlog.storage.formats.registry import Progress as Progress
from foldlog.storage.log.files import Files, ReadHandle
from foldlog.storage.log.lock import temporary
from foldlog.storage.log.log import Log, open_body
from foldlog.storage.log.scan import Chain, read_frames


def new_head(log_id: bytes | None = None, base_seq: int = 0) -> FileHead:
    """A file head with a random generation, and a random log id unless one is kept."""
    return FileHead(log_id or secrets.token_bytes(16), secrets.randbits(64), base_seq)


class FrameWriter(NewFile):
    """A new file of foldlog's own format."""

    base: Base

    def __init__(
        self, files: Files, path: Path, head: FileHead, *, sync_each: bool = False
    ) -> None:
        super().__init__(files, path, head, head.pack(), Chain.start(head))
        self._seed = head.seed
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
        chain = self.chain
        seq = chain.seq + batches
        frame, link = build_frame(
            self._seed,
            kind,
            body,
            seq=seq,
            synced_seq=self.head.base_seq,
            offset=chain.offset,
            link=chain.link,
            flags=flags,
            batches=batches,
            body_crc=body_crc,
        )
        self.chain = Chain(chain.offset + len(frame), link, seq, self.head.base_seq)
        self.put(frame)
        return chain.offset + FRAME_HEAD.size

    def write_fold(self, fold: FoldSnapshot, progress: Progress | None = None) -> None:
        self.base, self._copied = write_base(self, fold, progress)
        self.base_end = self.chain.offset

    def keep_warm(self, fold: FoldSnapshot) -> None:
        self.base.inherit(fold.base, self._copied, (*fold.delta, *reversed(fold.runs)))

    def carry(self, source: LogFile, chain: Chain, stop: int) -> Chain:
        flags = self._carried_flags
        for frame, body in read_frames(source.handle, source.head, chain, stop):
            if frame.kind == KIND_BATCHES:
                if not self.session:
                    self.add(KIND_OPEN, open_body(), flags=flags)
                    self.session = True
                self.add(
                    KIND_BATCHES,
                    bytes(body),
                    batches=frame.batches,
                    body_crc=frame.body_crc,
                    flags=flags,
                )
            chain = chain.after(frame)
        return chain

    def fold_with(self, since: FoldSnapshot) -> FoldSnapshot:
        return FoldSnapshot(self.base, since.delta, since.runs, since.seq, since.cursor())

    def log_file(self, format: LogFormat, handle: ReadHandle) -> LogFile:
        self.base.handle = handle
        return super().log_file(format, handle)


def write_base(
    out: FrameWriter, fold: FoldSnapshot, progress: Progress | None = None
) -> tuple[Base, dict[int, int]]:
    """Write `fold` as leaves and a BASE_END frame. Returns the base as it stands there, without a handle yet, and which
    of its leaves (by number) are copies of which of the old base's.

    Cost: a copy for leaves without changes, about 1 us an entry for the others.
    """
    base = Base(None)
    copies: dict[int, int] = {}
    digest = blake3()
    keys: list[str] = []
    values: list[bytes] = []
    versions: list[bytes] = []
    total = fold.base.entries

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

    for span in fold.spans("", None):
        copied = _copied_leaf(fold, span) if span.whole and not keys else None
        if copied is not None:
            if not span.changes:
                copies[len(base)] = span.leaf
            emit(*copied)
        else:
            columns = fold.span_columns(span)
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
    out.add(KIND_BASE_END, msgpack.packb(end))
    return base, copies


def _copied_leaf(fold: FoldSnapshot, span: Span) -> tuple[bytes, int | None] | None:
    """The body of a leaf, and its checksum if it is as it was; None if it has to be made from its entries."""
    if len(span.changes) > PATCHED_CHANGES:
        return None
    body = fold.base.body(span.leaf)
    if not span.changes:
        return body, fold.base.crc(span.leaf)
    patched = patched_leaf(body, span.changes)
    return None if patched is None else (patched, None)


PATCHED_CHANGES = 32
"""Up to so many changes, patching a leaf beats decoding it."""


class Cancelled(Exception):
    """A rewrite was told to stop."""


class Rewrite:
    """A compaction under way: the log's fold, on its way into a new file of the same format."""

    def __init__(self, log: Log, fold: FoldSnapshot) -> None:
        """Start from `fold`, which holds all that is in the log (or, if the log is poisoned, all that was acknowledged)."""
        self._log = log
        self._fold: FoldSnapshot | None = (
            fold  # let go of once it is written: it holds the old base
        )
        self._poisoned = log.poison is not None
        self._carried = log.chain  # behind what the new file has of the log
        self._out: NewFile | None = None
        self._adopted = False
        self.cancelled = False
        """Set by anyone to make `write` stop soon, with Cancelled."""

    def write(self, progress: Progress | None = None) -> None:
        """Write the fold, and sync it. The long part; any thread may run it while the log is appended to."""

        def step(done: int, total: int) -> None:
            if self.cancelled:
                raise Cancelled
            if progress is not None:
                progress(done, total)

        log, fold, self._fold = self._log, self._fold, None
        assert fold is not None, "a rewrite is written once"
        self._out = log.file.format.new_file(
            log.files,
            temporary(log.path),
            seq=fold.seq,
            log_id=log.file.head.log_id,
            sync_each=log.sync_each,
        )
        self._out.write_fold(fold, step)
        self._out.sync()
        self._out.keep_warm(fold)

    def catch_up(self) -> int:
        """Carry over and sync what was appended by now. Returns the bytes carried; any thread may run it."""
        if self._poisoned:
            return 0  # what stands behind the acknowledged fold is a lie
        log, out = self._log, self._out
        assert out is not None
        start, stop = self._carried.offset, log.chain.offset
        self._carried = out.carry(log.file, self._carried, stop)
        if stop > start:
            out.sync()
        return stop - start

    def finish(self, since: FoldSnapshot) -> FoldSnapshot:
        """Take the log's place. The writer stands still meanwhile. Returns the fold, with what was committed `since`.

        On an error, which comes before the rename, the log goes on as it was.
        """
        log, out = self._log, self._out
        assert out is not None
        if log.closed:
            raise StoreClosed(f"{log.path} was closed while it was compacted")
        self.catch_up()
        if not self._poisoned:
            log.check_unchanged()
        handle = ReadHandle(log.files, out.path)
        file = out.log_file(log.file.format, handle)
        fold = out.fold_with(since)
        if not log.files.lock(out.fd):
            raise StoreLocked(log.path, None)
        inode = log.identity(out.fd)
        log.announce(file)
        try:
            log.files.replace(out.path, log.path)  # the last step that can fail
        except BaseException:
            log.announce(None)
            raise
        self._adopted = True
        handle.path = log.path
        log.adopt(file, inode)
        return fold

    def discard(self) -> None:
        """Give it up, unless `finish` has renamed: the log goes on as it was."""
        if self._out is not None and not self._adopted:
            self._adopted = True
            self._out.discard()


def write_new(
    files: Files,
    path: Path,
    fold: FoldSnapshot,
    format: LogFormat,
    progress: Progress | None = None,
) -> None:
    """Make a log that holds `fold` at `path`, whole or not at all. FileExistsError if the name is taken."""
    out = format.new_file(files, temporary(path), seq=fold.seq)
    try:
        out.write_fold(fold, progress)
        out.sync()
        files.link_new(out.path, path)
        files.sync_dir(path.parent)
    finally:
        out.discard()
