"""What subscribers receive, in order: the state (or the changes since a cursor), one `Synced`, then
changes as they arrive."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Update


class Changed(NamedTuple):
    """A key was written or removed. Before the first `Synced`: an entry of the state.

    In a difference, a `Purge` appears as a `Delete`.
    """

    update: Update
    cursor: WatchCursor
    """The cursor of its batch: once all changes with this cursor have been seen, so has everything
    up to it. For an entry of the state, the state's cursor."""
    seq: int
    """The sequence of its batch. For an entry of the state, the state's sequence."""


class Synced(NamedTuple):
    """Everything up to `cursor` has been delivered; live changes follow. Sent once at the start,
    even if nothing matches."""

    cursor: WatchCursor
    seq: int


class Lagged(NamedTuple):
    """The subscriber was too slow: its buffer overflowed and was dropped.

    Next come the exact differences, deletes included, between what it has seen (up to `cursor`) and
    the current state, then a `Synced`. Only intermediate values are lost.
    """

    cursor: WatchCursor
    batches: int
    """Batches dropped."""


class Rewound(NamedTuple):
    """Followers and mirrors only: the log or the upstream went back to an older state or was
    replaced. The difference follows, then a `Synced`."""

    reason: str


class Ended(NamedTuple):
    """Actors only: the subscription has ended; nothing follows."""

    reason: str


Event: TypeAlias = Changed | Synced | Lagged | Rewound | Ended
