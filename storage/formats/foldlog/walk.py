"""All of a damaged log: what stands where, up to the end of the file, however much of it is bad.

`scan.py` stops at the first bytes that are not the next frame; this goes on after them. Nothing is decided here: `check.py`
says what is wrong, `salvage.py` keeps what is right.
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
from foldlog.storage.log.scan import body_fault, header_fault

NO_HEAD = "no frame head that verifies"
_FIRST_CHUNK_BYTES = 512  # mostly the next frame is near: then more each time, up to:
_CHUNK_BYTES = 1024 * 1024
_SPARE_BYTES = 64 * 1024 * 1024
_SPARE_FACTOR = 4
"""Bodies that turn out bad, or to stand elsewhere, are read up to so many times the file's size and `_SPARE_BYTES` in all: a
file crafted of heads that claim long bodies must not cost the square of its size."""


class Piece(NamedTuple):
    """A stretch of a log: a frame, or bytes in which there is none."""

    offset: int
    size: int
    head: FrameHead | None
    """None: no frame begins here."""
    body: bytes
    """Empty unless the frame is sound; of a frame whose body does not verify, what is there in its place."""
    reason: str
    """Why it is no sound frame; "" if it is one. Soundness is about checksums, not about what precedes it."""
    final: bool = False
    """No torn write explains it."""

    @property
    def end(self) -> int:
        """The offset behind it."""
        return self.offset + self.size

    @property
    def is_damage(self) -> bool:
        """True unless it is a sound frame: a torn tail is not told apart here."""
        return bool(self.reason)


class HeaderPiece(NamedTuple):
    """The file's header, as `FrameFormat.walk` yields it before the frames."""

    head: FileHead | None
    reason: str
    """Why it is bad; "" if it is not."""
    offset: int = 0

    @property
    def is_damage(self) -> bool:
        """True if it does not verify."""
        return bool(self.reason)


class Walker:
    """Walks over the frames of a file, the first `size` bytes of it, with the seed of their checksums."""

    def __init__(self, handle: ReadHandle, seed: int, size: int) -> None:
        self._handle, self._seed, self._size = handle, seed, size
        self._spare = _SPARE_FACTOR * size + _SPARE_BYTES

    def pieces(
        self, start: int = FILE_HEAD.size, progress: Progress | None = None
    ) -> Iterator[Piece]:
        """The file from `start` on, in pieces without a gap. Memory: a frame. Cost: as reading the file once, if it is sound."""
        at = start
        while at < self._size:
            if self._spare < 0:
                yield Piece(
                    at,
                    self._size - at,
                    None,
                    b"",
                    "so much before this is bad that the rest was not searched",
                )
                return
            piece = self.frame(at)
            if piece is None:
                stop = self._next_frame(at + 1)
                piece = Piece(at, stop - at, None, b"", NO_HEAD)
            elif piece.reason:
                stop = min(piece.end, self._size)
                if (
                    stop == self._size or self._head(stop) is None
                ):  # its length may be right, and bytes of it missing
                    stop = min(stop, self._next_frame(at + FRAME_HEAD.size))
                piece = piece._replace(size=stop - at)
            yield piece
            at = piece.end
            if progress is not None:
                progress(at, self._size)

    def frame(self, at: int) -> Piece | None:
        """The frame at `at`, sound or not; None if no frame head there verifies."""
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
        """Where the next frame begins, at `start` or behind it: the end of the file if none does.

        A head that was written for another offset counts only with a sound body: a value may hold bytes that look like one.
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
    """The frame heads that verify from `start` on, wherever they stand."""
    for at, raw in _magics(handle, start, size):
        head = parse_frame_head(raw, 0, seed)
        if head is not None:
            yield at, head


def _magics(handle: ReadHandle, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Where the magic of a frame stands, with room for a head; and the bytes of that head."""
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


# A file head that does not verify. It seeds the checksums of all frames, so nothing is found without it.

_SEED_FRAMES = 4096
"""Frames tried for their seed."""


def mended_head(raw: bytes) -> FileHead | None:
    """The file head that differs from `raw` in one bit and verifies; None if there is none."""
    for bit in range(8 * min(len(raw), FILE_HEAD.size)):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            return parse_file_head(bytes(flipped))
        except ValueError:
            continue
    return None


def seed_of_frames(handle: ReadHandle, size: int) -> int | None:
    """The seed that two sound frames agree on (or the only one has), worked out from their checksums; None if there is none."""
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
