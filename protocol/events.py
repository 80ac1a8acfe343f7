"""What subscribers are told: the state (or the changes since a cursor), one `Synced`, then changes as they come, in order."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Update


class Changed(NamedTuple):
    """A key was written or removed; or, before the first `Synced`, stands so in the state."""

    update: Update
    cursor: WatchCursor
    """Of its batch: once all changes with this cursor are seen, everything up to it is. In the state: the state's own."""
    seq: int
    """The sequence of its batch; in the state: the state's own."""


class Synced(NamedTuple):
    """All up to `cursor` has been told. What follows is news. Comes once at the start, also when nothing matches."""

    cursor: WatchCursor
    seq: int


class Lagged(NamedTuple):
    """The subscriber fell behind its buffer, which was dropped.

    What follows is the exact difference, deletes included, between what it has seen (up to `cursor`) and the present state,
    then a `Synced`: nothing is lost but the steps in between.
    """

    cursor: WatchCursor
    batches: int
    """Batches that were dropped."""


class Rewound(NamedTuple):
    """To a follower's subscribers: the log went back, or was replaced by another. The difference follows, then a `Synced`."""

    reason: str


class Ended(NamedTuple):
    """To an actor: the subscription is over; nothing follows."""

    reason: str


Event: TypeAlias = Changed | Synced | Lagged | Rewound | Ended
