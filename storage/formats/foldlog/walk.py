"""Reads all of a damaged log: what is at which offset, to the end of the file.

`scan.py` stops at the first bytes that are not the next frame; this goes on after them. Nothing is
decided here: `check.py` reports what is wrong, `salvage.py` keeps what is valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from crc32c import crc32c

from foldlog.protocol.frames import (
    FILE_HEAD,
    FRAME_HEAD,
    FRAME_MAGIC,
    KINDS,
    FileHead,
    FrameHead,
    oversize,
    parse_file_head,
    parse_frame_head,
)
from foldlog.storage.formats.format import Progress
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.log.scan import NO_HEADER, body_fault, header_fault

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
    head: FrameHead | None
    """None: no frame begins here."""
    body: bytes
    """Of the frame. If its checksum is wrong, the bytes in its place; else empty for bad pieces."""
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

    head: FileHead | None
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

    def pieces(
        self, start: int = FILE_HEAD.size, progress: Progress | None = None
    ) -> Iterator[Piece]:
        """The file from `start` on, as pieces without gaps.

        EOFError if the file is shorter than `size`. Memory: one frame. Cost: reads an undamaged
        file once.
        """
        at = start
        while at < self._size:
            if self._spare < 0:
                reason = "scan abandoned: too much damage"
                yield Piece(at, self._size - at, None, b"", reason)
                return
            piece = self.frame(at)
            if piece is None:
                stop = self._next_frame(at + 1)
                piece = Piece(at, stop - at, None, b"", NO_HEADER)
            elif piece.reason:
                stop = min(piece.end, self._size)
                if stop == self._size or self._head(stop) is None:
                    # Its length may be right, and some of its bytes missing.
                    stop = min(stop, self._next_frame(at + FRAME_HEAD.size))
                piece = piece._replace(size=stop - at)
            yield piece
            at = piece.end
            if progress is not None:
                progress(at, self._size)

    def frame(self, at: int) -> Piece | None:
        """The frame at `at`, valid or not; None if there is no valid frame header."""
        head = self._head(at)
        if head is None:
            return None
        rest = self._size - at
        if (bad := header_fault(head, at, rest)) is not None:
            return Piece(at, head.size, head, b"", bad.reason, final=bad.final)
        raw = self._handle.read(head.size - FRAME_HEAD.size, at + FRAME_HEAD.size)
        body = raw[: head.body_len]
        reason = body_fault(head, body, raw[head.body_len :])
        if reason:
            self._spare -= head.size
        return Piece(at, head.size, head, body, reason)

    def _head(self, at: int) -> FrameHead | None:
        if self._size - at < FRAME_HEAD.size:
            return None
        return parse_frame_head(self._handle.read(FRAME_HEAD.size, at), 0, self._seed)

    def _next_frame(self, start: int) -> int:
        """The offset of the next frame, from `start` on; the end of the file if there is none.

        A displaced header counts only with a valid body, since a value may hold bytes that look
        like a header.
        """
        for at, head in _heads(self._handle, self._seed, start, self._size):
            if head.offset == at:
                return at
            piece = self.frame(at)
            if piece is not None and not piece.reason:
                self._spare -= head.size
                return at
            if self._spare < 0:
                return at
        return self._size


def _heads(handle: ReadHandle, seed: int, start: int, size: int) -> Iterator[tuple[int, FrameHead]]:
    """The valid frame headers from `start` on, displaced or not, with their places."""
    for at, raw in _magics(handle, start, size):
        head = parse_frame_head(raw, 0, seed)
        if head is not None:
            yield at, head


def _magics(handle: ReadHandle, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """The places of frame magics with room for a header, and the bytes of that header."""
    overlap = FRAME_HEAD.size - 1
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
        while 0 <= at <= min(len(chunk) - FRAME_HEAD.size, step - 1):
            yield base + at, chunk[at : at + FRAME_HEAD.size]
            at = chunk.find(FRAME_MAGIC, at + 1)
        base, step = base + step, min(2 * step, _CHUNK_BYTES)


# A file header that is damaged. It seeds the checksums of all frames: nothing is found without it.

_SEED_FRAMES = 4096
"""Frames tried for their seed."""


def mended_head(raw: bytes) -> FileHead | None:
    """The valid file header that differs from `raw` in one bit; None if there is none."""
    for bit in range(8 * min(len(raw), FILE_HEAD.size)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            return parse_file_head(bytes(flipped))
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
        head = FrameHead(*FRAME_HEAD.unpack(raw)[1:])
        if (
            head.offset != at
            or head.kind not in KINDS
            or head.size > size - at
            or oversize(head) is not None
        ):
            continue
        rest = handle.read(head.size - FRAME_HEAD.size, at + FRAME_HEAD.size)
        read += len(rest)
        if body_fault(head, rest[: head.body_len], rest[head.body_len :]):
            continue
        seed = _crc32c_before(raw[8:], head.crc)
        if seed in seen:
            return seed
        seen.add(seed)
    return seen.pop() if len(seen) == 1 else None


def _crc32c_before(data: bytes, crc: int) -> int:
    """The value such that crc32c(data, value) == crc: the checksum, run backwards."""
    table = [crc32c(bytes((byte,)), 0xFFFFFFFF) ^ 0xFFFFFFFF for byte in range(256)]
    by_top = {entry >> 24: byte for byte, entry in enumerate(table)}
    state = crc ^ 0xFFFFFFFF
    for byte in reversed(data):
        index = by_top[state >> 24]
        state = ((state ^ table[index]) << 8 | index ^ byte) & 0xFFFFFFFF
    return state ^ 0xFFFFFFFF
