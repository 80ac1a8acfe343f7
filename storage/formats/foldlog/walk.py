"""Reads all of a damaged log: what is at which offset, to the end of the file.

`scan.py` stops at the first bytes that are not the next frame; this goes on after them. Nothing is
decided here: `check.py` reports what is wrong, `salvage.py` keeps what is valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from foldlog.protocol.frames import (
    FILE_HEADER,
    FRAME_HEADER,
    FRAME_MAGIC,
    KINDS,
    TRAILER,
    FileHeader,
    FrameHeader,
    oversize,
    parse_file_header,
    parse_frame_header,
)
from foldlog.storage.formats.format import Progress
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.log.recovery import crc32c_tables
from foldlog.storage.log.scan import NO_HEADER, body_fault, fault_at, header_fault, large_fault

_FIRST_CHUNK_BYTES = 512  # usually the next frame is near; doubled each time, up to:
_CHUNK_BYTES = 1024 * 1024
_SPARE_BYTES = 64 * 1024 * 1024
_SPARE_FACTOR = 4
"""Bad or displaced bodies are read up to `_SPARE_FACTOR` times the file's size plus `_SPARE_BYTES`
in all: a file crafted of headers that claim long bodies must not cost the square of its size."""


class Piece(NamedTuple):
    """A stretch of a log: a frame, or bytes in which there is none."""

    offset: int
    size: int
    header: FrameHeader | None
    """None: no frame begins here."""
    body: bytes
    """Of the frame. If its checksum is wrong, the bytes in its place, unless it is a large frame;
    else empty for bad pieces."""
    reason: str
    """Why it is not a valid frame; "" if it is one. What precedes the frame does not matter."""
    final: bool = False
    """True if no torn write explains it."""

    @property
    def end(self) -> int:
        """The offset after it."""
        return self.offset + self.size

    @property
    def is_damage(self) -> bool:
        """True unless it is a valid frame. A torn tail counts as damage here."""
        return bool(self.reason)


class HeaderPiece(NamedTuple):
    """The file's header, as `FrameFormat.walk` yields it before the frames."""

    header: FileHeader | None
    reason: str
    """Why it is bad; "" if it is valid."""
    offset: int = 0

    @property
    def is_damage(self) -> bool:
        """True if it is not valid."""
        return bool(self.reason)


class Walker:
    """Reads the first `size` bytes of a file as frames, whose checksums have this seed."""

    def __init__(self, handle: ReadHandle, seed: int, size: int) -> None:
        self._handle, self._seed, self._size = handle, seed, size
        self._spare = _SPARE_FACTOR * size + _SPARE_BYTES

    def pieces(self, progress: Progress | None = None) -> Iterator[Piece]:
        """The file after its header, as pieces without gaps.

        EOFError if the file is shorter than `size`. Memory: one frame. Cost: reads an undamaged
        file once.
        """
        at = FILE_HEADER.size
        while at < self._size:
            if self._spare < 0:
                yield Piece(at, self._size - at, None, b"", "scan abandoned: too much damage")
                return
            piece = self.frame(at)
            if piece is None:
                stop = self._next_frame(at + 1)
                piece = Piece(at, stop - at, None, b"", NO_HEADER)
            elif piece.reason:
                stop = min(piece.end, self._size)
                if stop == self._size or self._header(stop) is None:
                    # Its length may be right, and some of its bytes missing.
                    stop = min(stop, self._next_frame(at + FRAME_HEADER.size))
                piece = piece._replace(size=stop - at)
            yield piece
            at = piece.end
            if progress is not None:
                progress(at, self._size)

    def frame(self, at: int) -> Piece | None:
        """The frame at `at`, valid or not; None if there is no valid frame header."""
        header = self._header(at)
        if header is None:
            return None
        rest = self._size - at
        if (bad := header_fault(header, at, rest)) is not None:
            return Piece(at, header.size, header, b"", bad.reason, final=bad.final)
        body = b""
        reason = large_fault(self._handle, header, at)
        if not reason:
            start = at + FRAME_HEADER.size
            body = self._handle.read(header.body_len, start)
            trailer = self._handle.read(len(TRAILER), start + header.body_len)
            reason = body_fault(header, body, trailer)
        if reason:
            self._spare -= header.size
        return Piece(at, header.size, header, body, reason)

    def _header(self, at: int) -> FrameHeader | None:
        if self._size - at < FRAME_HEADER.size:
            return None
        return parse_frame_header(self._handle.read(FRAME_HEADER.size, at), 0, self._seed)

    def _next_frame(self, start: int) -> int:
        """The offset of the next frame, from `start` on; the end of the file if there is none.

        A displaced header counts only with a valid body, since a value may hold bytes that look
        like a header.
        """
        for at, raw in _magics(self._handle, start, self._size):
            header = parse_frame_header(raw, 0, self._seed)
            if header is None:
                continue
            if header.offset == at:
                return at
            piece = self.frame(at)
            if piece is not None and not piece.reason:
                self._spare -= header.size
                return at
            if self._spare < 0:
                return at
        return self._size


def _magics(handle: ReadHandle, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The places of frame magics with room for a header, and the bytes of that header."""
    overlap = FRAME_HEADER.size - 1
    base, step = start, _FIRST_CHUNK_BYTES
    while base < size - overlap:
        data = handle.files.data_after(handle.fd, base)
        if data is None:
            return
        if data - overlap > base:
            base = data - overlap  # a hole holds no magic
            continue
        chunk = handle.read(min(step + overlap, size - base), base)
        at = chunk.find(FRAME_MAGIC)
        while 0 <= at <= min(len(chunk) - FRAME_HEADER.size, step - 1):
            yield base + at, chunk[at : at + FRAME_HEADER.size]
            at = chunk.find(FRAME_MAGIC, at + 1)
        base, step = base + step, min(2 * step, _CHUNK_BYTES)


# A file header that is damaged. It seeds the checksums of all frames: nothing is found without it.

_SEED_FRAMES = 4096
"""Frames tried for their seed."""


def mended_header(raw: bytes) -> FileHeader | None:
    """The valid file header that differs from `raw` in one bit; None if there is none."""
    for bit in range(8 * min(len(raw), FILE_HEADER.size)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            return parse_file_header(bytes(flipped))
        except ValueError:
            continue
    return None


def seed_of_frames(handle: ReadHandle, size: int) -> int | None:
    """The seed of the frames, reconstructed from their checksums: two frames must agree on it, or
    there is only one. None if there is none.
    """
    seen: set[int] = set()
    read = 0
    for tried, (at, raw) in enumerate(_magics(handle, 0, size)):
        if tried >= _SEED_FRAMES or read > _SPARE_FACTOR * size + _SPARE_BYTES:
            break
        header = FrameHeader(*FRAME_HEADER.unpack(raw)[1:])
        if (
            header.offset != at
            or header.kind not in KINDS
            or header.size > size - at
            or oversize(header) is not None
        ):
            continue
        read += header.size
        if fault_at(handle, header, at):
            continue
        seed = _crc32c_before(raw[8:], header.crc)
        if seed in seen:
            return seed
        seen.add(seed)
    return seen.pop() if len(seen) == 1 else None


def _crc32c_before(data: bytes, crc: int) -> int:
    """The value such that crc32c(data, value) == crc: the checksum, run backwards."""
    table, by_top = crc32c_tables()
    state = crc ^ 0xFFFFFFFF
    for byte in reversed(data):
        index = by_top[state >> 24]
        state = ((state ^ table[index]) << 8 | index ^ byte) & 0xFFFFFFFF
    return state ^ 0xFFFFFFFF
