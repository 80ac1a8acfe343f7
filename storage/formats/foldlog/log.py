"""foldlog's own format, `protocol/frames.py`, behind the seam that all formats share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foldlog.protocol.decoding import Undecodable
from foldlog.protocol.errors import LogChangedError
from foldlog.protocol.frames import FILE_MAGIC, FORMAT_VERSION, FileHeader
from foldlog.storage.fold.collector import no_full_collections
from foldlog.storage.formats.foldlog.check import check_frames, header_and_seed
from foldlog.storage.formats.foldlog.codec import FrameCodec
from foldlog.storage.formats.foldlog.replay import Replay, read_header
from foldlog.storage.formats.foldlog.walk import HeaderPiece, Piece, Walker
from foldlog.storage.formats.foldlog.writer import FrameWriter
from foldlog.storage.formats.format import (
    PRIVATE,
    FileFacts,
    Known,
    Loaded,
    LogFile,
    LogFormat,
    Progress,
    Verdict,
    VerifyReport,
)
from foldlog.storage.log.files import Files, ReadHandle
from foldlog.storage.log.recovery import Rest, judge_rest
from foldlog.storage.log.scan import BadFrame, Chain, read_frames
from foldlog.storage.log.sidecars.regression import lost_since, regression_text


@dataclass(frozen=True, slots=True)
class LoadedFrames(Loaded):
    """See `Loaded`."""

    header: FileHeader
    position: Chain
    boot: str
    """The boot id of the last OPEN frame; "" if there is none."""


class FrameFormat(LogFormat):
    """foldlog's own format: `protocol/frames.py`."""

    name = "foldlog"
    magic = FILE_MAGIC
    backend = "foldlog"
    backend_version = str(FORMAT_VERSION)
    payload_path = "data/fold.log"

    def codec(self, header: FileHeader, *, sync_each: bool) -> FrameCodec:
        return FrameCodec(header, sync_each=sync_each)

    def new_file(
        self,
        files: Files,
        path: Path,
        *,
        seq: int,
        log_id: bytes | None = None,
        sync_each: bool = False,
        mode: int = PRIVATE,
    ) -> FrameWriter:
        return FrameWriter(files, path, FileHeader.new(log_id, seq), sync_each=sync_each, mode=mode)

    def is_compact(self, file: LogFile, position: Chain) -> bool:
        # OPEN and SEAL frames take space, but hold no batches.
        return position.seq == file.header.base_seq

    def may_be_unsynced(self, loaded: Loaded) -> bool:
        return loaded.position.offset > loaded.base_end

    def load(
        self, handle: ReadHandle, progress: Progress | None = None, known: Known | None = None
    ) -> LoadedFrames:
        header = read_header(handle)
        size = handle.files.fstat(handle.fd).st_size
        chain = Chain.start(header)
        replay = Replay(handle, header)
        bad: BadFrame | None = None
        try:
            with no_full_collections():
                for frame, body in read_frames(handle, header, chain, size):
                    try:
                        replay.feed(frame, body)
                    except Undecodable as error:
                        raise BadFrame(frame.offset, str(error), final=True) from None
                    chain = chain.after(frame)
                    if progress is not None:
                        progress(frame.offset + frame.size, size)
        except BadFrame as error:
            bad = error
        if bad is None and not replay.base_end:
            bad = BadFrame(chain.offset, "the file ends before the base does", final=True)
        fold = replay.fold()
        return LoadedFrames(
            self,
            header,
            fold,
            chain,
            size,
            replay.base_end,
            fold.base_entries,
            replay.frames,
            replay.sealed,
            bad,
            replay.boot,
        )

    def diagnose(self, handle: ReadHandle, loaded: Loaded) -> tuple[Verdict, str]:
        bad = loaded.bad
        assert bad is not None
        assert isinstance(loaded, LoadedFrames)
        if bad.final:
            return Verdict.CORRUPT, bad.reason
        if not loaded.base_end:
            # Not torn: a base is synced before its file is renamed.
            return Verdict.CORRUPT, f"the base is damaged: {bad.reason}"
        rest = Rest(handle, bad.offset, loaded.size - bad.offset)
        try:
            verdict, why = judge_rest(rest, loaded.header.seed, loaded.position.seq, loaded.boot)
        except EOFError as error:
            raise LogChangedError(handle.path, str(error)) from None
        return verdict, f"{why} ({bad.reason})"

    def check_payload(self, loaded: Loaded) -> None:
        loaded.fold.check_base()

    def check(
        self,
        handle: ReadHandle,
        size: int,
        *,
        tail_may_be_torn: bool,
        known: Known | None = None,
        progress: Progress | None = None,
    ) -> VerifyReport:
        return check_frames(handle, size, tail_may_be_torn=tail_may_be_torn, progress=progress)

    def walk(self, handle: ReadHandle, size: int) -> Iterator[HeaderPiece | Piece]:
        header, seed, reason = header_and_seed(handle, size)
        yield HeaderPiece(header, reason)
        seq = 0 if header is None else header.base_seq
        for piece in Walker(handle, seed, size).pieces():
            if piece.header is not None and not piece.reason:
                seq = max(seq, piece.header.seq)
            yield piece
        if header is not None and (mark := lost_since(handle, header.log_id, seq, size)):
            yield Piece(size, 0, None, b"", f"the log {regression_text(seq, mark)}")

    def facts(self, loaded: Loaded) -> FileFacts:
        assert isinstance(loaded, LoadedFrames)
        header = loaded.header
        return FileFacts(
            header.log_id.hex(),
            f"{header.generation:016x}",
            loaded.position.seq,
            loaded.fold.base_leaves,
            loaded.sealed,
        )


FRAMES = FrameFormat()
