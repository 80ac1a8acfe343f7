"""Torn or corrupt: what the bytes after the last good frame mean.

A stopped writer leaves a torn tail, which is legal and is cut. Damage to written data is
corruption, which is refused. `judge` tells them apart by a table over facts, first match wins;
`gather` reads the facts from the file; `judge_rest` does both. The simpler rule "torn if no valid
frame follows" was measured and is wrong twice: after a flipped bit it drops the last acknowledged
frame, and it refuses states that a power loss may leave when frames were not synced.

A power loss is modelled as in etcd's write-ahead log: sectors of 512 bytes that were not written
back read as zeros. A killed process leaves a prefix of its last write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from crc32c import crc32c

from foldlog.protocol.frames import (
    FLAG_SYNC_EACH,
    FRAME_HEADER,
    FRAME_MAGIC,
    TRAILER,
    FrameHeader,
    parse_frame_header,
)
from foldlog.storage.formats.format import Verdict
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.log.sidecars.note import boot_id

SECTOR = 512
MAX_CANDIDATES = 65_536
"""Frame headers tried as evidence. A file crafted of nothing but magic numbers must not cost more
than a second."""
_CHUNK_BYTES = 1024 * 1024  # a multiple of SECTOR
_MAX_BYTE_SEARCH = 16 * 1024
_MAX_BIT_SEARCH = 1024 * 1024
"""Bodies up to this size are tested for a single wrong byte, or a single wrong bit. At this size a
body with a lost sector passes by chance for one with a wrong byte in 1 of 1,000 cases, and for one
with a wrong bit in 1 of 500."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """The first valid frame header after the bad frame that is not older than it."""

    displaced: bool
    """It was written for another offset."""
    durable: bool
    """It shows that the bad frame had been synced."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The input of the table."""

    cut_short: bool
    """The bad frame's header is valid and it runs past the end of the file; or the rest is the
    beginning of a header."""
    all_zero: bool
    """All bytes from the bad frame on are zero."""
    evidence: Evidence | None
    same_boot: bool
    """The machine has not been restarted since the frames before were written."""
    sector_lost: bool
    """Sectors that were not written back, or zeros to the end, explain all that is wrong with the
    bad frame: see `_is_explained`."""
    followed: bool
    """The bad frame's writer synced each frame before the next, and nonzero bytes follow it."""


def judge(facts: Facts) -> tuple[Verdict, str]:
    """The verdict, and the reason in words."""
    if facts.evidence is not None:
        if facts.evidence.displaced:
            return Verdict.CORRUPT, "a later frame is not at the offset it was written for"
        if facts.evidence.durable:
            return Verdict.CORRUPT, "a frame that was synced is damaged"
        if facts.same_boot:
            return (
                Verdict.CORRUPT,
                "a frame before the last is damaged, and the machine has run on since",
            )
        if not facts.sector_lost:
            return (
                Verdict.CORRUPT,
                "a frame before the last is damaged, and no sector of it is missing",
            )
        return (
            Verdict.TORN,
            "sectors that were never synced were lost, with whole frames after them",
        )
    if facts.cut_short:
        return Verdict.TORN, "the last frame ends early"
    if facts.all_zero:
        return Verdict.TORN, "nothing but zeros"
    if facts.same_boot:
        return (
            Verdict.CORRUPT,
            "the last frame is complete but wrong, and the machine has run on since",
        )
    if facts.followed:
        return Verdict.CORRUPT, "a frame that was synced is damaged"
    if facts.sector_lost:
        return Verdict.TORN, "a sector of the last frame is missing"
    return Verdict.CORRUPT, "the last frame is complete but wrong"


class Rest:
    """The bytes from the bad frame on, read in pieces.

    A tail may be as long as the disk, and mostly a hole.
    """

    def __init__(self, handle: ReadHandle, offset: int, size: int) -> None:
        """`size` bytes of a file from `offset` on."""
        self._handle, self.offset, self.size = handle, offset, size

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`, or to the end. EOFError if the file became shorter."""
        stop = min(stop, self.size)
        return self._handle.read(stop - start, self.offset + start) if start < stop else b""

    def pieces(self, start: int, stop: int, overlap: int = 0) -> Iterator[tuple[int, bytes]]:
        """All from `start` to `stop` but the holes, in pieces, each with `overlap` bytes of the
        next."""
        files, fd = self._handle.files, self._handle.fd
        at, stop = start, min(stop, self.size)
        while at < stop:
            data = files.data_after(fd, self.offset + at)
            if data is None:
                return
            hole = files.hole_after(fd, data) - self.offset
            at = max(at, data - self.offset - overlap)
            if at >= stop:
                return
            end = at + _CHUNK_BYTES
            end = min(max(end - (self.offset + end) % SECTOR, at + 1), max(hole, at + 1), stop)
            yield at, self.read(at, min(end + overlap, stop))
            at = end

    def is_zero(self, start: int, stop: int) -> bool:
        """True if all bytes from `start` to `stop` are zero."""
        return not any(piece.strip(b"\0") for _, piece in self.pieces(start, stop))

    def sector(self, at: int) -> tuple[int, int]:
        """(start, stop) of the sector that holds `at`, within the rest."""
        start = at - (self.offset + at) % SECTOR
        return max(start, 0), min(start + SECTOR, self.size)

    def is_lost(self, at: int) -> bool:
        """True if the sector that holds `at` is all zero, as far as it is within the rest."""
        return self.is_zero(*self.sector(at))

    def has_lost(self, start: int, stop: int) -> bool:
        """True if any sector that overlaps `start` to `stop` is lost."""
        first, last = self.sector(start), self.sector(max(stop - 1, start))
        if self.is_zero(*first) or self.is_zero(*last):
            return True
        reached = first[1]
        zeros = bytes(SECTOR)
        for at, piece in self.pieces(first[1], last[0]):
            if at - reached >= SECTOR:
                return True  # a hole
            skip = -(self.offset + at) % SECTOR
            for start_at in range(skip, len(piece) - SECTOR + 1, SECTOR):
                if piece[start_at : start_at + SECTOR] == zeros:
                    return True
            reached = at + len(piece)
        return last[0] - reached >= SECTOR


def judge_rest(rest: Rest, seed: int, last_seq: int, boot: str) -> tuple[Verdict, str]:
    """Judge `rest`, the bytes from a bad frame to the end of the file.

    `seed`: of the frames' checksums. `last_seq`: the last batch before the bad frame. `boot`: the
    machine's boot id when that was written; "" if unknown. EOFError if the file became shorter.
    """
    same_boot = bool(boot) and boot == boot_id()
    return judge(gather(rest, seed, last_seq, same_boot))


def gather(rest: Rest, seed: int, last_seq: int, same_boot: bool) -> Facts:
    """The facts about `rest`. Cost: linear in it without its holes. Memory: a few MiB."""
    first = rest.read(0, FRAME_HEADER.size)
    header = parse_frame_header(first, 0, seed)
    frame_end = rest.size if header is None else min(header.size, rest.size)
    all_zero = rest.is_zero(0, rest.size)
    evidence = None
    if not all_zero:
        evidence = _evidence(rest, frame_end if header is not None else 1, seed, last_seq)
    if header is not None:
        cut_short = header.size > rest.size
    else:
        cut_short = rest.size < FRAME_HEADER.size and first[:4] == FRAME_MAGIC[: len(first)]
    return Facts(
        cut_short=cut_short,
        all_zero=all_zero,
        evidence=evidence,
        same_boot=same_boot,
        sector_lost=_is_explained(rest, header, frame_end),
        followed=header is not None
        and bool(header.flags & FLAG_SYNC_EACH)
        and not rest.is_zero(frame_end, rest.size),
    )


def _evidence(rest: Rest, start: int, seed: int, last_seq: int) -> Evidence | None:
    """The first valid frame header from `start` on that is not a copy of an older frame.

    None if there is none.
    """
    tried = 0
    for base, chunk in rest.pieces(start, rest.size, len(FRAME_MAGIC) - 1):
        found = chunk.find(FRAME_MAGIC)
        while found >= 0:
            at = base + found
            header = parse_frame_header(rest.read(at, at + FRAME_HEADER.size), 0, seed)
            # A value may hold a copy of frames of this very log: they are older, or displaced.
            if header is not None and (
                header.seq > last_seq
                or (header.seq == last_seq and header.offset == rest.offset + at)
            ):
                durable = header.synced_seq > last_seq or bool(header.flags & FLAG_SYNC_EACH)
                return Evidence(header.offset != rest.offset + at, durable)
            tried += 1
            if tried >= MAX_CANDIDATES:  # too many to try them all: refuse rather than guess
                return Evidence(displaced=True, durable=False)
            found = chunk.find(FRAME_MAGIC, found + 1)
    return None


def _is_explained(rest: Rest, header: FrameHeader | None, frame_end: int) -> bool:
    """True if lost sectors, or zeros to the end, can explain all that is wrong with the bad frame.

    A sector that was not written back reads as zeros, from the bad frame to the sector's end; all
    other sectors are as they were written. So every wrong byte must be in a sector of zeros. A
    frame whose value holds a sector of zeros is not torn because a bit has flipped elsewhere.
    """
    if rest.size <= FRAME_HEADER.size:
        return rest.is_lost(0) or rest.is_lost(rest.size - 1)
    if header is None:
        if rest.is_lost(0) or rest.is_lost(FRAME_HEADER.size - 1):
            return True
        return rest.is_zero(FRAME_HEADER.size, rest.size)
    if header.size > rest.size:
        return False  # it is cut short
    trailer_at = frame_end - len(TRAILER)
    trailer = rest.read(trailer_at, frame_end)
    if not any(trailer) and rest.is_zero(frame_end, rest.size):
        return True
    for at, (byte, right) in enumerate(zip(trailer, TRAILER, strict=True), trailer_at):
        if byte != right and not rest.is_lost(at):
            return False
    wrong_by = _body_crc(rest, trailer_at) ^ header.body_crc
    if not wrong_by:
        return trailer != TRAILER
    if not rest.has_lost(FRAME_HEADER.size, frame_end):
        return False
    if trailer != TRAILER:
        return True
    return all(
        rest.is_lost(trailer_at - 1 - after) for after in _single_errors(wrong_by, header.body_len)
    )


def _body_crc(rest: Rest, stop: int) -> int:
    crc = 0
    cuts = (*range(FRAME_HEADER.size, stop, _CHUNK_BYTES), stop)
    for start, end in pairwise(cuts):
        crc = crc32c(rest.read(start, end), crc)
    return crc


def _single_errors(wrong_by: int, length: int) -> Iterator[int]:
    """Where a single wrong byte among `length` would change a CRC-32C by `wrong_by`: for each such
    place, the number of bytes after it.

    The checksum is linear: the change depends on the error and on the number of bytes after it, and
    is undone byte by byte. Long bodies are tested for a single wrong bit only, very long ones not
    at all.
    """
    if length > _MAX_BIT_SEARCH:
        return
    errors = range(1, 256) if length <= _MAX_BYTE_SEARCH else [1 << bit for bit in range(8)]
    table, by_top = crc32c_tables()
    effects = {table[error] for error in errors}
    state = wrong_by
    for after in range(length):
        if state in effects:
            yield after
        byte = by_top[state >> 24]
        state = (state ^ table[byte]) << 8 & 0xFFFFFFFF | byte


@cache
def crc32c_tables() -> tuple[list[int], dict[int, int]]:
    """The checksum's table; and, for running it backwards, which byte's entry has a top byte."""
    table = [crc32c(bytes((byte,)), 0xFFFFFFFF) ^ 0xFFFFFFFF for byte in range(256)]
    return table, {entry >> 24: byte for byte, entry in enumerate(table)}
