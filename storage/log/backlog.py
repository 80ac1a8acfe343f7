"""The batches that a log still holds after a cursor, or after a sequence."""

from __future__ import annotations

from collections.abc import Iterator

from foldlog.protocol.decoding import Undecodable, decode_batches
from foldlog.protocol.errors import CorruptLogError, InvalidFormatError
from foldlog.protocol.frames import (
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    FileHeader,
    FrameHeader,
    parse_base_end,
)
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import DecodedBatch
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.registry import read_own_header
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.log.scan import BadFrame, Chain, read_frames


def batches_since(
    fold: FoldSnapshot, cursor: WatchCursor
) -> Iterator[tuple[int, DecodedBatch]] | None:
    """The batches from `cursor` to `fold`, with their sequences, read from the file of `fold`'s
    base.

    They start after the first batch whose cursor is `cursor`. None if neither the base nor a batch
    after it has that cursor. CorruptLogError if the file is damaged. Cost: reads the file up to the
    cursor at once, and the rest as the iterator is consumed.
    """
    handle = fold.source
    if handle is None:
        return None
    try:
        header = read_own_header(handle)
    except InvalidFormatError:
        return None  # only foldlog's own format has sequences to resume by
    size = handle.files.fstat(handle.fd).st_size
    chain = Chain.start(header)
    try:
        for frame, body in read_frames(handle, header, chain, size):
            if frame.kind == KIND_BASE_END and parse_base_end(body)[0] == cursor:
                return _batches_after(handle, header, chain.after(frame), size, frame.seq, fold.seq)
            if frame.kind == KIND_BATCHES:
                batches = decoded(frame, body)
                for seq, batch in enumerate(batches, chain.seq + 1):
                    if batch.cursor == cursor and seq <= fold.seq:
                        return _batches_after(handle, header, chain, size, seq, fold.seq)
            chain = chain.after(frame)
            if frame.kind != KIND_LEAF and chain.seq >= fold.seq:
                break
    except BadFrame as bad:
        raise CorruptLogError(handle.path, bad.offset, bad.reason) from None
    except Undecodable as error:
        raise CorruptLogError(handle.path, frame.offset, str(error)) from None
    return None


def _batches_after(
    handle: ReadHandle, header: FileHeader, chain: Chain, size: int, seq: int, last_seq: int
) -> Iterator[tuple[int, DecodedBatch]]:
    """The batches after batch `seq`, up to `last_seq`, from the frames after `chain`."""
    if chain.seq >= last_seq:
        return
    try:
        for frame, body in read_frames(handle, header, chain, size):
            if frame.kind == KIND_BATCHES:
                for number, batch in enumerate(decoded(frame, body), frame.seq - frame.batches + 1):
                    if seq < number <= last_seq:
                        yield number, batch
                if frame.seq >= last_seq:
                    return
    except BadFrame as bad:
        raise CorruptLogError(handle.path, bad.offset, bad.reason) from None


def decoded(frame: FrameHeader, body: memoryview) -> list[DecodedBatch]:
    """The batches of a BATCHES frame. BadFrame if they cannot be decoded."""
    try:
        return decode_batches(body, frame.batches)
    except Undecodable as error:
        raise BadFrame(frame.offset, str(error), final=True) from None


def batches_after_seq(fold: FoldSnapshot, seq: int) -> Iterator[tuple[int, DecodedBatch]] | None:
    """The batches after batch `seq`, up to `fold`: see `batches_since`.

    None if a compaction has removed some of them.
    """
    handle = fold.source
    if seq == fold.seq:
        return iter(())
    if handle is None:
        return None
    header = read_own_header(handle)
    if seq < header.base_seq:
        return None
    size = handle.files.fstat(handle.fd).st_size
    return _batches_after(handle, header, Chain.start(header), size, seq, fold.seq)
