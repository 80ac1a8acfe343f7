"""Frames read in order, each checked: its checksums, and the chain to the frame before.

What damage means is decided in `recovery.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from crc32c import crc32c

from foldlog.protocol.errors import LogChangedError
from foldlog.protocol.frames import (
    FILE_HEADER,
    FRAME_HEADER,
    FRAME_OVERHEAD,
    KIND_BATCHES,
    KINDS,
    KNOWN_FLAGS,
    TRAILER,
    FileHeader,
    FrameHeader,
    build_frame,
    oversize,
    parse_frame_header,
)
from foldlog.storage.formats.format import BadBytes
from foldlog.storage.log.files import ReadHandle

WINDOW_BYTES = 4 * 1024 * 1024
LARGE_BYTES = 64 * 1024 * 1024
"""A frame longer than this is checked in pieces before it is read: a torn one, mostly a hole, or a
forged one may be a GiB long."""
NO_HEADER = "no valid frame header"


class Chain(NamedTuple):
    """A position between two frames: what the next frame must follow."""

    offset: int
    link: int
    """The header checksum of the frame before."""
    seq: int
    """The sequence of the last batch before it."""
    synced_seq: int
    """The last batch that the frame before knows to be synced."""

    @classmethod
    def start(cls, header: FileHeader) -> Chain:
        """Before the first frame of a file."""
        return cls(FILE_HEADER.size, header.link, header.base_seq, header.base_seq)

    def fault(self, frame: FrameHeader) -> str | None:
        """Why `frame`, whose checksum is valid, cannot be the next one; None if it can."""
        if frame.offset != self.offset:
            return displaced(frame)
        if frame.link != self.link:
            return "the frame does not follow the one before it: frames were exchanged or removed"
        if frame.seq != self.seq + frame.batches or bool(frame.batches) != (
            frame.kind == KIND_BATCHES
        ):
            return f"the frame ends with batch {frame.seq}, expected {self.seq + frame.batches}"
        if frame.synced_seq > self.seq or frame.synced_seq < self.synced_seq:
            return f"the frame says that batch {frame.synced_seq} was synced, which is impossible"
        return None

    @staticmethod
    def after(frame: FrameHeader) -> Chain:
        """The position after `frame`, which is at its own offset."""
        crc, body_len, _, seq, synced_seq, offset, *_ = frame
        return tuple.__new__(Chain, (offset + FRAME_OVERHEAD + body_len, crc, seq, synced_seq))

    def next_frame(
        self,
        seed: int,
        kind: int,
        body: bytes,
        synced_seq: int,
        flags: int,
        batches: int = 0,
        body_crc: int | None = None,
    ) -> tuple[bytes, Chain]:
        """The frame with this content that follows, and the position after it.

        `synced_seq` may be ahead: the frame names no batch after it as synced.
        """
        offset, link, seq, _ = self
        if synced_seq > seq:
            synced_seq = seq
        seq += batches
        frame, link = build_frame(
            seed, kind, body, seq, synced_seq, offset, link, flags, batches, body_crc
        )
        return frame, tuple.__new__(Chain, (offset + len(frame), link, seq, synced_seq))


def displaced(frame: FrameHeader) -> str:
    """What is wrong with `frame` where it was found: its offset is another."""
    return f"the frame was written for byte {frame.offset}: frames were moved, inserted or removed"


class BadFrame(BadBytes):
    """The bytes at `offset` are not the next frame."""


def header_fault(frame: FrameHeader, offset: int, rest: int) -> BadFrame | None:
    """What the valid header of `frame`, at `offset`, shows to be wrong with it; None if nothing.

    `rest`: bytes from there to the end of the file.
    """
    if frame.kind not in KINDS or frame.flags & ~KNOWN_FLAGS:
        reason = f"a frame of kind {frame.kind}, flags {frame.flags:#x}, from a newer foldlog"
        return BadFrame(offset, reason, final=True, unsupported=True)
    too_long = oversize(frame)
    if too_long is not None:
        return BadFrame(offset, too_long, final=True)
    if frame.size > rest:
        reason = f"the frame needs {frame.size} bytes, the file ends after {rest}"
        return BadFrame(offset, reason, final=False)
    return None


def body_fault(frame: FrameHeader, body: bytes | memoryview, trailer: bytes | memoryview) -> str:
    """Why a frame's body or trailer is bad; "" if neither is."""
    return _fault(frame, crc32c(body), trailer)


def large_fault(handle: ReadHandle, frame: FrameHeader, offset: int) -> str:
    """`fault_at`, for a frame of more than `LARGE_BYTES`; "" for others."""
    return fault_at(handle, frame, offset) if frame.size > LARGE_BYTES else ""


def fault_at(handle: ReadHandle, frame: FrameHeader, offset: int) -> str:
    """`body_fault`, for the frame at `offset`, read in pieces. EOFError if the file ends within
    it."""
    start, crc = offset + FRAME_HEADER.size, 0
    end = start + frame.body_len
    for at in range(start, end, WINDOW_BYTES):
        crc = crc32c(handle.read(min(WINDOW_BYTES, end - at), at), crc)
    return _fault(frame, crc, handle.read(len(TRAILER), end))


def _fault(frame: FrameHeader, body_crc: int, trailer: bytes | memoryview) -> str:
    if body_crc != frame.body_crc:
        return "the frame's body does not verify"
    return "" if trailer == TRAILER else "the frame's trailer is wrong"


def read_frames(
    handle: ReadHandle,
    header: FileHeader,
    chain: Chain,
    size: int,
    *,
    window_bytes: int = WINDOW_BYTES,
) -> Iterator[tuple[FrameHeader, memoryview]]:
    """The frames from `chain` to `size`, with their bodies. A body is valid until the next step.

    BadFrame at the first bytes that are not the next frame; LogChangedError if the file ends before
    `size`; OSError. Memory: one window, or the largest frame. Cost: 1-2 us a frame, plus the body
    at memory speed.
    """
    seed = header.seed
    window = memoryview(bytearray(min(window_bytes, max(size - chain.offset, 0))))
    read, filled = window, 0  # the part of it that is read, from the offset `base`
    offset, last_link, last_seq, last_synced = chain
    base = offset
    while offset < size:
        at, rest = offset - base, size - offset
        if filled - at < FRAME_HEADER.size and filled - at < rest:
            base, at = offset, 0
            read = _fill(handle, window, base, min(len(window), rest))
            filled = len(read)
        frame = parse_frame_header(read, at, seed)
        if frame is None:
            raise BadFrame(offset, NO_HEADER, final=False)
        crc, body_len, body_crc, seq, synced_seq, place, link, kind, flags, batches = frame
        # First what nearly every frame is: this loop is most of the cost of a small frame.
        is_usual = kind == KIND_BATCHES and batches and not (flags and flags & ~KNOWN_FLAGS)
        if not (
            is_usual
            and place == offset
            and link == last_link
            and seq == last_seq + batches
            and last_synced <= synced_seq <= last_seq
        ):
            fault = Chain(offset, last_link, last_seq, last_synced).fault(frame)
            if fault is not None:
                raise BadFrame(offset, fault, final=True)
        frame_size = FRAME_OVERHEAD + body_len
        if not is_usual or frame_size > rest or frame_size > WINDOW_BYTES:
            bad = header_fault(frame, offset, rest)
            if bad is not None:
                raise bad
        if filled - at < frame_size:
            if len(window) < frame_size:
                try:
                    reason = large_fault(handle, frame, offset)
                except EOFError as error:
                    raise LogChangedError(handle.path, str(error)) from None
                if reason:
                    raise BadFrame(offset, reason, final=False)
                window = memoryview(bytearray(frame_size))
            base, at = offset, 0
            read = _fill(handle, window, base, min(len(window), rest))
            filled = len(read)
        start = at + FRAME_HEADER.size
        end = start + body_len
        body = read[start:end]
        if crc32c(body) != body_crc or read[end : end + len(TRAILER)] != TRAILER:
            reason = body_fault(frame, body, read[end : end + len(TRAILER)])
            raise BadFrame(offset, reason, final=False)
        yield frame, body
        offset, last_link, last_seq, last_synced = offset + frame_size, crc, seq, synced_seq


def _fill(handle: ReadHandle, window: memoryview, offset: int, size: int) -> memoryview:
    """Read `size` bytes from `offset` into the window. Returns that part of it."""
    filled = 0
    while filled < size:
        count = handle.files.read_into(handle.fd, window[filled:size], offset + filled)
        if count <= 0:
            raise LogChangedError(
                handle.path, f"ends at byte {offset + filled}, but was longer before"
            )
        filled += count
    return window[:size]
