"""What an upstream gives must have the types of the seam: it may be a program's own class."""

from __future__ import annotations

from foldlog.actors.link.resuming import MARK_BYTES
from foldlog.protocol.tokens import MAX_ORIGIN_BYTES, WatchCursor
from foldlog.protocol.upstream import Changes, Identity, Revisions, UpstreamRefused


def check_identity(found: Identity, *, has_marks: bool) -> Identity:
    """`found`. UpstreamRefused unless it is an identity of the seam."""
    _expect(found, Identity, "identify returns")
    most = MAX_ORIGIN_BYTES - MARK_BYTES if has_marks else MAX_ORIGIN_BYTES
    _expect(found.origin, bytes, "an origin is")
    if not 1 <= len(found.origin) <= most:
        raise UpstreamRefused(f"an origin has 1 to {most} bytes, not {len(found.origin)}")
    _expect(found.first, WatchCursor, "a first position is")
    _expect(found.last, WatchCursor, "a last position is")
    return found


def check_changes(piece: Changes) -> Changes:
    """`piece`. UpstreamRefused unless it is what the seam calls `Changes`. Its updates are checked
    as they are encoded."""
    _expect(piece, Changes, "changes and state yield")
    _expect(piece.position, WatchCursor, "a position is")
    _expect(piece.mark, bytes, "a mark is")
    if len(piece.mark) not in (0, MARK_BYTES):
        raise UpstreamRefused(f"a mark has 0 or {MARK_BYTES} bytes, not {len(piece.mark)}")
    if piece.behind is not None:
        _expect(piece.behind, int, "behind is")
        if piece.behind < 0 or isinstance(piece.behind, bool):
            raise UpstreamRefused(f"behind is a count or None, not {piece.behind!r}")
    return piece


def check_revisions(found: Revisions) -> Revisions:
    """`found`. UpstreamRefused unless it has the types of the seam."""
    _expect(found, Revisions, "revisions returns")
    _expect(found.position, WatchCursor, "a position is")
    return found


def _expect(value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise UpstreamRefused(f"{what} {kind.__name__}, not {type(value).__name__}")
