"""The seam between a mirror and its upstream, the stream that feeds it. No I/O here, only the
interface.

Your own class needs `identify` and `changes`. With `state`, a mirror can start from any position,
even one whose changes are gone. With `revisions`, a mirror can detect that it has diverged.

    identify    which upstream it is, and the positions it covers
    changes     the changes after a position, in whole positions, without end
    state       all live entries, in pieces                                  optional
    revisions   the live keys and their versions: cheaper than `state`       optional
    recalls     whether it sent a given mark at a given position             optional
    close       release connections; `identify` may be called again          optional

All are called on the link's event loop, for one attachment at a time; `state` and `revisions` may
run concurrently with `changes`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from foldlog.protocol.errors import FoldlogError
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Update

Prefixes = tuple[str, ...]
"""Only keys that start with one of these are wanted; empty means all. An upstream may send others;
the link drops them."""


class Identity(NamedTuple):
    """Which upstream it is, and the positions it covers. Positions of one upstream sort as
    bytes."""

    origin: bytes
    """1 to 32 bytes; up to 24 for an upstream with marks. The first 16 name it; the rest tells its
    incarnations apart."""
    first: WatchCursor
    """The oldest position after which it can send every change; the none-cursor if it can from the
    start."""
    last: WatchCursor
    """Its newest position."""


class Changes(NamedTuple):
    """What an upstream sends. All updates of a position are in one `Changes`."""

    updates: Sequence[Update]
    """In upstream order. An empty sequence is a heartbeat."""
    position: WatchCursor
    """The position reached once `updates` are folded. In `state`, the position of the state; the
    last one counts."""
    behind: int | None = None
    """Updates still waiting upstream after these; None if unknown."""
    mark: bytes = b""
    """For an upstream with marks: 8 bytes by which it recognizes what it sent at `position`; empty
    if it cannot."""


class Revisions(NamedTuple):
    """The live keys of an upstream at a position, with the versions of their entries."""

    versions: Mapping[str, bytes]
    position: WatchCursor


@runtime_checkable
class Upstream(Protocol):
    """The source of a mirror's updates. See the module docstring.

    Raise UpstreamLost for a temporary failure, UpstreamMissing while the source does not exist, and
    UpstreamRefused for a failure that retrying cannot fix.
    """

    async def identify(self) -> Identity:
        """Connect, and return which upstream answers."""

    def changes(self, after: WatchCursor, prefixes: Prefixes) -> AsyncIterator[Changes]:
        """All changes after a position, then new ones as they arrive, without end; a heartbeat
        every few seconds.

        Reading ahead is bounded: what is not consumed waits upstream.
        """


@runtime_checkable
class HasState(Protocol):
    """An upstream that can send its whole state."""

    def state(self, prefixes: Prefixes) -> AsyncIterator[Changes]:
        """All live entries as Puts, in pieces. Later pieces override earlier ones, and may contain
        Deletes."""


@runtime_checkable
class HasRevisions(Protocol):
    """An upstream that can list its keys."""

    async def revisions(self, prefixes: Prefixes) -> Revisions:
        """All live keys, with their versions."""


@runtime_checkable
class HasMarks(Protocol):
    """An upstream that may reuse positions: once restored from a backup, it assigns them to other
    changes."""

    async def recalls(self, position: WatchCursor, mark: bytes) -> bool | None:
        """True if it sent this mark at the position. None if it no longer knows: then the audit
        compares values, not only versions."""


@runtime_checkable
class Closable(Protocol):
    """An upstream that holds resources."""

    async def close(self) -> None:
        """Release them. Data that can no longer be sent is dropped."""


class UpstreamError(FoldlogError):
    """A failure of a mirror's upstream, for `reason`, which contains no credentials."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UpstreamLost(UpstreamError):
    """The upstream is unreachable, or what it sent has a gap. The link reconnects."""


class UpstreamMissing(UpstreamError):
    """The bucket, stream or file does not exist. The link waits for it."""


class UpstreamRefused(UpstreamError):
    """The upstream refuses the link: bad credentials, missing permissions, wrong kind of stream.
    Retrying cannot help."""


class UpstreamOversize(UpstreamError):
    """The update of `key` is over foldlog's limits. A mirror with `on_oversize="skip"` skips it."""

    def __init__(self, reason: str, key: str) -> None:
        super().__init__(reason)
        self.args = (reason, key)
        self.key = key

    def __str__(self) -> str:
        return self.reason


class ResetHeld(UpstreamError):
    """The mirror would lose most of its keys, or take over those of another upstream.
    `mirror.accept_reset()` allows it."""


class MirrorReadOnly(FoldlogError):
    """Only its upstream can write to a mirror. Nothing was written."""
