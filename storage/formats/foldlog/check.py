"""Every invariant of a log, in code. Opening stops at the first fault; this finds all of them, and
changes nothing.

What must hold, beyond the checksums of headers, bodies and trailers:

    chain      offset, link, sequence and synced sequence of each frame follow from the frame before
    order      LEAF* BASE_END (OPEN | BATCHES | SEAL)*; a session begins with OPEN, and nothing of
               it follows its SEAL
    leaves     each has the bytes that `encode_leaf` writes for its entries, and ends where
               `leaf_end` says; every value's checksum is right; keys ascend across leaves
    base end   has the right counts of leaves and entries, the digest of the leaves, a valid cursor
    batches    can be decoded, and are as many as the header says
    tail       after the last good frame there is nothing, or a torn tail (`recovery.py`)
    note       no batch that was synced according to it is missing (`regression.py`)
"""

from __future__ import annotations

from dataclasses import replace

from blake3 import blake3

from foldlog.protocol.decoding import Undecodable, decode_batches
from foldlog.protocol.errors import InvalidFormatError, LogChangedError
from foldlog.protocol.frames import (
    FILE_HEADER,
    FORMAT_VERSION,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    FileHeader,
    FrameHeader,
    parse_base_end,
    parse_base_origin,
    parse_file_header,
    parse_open,
)
from foldlog.protocol.tokens import WatchCursor
from foldlog.storage.fold import leaf
from foldlog.storage.formats.foldlog.replay import (
    FRAME_AFTER_BASE,
    FRAME_BEFORE_BASE_END,
    read_header,
    wrong_counts,
)
from foldlog.storage.formats.foldlog.walk import Piece, Walker, mended_header, seed_of_frames
from foldlog.storage.formats.format import Problem, Progress, Verdict, VerifyReport
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.log.recovery import Rest, judge_rest
from foldlog.storage.log.scan import Chain, displaced
from foldlog.storage.log.sidecars.regression import lost_since, regression_text


def check_frames(
    handle: ReadHandle, size: int, *, tail_may_be_torn: bool, progress: Progress | None = None
) -> VerifyReport:
    """See `LogFormat.check`. With `tail_may_be_torn`, also compare the file with the note."""
    try:
        report = _Check(handle, size, tail_may_be_torn=tail_may_be_torn).run(progress)
    except EOFError as error:
        raise LogChangedError(handle.path, str(error)) from None
    if not tail_may_be_torn or not report.ok:
        return report
    mark = lost_since(handle, read_header(handle).log_id, report.seq, report.size)
    if mark is None:
        return report
    lost = Problem(report.size, 0, f"the log {regression_text(report.seq, mark)}")
    return replace(report, problems=(lost,))


def header_and_seed(handle: ReadHandle, size: int) -> tuple[FileHeader | None, int, str]:
    """The file header, the seed of the frames, and why the header is bad ("" if it is not).

    A bad header is reconstructed if possible, else None. InvalidFormatError if nothing shows that
    this is a log of this format and version.
    """
    raw = handle.files.read(handle.fd, min(FILE_HEADER.size, size), 0)
    try:
        header = parse_file_header(raw)
    except ValueError as error:
        reason = str(error)
    else:
        return header, header.seed, ""
    if reason.startswith("format version"):  # the header's checksum is right
        version, flags = FILE_HEADER.unpack(raw)[1:3]
        raise InvalidFormatError(
            handle.path, 0, f"format version {version}, flags {flags:#x}: not {FORMAT_VERSION}"
        )
    mended = mended_header(raw)
    seed = mended.seed if mended is not None else seed_of_frames(handle, size)
    if seed is None:
        raise InvalidFormatError(handle.path, 0, reason)
    return mended, seed, reason


class _Check:
    """One verification. See the module."""

    def __init__(self, handle: ReadHandle, size: int, *, tail_may_be_torn: bool) -> None:
        self._handle, self._size = handle, size
        self._tail_may_be_torn = tail_may_be_torn
        self._problems: list[Problem] = []
        self._frames = self._batches = 0
        self._cursor = WatchCursor.none()
        self._sealed = False
        self._torn = (0, "")
        self._chain: Chain | None = None  # None: unknown, after damage
        self._seq = 0
        self._shift = 0  # how far the last frame was from the offset it was written for
        # The base.
        self._leaves = self._entries = 0
        self._digest = blake3()
        self._last_key: str | None = None
        # Set if the last leaf read ends where only the last leaf of a base may.
        self._open_end: Problem | None = None
        self._base_ended = False
        self._base_complete = True  # no leaf was lost: counts and digest can be compared
        # The current session.
        self._in_session = False
        self._boot = ""

    def run(self, progress: Progress | None) -> VerifyReport:
        header, seed, reason = header_and_seed(self._handle, self._size)
        if reason:
            self._say(0, FILE_HEADER.size, reason)
        elif header is not None:
            self._chain, self._seq = Chain.start(header), header.base_seq
        for piece in Walker(self._handle, seed, self._size).pieces(progress):
            if piece.reason:
                if self._is_torn(piece, seed):
                    break
                self._bad(piece)
            else:
                self._good(piece)
        if not self._base_ended and not self._problems:
            self._say(self._size, 0, "the file ends before the base does")
        self._problems.sort()
        torn_bytes, torn_reason = self._torn
        return VerifyReport(
            self._handle.path,
            self._size,
            self._frames,
            self._leaves,
            self._entries,
            self._batches,
            self._seq,
            self._cursor,
            self._sealed,
            torn_bytes,
            torn_reason,
            tuple(self._problems),
        )

    def _say(self, offset: int, size: int, reason: str) -> None:
        self._problems.append(Problem(offset, size, reason))

    def _is_torn(self, piece: Piece, seed: int) -> bool:
        """True if all from `piece` on is a torn tail. Only the first fault can be one, as in an
        open."""
        chain = self._chain
        if not self._tail_may_be_torn or self._problems or not self._base_ended or chain is None:
            return False
        if piece.final or (piece.header is not None and chain.fault(piece.header) is not None):
            return False
        rest = Rest(self._handle, piece.offset, self._size - piece.offset)
        verdict, why = judge_rest(rest, seed, chain.seq, self._boot)
        if verdict is Verdict.CORRUPT:
            self._say(piece.offset, piece.size, f"{why} ({piece.reason})")
            return False
        self._torn = rest.size, f"{why} ({piece.reason})"
        return True

    def _bad(self, piece: Piece) -> None:
        if not self._problems or self._problems[-1].offset != piece.offset:
            self._say(piece.offset, piece.size, piece.reason)
        if not self._base_ended:
            self._base_complete = False
        self._chain = None
        self._sealed = False
        self._in_session = True  # its OPEN may be among the damage

    def _good(self, piece: Piece) -> None:
        header = piece.header
        assert header is not None
        fault = (
            self._chain.fault(header)
            if self._chain is not None
            else self._fault_after_damage(piece, header)
        )
        if fault is not None:
            self._say(piece.offset, piece.size, fault)
        self._chain = Chain.after(header)
        self._shift = piece.end - self._chain.offset
        self._frames += 1
        try:
            self._take(header, piece)
        except Undecodable as error:
            self._say(piece.offset, piece.size, str(error))
            self._base_complete &= self._base_ended
        self._seq = header.seq
        self._sealed = header.kind not in (KIND_LEAF, KIND_BASE_END, KIND_OPEN, KIND_BATCHES)

    def _fault_after_damage(self, piece: Piece, header: FrameHeader) -> str | None:
        """What is wrong with the first valid frame after damage, as far as that can be known."""
        if header.offset + self._shift != piece.offset:
            return displaced(header)
        first = header.seq - header.batches
        if self._frames and first > self._seq:
            missing = (
                f"batch {first} is"
                if first == self._seq + 1
                else f"batches {self._seq + 1} to {first} are"
            )
            return f"{missing} missing before this frame"
        if self._frames and first < self._seq:
            return f"the frame repeats batches up to {header.seq}"
        return None

    def _take(self, header: FrameHeader, piece: Piece) -> None:
        kind, body = header.kind, piece.body
        if kind in (KIND_LEAF, KIND_BASE_END):
            if self._base_ended:
                raise Undecodable(FRAME_AFTER_BASE)
            self._take_leaf(piece) if kind == KIND_LEAF else self._take_base_end(body)
            return
        if not self._base_ended:
            self._base_ended = True  # reported once: the end is assumed to be here
            if self._base_complete:  # otherwise it may be among the damage
                raise Undecodable(FRAME_BEFORE_BASE_END)
        if kind == KIND_OPEN:
            self._boot, self._in_session = parse_open(body), True
            return
        if not self._in_session:
            raise Undecodable("a frame before the session's OPEN frame")
        if kind == KIND_BATCHES:
            batches = decode_batches(body, header.batches)
            self._batches += len(batches)
            self._cursor = batches[-1].cursor
        else:
            self._in_session = False
            if body:
                raise Undecodable("a SEAL frame with a body")
            if header.synced_seq != header.seq:
                raise Undecodable(
                    f"a SEAL frame at batch {header.seq}, but synced only up to {header.synced_seq}"
                )

    def _take_leaf(self, piece: Piece) -> None:
        self._leaves += 1
        self._digest.update(piece.body)
        if self._open_end is not None:
            self._problems.append(self._open_end)
            self._open_end = None
        leaf.check_leaf(piece.body)
        columns = leaf.decode_leaf(piece.body)
        self._entries += len(columns.keys)
        last_key, self._last_key = self._last_key, columns.keys[-1]
        end = leaf.leaf_end(columns.keys, columns.values, 0)
        if end is None:
            self._open_end = Problem(
                piece.offset, piece.size, "a leaf that is not the last ends too early"
            )
        if last_key is not None and columns.keys[0] <= last_key:
            raise Undecodable("leaves are not in key order")
        if end is not None and end != len(columns.keys):
            raise Undecodable(f"a leaf has {len(columns.keys)} entries, but must end after {end}")

    def _take_base_end(self, body: bytes) -> None:
        self._base_ended = True
        cursor, leaves, entries, digest = base_end_of(body)
        self._cursor = cursor
        if not self._base_complete:
            return
        if (leaves, entries) != (self._leaves, self._entries):
            raise Undecodable(wrong_counts(self._leaves, self._entries, leaves, entries))
        if digest != self._digest.digest():
            raise Undecodable("the digest of the leaves is not the one at the end of the base")


def base_end_of(body: bytes | memoryview) -> tuple[WatchCursor, int, int, bytes]:
    """`parse_base_end`, which also checks the digest's size and the origin. Undecodable if bad."""
    cursor, leaves, entries, digest = parse_base_end(body)
    if len(digest) != 32:
        raise Undecodable("the end of the base has a bad field")
    parse_base_origin(body)
    return cursor, leaves, entries, digest
