"""The seam to an upstream: what a mirror needs of the stream that feeds it. No I/O here, only the
shape.

A class of your own needs `identify` and `changes`. With `state` it can be mirrored from anywhere,
also where it no longer reaches back; with `revisions` a mirror can find out that it was told wrong.

    identify    who are you, and from where to where do you reach?
    changes     what came after a position, in whole positions, and goes on coming
    state       all that is live, in pieces                                             optional
    revisions   the keys that are live, each with its version: cheaper than `state`     optional
    recalls     did you tell this at that position?                                     optional
    close       let go of connections; `identify` may be called again                   optional

All are called on the event loop of the link, one attachment at a time; `state` and `revisions` may
run beside `changes`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from foldlog.protocol.errors import FoldlogError
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Update

Prefixes = tuple[str, ...]
"""The keys that are wanted start with one of these. An upstream may tell of more; the link drops
the rest."""


class Identity(NamedTuple):
    """Who an upstream is, and which positions it reaches. Positions of one upstream sort as
    bytes."""

    origin: bytes
    """1 to 32 bytes, 24 for one with marks. The first 16 name it; the rest tells one incarnation of
    it from another."""
    first: WatchCursor
    """The oldest position after which it tells every change; the none-cursor if it does from the
    start."""
    last: WatchCursor
    """Its newest position."""


class Changes(NamedTuple):
    """What an upstream told. A position is told whole: all its updates are in one `Changes`."""

    updates: Sequence[Update]
    """In upstream order. None at all is a sign of life."""
    position: WatchCursor
    """The position that holds once `updates` are folded. In a `state`, that of the state, and the
    last one counts."""
    behind: int | None = None
    """Updates that wait upstream after these; 0: nothing more waits, so far; None: not known."""
    mark: bytes = b""
    """Of an upstream with marks: 8 bytes by which it knows what it told at `position`; none where
    it cannot."""


class Revisions(NamedTuple):
    """The live keys of an upstream at a position, each with the version that its entry has."""

    versions: Mapping[str, bytes]
    position: WatchCursor


@runtime_checkable
class Upstream(Protocol):
    """Where the updates of a mirror come from. See the module.

    Raise UpstreamLost for what may pass, UpstreamMissing while it does not exist, UpstreamRefused
    for what will not pass.
    """

    async def identify(self) -> Identity:
        """Connect, and tell who is there now."""

    def changes(self, after: WatchCursor, prefixes: Prefixes) -> AsyncIterator[Changes]:
        """All changes after a position, then those that come, for ever. A sign of life every few
        seconds.

        Nothing is read ahead without a bound: what is not asked for waits upstream.
        """


@runtime_checkable
class HasState(Protocol):
    """An upstream that can tell its whole state."""

    def state(self, prefixes: Prefixes) -> AsyncIterator[Changes]:
        """All live entries as Puts, in pieces, then the end. What a later piece says of a key
        counts, a Delete too."""


@runtime_checkable
class HasRevisions(Protocol):
    """An upstream that can tell which keys it has."""

    async def revisions(self, prefixes: Prefixes) -> Revisions:
        """All live keys with their versions."""


@runtime_checkable
class HasMarks(Protocol):
    """An upstream whose positions may be given twice: restored from a copy, it gives them to other
    changes."""

    async def recalls(self, position: WatchCursor, mark: bytes) -> bool | None:
        """Whether it told this mark at the position. None if it no longer knows: then values are
        audited, not versions alone."""


@runtime_checkable
class Closable(Protocol):
    """An upstream that holds something."""

    async def close(self) -> None:
        """Let go. What cannot be told any more is dropped."""


class UpstreamError(FoldlogError):
    """Something about the upstream of a mirror: `reason`, which holds no credentials."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class UpstreamLost(UpstreamError):
    """The upstream is away, or what it told has a gap. The link attaches again."""


class UpstreamMissing(UpstreamError):
    """The bucket, stream or file does not exist. The link waits for it."""


class UpstreamRefused(UpstreamError):
    """The upstream refuses us: credentials, permissions, a wrong kind of stream. Trying again
    cannot help."""


class UpstreamOversize(UpstreamError):
    """An update is over foldlog's limits. `key` names it. A mirror with `on_oversize="skip"` goes
    without it."""

    def __init__(self, reason: str, key: str) -> None:
        super().__init__(reason)
        self.args = (reason, key)
        self.key = key

    def __str__(self) -> str:
        return self.reason


class ResetHeld(UpstreamError):
    """The mirror would lose most of its keys, or hold those of another upstream.
    `mirror.accept_reset()` lets it."""


class MirrorReadOnly(FoldlogError):
    """A mirror is written by its upstream alone. Nothing was written."""
