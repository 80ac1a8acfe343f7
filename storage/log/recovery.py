"""Torn or corrupt: what the bytes behind the last good frame mean.

A writer that was stopped leaves a torn tail, which is legal and is cut; damage to what was written is corruption, which is
refused. `judge` tells them apart by a table over facts, first match wins; the facts come from the file (`gather`). Two
simpler rules were measured and are wrong: "torn if no valid frame follows" drops the last acknowledged frame on a flipped
bit, and refuses states that a power loss may leave when frames were not synced.

What a power loss can leave is modelled as in etcd's write-ahead log: sectors of 512 bytes that were not written back read as
zeros. What a killed process can leave is a prefix of its last write.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from foldlog.protocol.frames import (
    FLAG_SYNC_EACH,
    FRAME_HEAD,
    FRAME_MAGIC,
    TRAILER,
    FrameHead,
    parse_frame_head,
)

SECTOR = 512
MAX_CANDIDATES = 65_536
"""Frame heads tried as evidence. A file crafted of nothing but magic numbers must not cost more than a second."""
_CHUNK_BYTES = 1024 * 1024


class Verdict(enum.Enum):
    """What to do with the tail."""

    TORN = "torn"
    CORRUPT = "corrupt"


@dataclass(frozen=True, slots=True)
class Evidence:
    """The first frame head behind the bad frame that verifies and is not older than it."""

    displaced: bool
    """It was written for another offset."""
    durable: bool
    """It knows that the bad frame had been synced."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the table looks at."""

    head_valid: bool
    """The bad frame's own head verifies."""
    cut_short: bool
    """Its head verifies and it runs past the end of the file, or the rest is a beginning of a head."""
    all_zero: bool
    """All bytes from the bad frame on are zero."""
    evidence: Evidence | None
    same_boot: bool
    """The machine has not been restarted since the frames before were written."""
    gap_lost: bool
    """Between the bad frame and the evidence, a sector (or the part of one) is all zero."""
    frame_lost: bool
    """In the bad frame, a sector (or the part of one) is all zero, or the trailer's place is."""
    followed: bool
    """The bad frame's writer synced each frame before the next, and bytes that are not zero follow it."""


def judge(facts: Facts) -> tuple[Verdict, str]:
    """The verdict, and the reason in words."""
    if facts.evidence is not None:
        if facts.evidence.displaced:
            return Verdict.CORRUPT, "a later frame stands at another place than it was written for"
        if facts.evidence.durable:
            return Verdict.CORRUPT, "a frame that was synced is damaged"
        if facts.same_boot:
            return (
                Verdict.CORRUPT,
                "a frame before the last is damaged, and the machine has run on since",
            )
        if not facts.gap_lost:
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
    if facts.frame_lost:
        return Verdict.TORN, "the last frame misses a sector"
    return Verdict.CORRUPT, "the last frame is complete but wrong"


def gather(
    rest: bytes | memoryview, offset: int, seed: int, last_seq: int, same_boot: bool
) -> Facts:
    """The facts about `rest`, the bytes from the bad frame at `offset` to the end of the file.

    Cost: linear in `rest`.
    """
    rest = memoryview(rest)
    head = parse_frame_head(rest, 0, seed)
    frame_end = len(rest) if head is None else min(head.size, len(rest))
    found = _evidence(rest, frame_end if head is not None else 1, offset, seed, last_seq)
    if found is None:
        evidence = None
    elif found[1] is None:
        evidence = Evidence(
            displaced=True, durable=False
        )  # too many candidates to try them all: refuse rather than guess
    else:
        durable = found[1].synced_seq > last_seq or bool(found[1].flags & FLAG_SYNC_EACH)
        evidence = Evidence(found[1].offset != offset + found[0], durable)
    if head is not None:
        cut_short = head.size > len(rest)
    else:
        cut_short = len(rest) < FRAME_HEAD.size and bytes(rest[:4]) == FRAME_MAGIC[: len(rest)]
    trailer = bytes(rest[max(frame_end - len(TRAILER), 0) : frame_end])
    return Facts(
        head_valid=head is not None,
        cut_short=cut_short,
        all_zero=_all_zero(rest),
        evidence=evidence,
        same_boot=same_boot,
        gap_lost=found is not None and _lost_sector(rest[: found[0]], offset),
        frame_lost=_lost_sector(rest[:frame_end], offset) or not any(trailer),
        followed=head is not None
        and bool(head.flags & FLAG_SYNC_EACH)
        and not _all_zero(rest[frame_end:]),
    )


def _evidence(
    rest: memoryview, start: int, offset: int, seed: int, last_seq: int
) -> tuple[int, FrameHead | None] | None:
    """Where the first valid frame head from `start` on is that is no copy of the past; no head after too many tries."""
    tried = 0
    for chunk_start in range(start, len(rest), _CHUNK_BYTES):
        chunk = bytes(rest[chunk_start : chunk_start + _CHUNK_BYTES + len(FRAME_MAGIC) - 1])
        at = chunk.find(FRAME_MAGIC)
        while at >= 0:
            head = parse_frame_head(rest, chunk_start + at, seed)
            # A value may hold a copy of older frames of this very log: those are older, or elsewhere.
            if head is not None and (
                head.seq > last_seq
                or (head.seq == last_seq and head.offset == offset + chunk_start + at)
            ):
                return chunk_start + at, head
            tried += 1
            if tried >= MAX_CANDIDATES:
                return chunk_start + at, None
            at = chunk.find(FRAME_MAGIC, at + 1)
    return None


def _all_zero(data: memoryview) -> bool:
    return not any(
        bytes(data[at : at + _CHUNK_BYTES]).strip(b"\0") for at in range(0, len(data), _CHUNK_BYTES)
    )


def _lost_sector(data: memoryview, offset: int) -> bool:
    """Whether `data`, which stands at `offset`, holds a sector, or at its ends a part of one, of nothing but zeros."""
    zeros = bytes(SECTOR)
    first = -offset % SECTOR
    if first > 0 and len(data) and bytes(data[:first]) == zeros[: min(first, len(data))]:
        return True
    for at in range(first, len(data), SECTOR):
        piece = data[at : at + SECTOR]
        if piece == zeros[: len(piece)]:
            return True
    return False
