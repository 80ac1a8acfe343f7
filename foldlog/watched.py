"""What stores and followers share beyond reads: their changes can be watched and waited for."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pykka

from foldlog.actors.feeds.delivery import Delivery
from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.feeds.subscription import Since, Subscription
from foldlog.actors.feeds.watch import Watch
from foldlog.protocol.tokens import CursorLike
from foldlog.storage.readable import Readable
from foldlog.waiting import WAIT_TIMEOUT_S, Position, SeqLike, wait_until


class Watched(Readable):
    """An open store whose changes can be watched."""

    @property
    @abstractmethod
    def _feeds(self) -> Feeds:
        """What publishes its changes. Call `_enter` first."""

    @abstractmethod
    def _enter(self) -> None:
        """Prepare for waiting on changes. ForkedStore if that is impossible in this process."""

    def watch(self, prefix: str = "", since: Since = None) -> Watch:
        """An iterator of events under `prefix`, in order: the state, one Synced, then changes as
        they arrive.

        With `since`, instead of the state: the changes after a cursor (CursorExpired if it is from
        before the last compaction), or the exact difference from a snapshot that the caller holds,
        deletes included. Local writes do not advance the cursor, so changes since a cursor may
        repeat them. A follower whose log went back or was replaced gets Rewound, then the
        difference. Cost for the writer: a wake-up for each group under the prefix, if the watch
        sleeps. Memory: bounded, and shared by all watches; a slow one gets Lagged, then the
        difference.
        """
        self._enter()
        return Watch(Subscription(self._feeds, self.snapshot, prefix, since), self)

    def subscribe(
        self, actor_ref: pykka.ActorRef[Any], prefix: str = "", since: Since = None
    ) -> Delivery:
        """`watch` for an actor: sends it each event as a message. Ends with the store, the actor,
        or `cancel()`.

        The last message is Ended. A slow actor gets Lagged, as a slow iterator does; one that fails
        on three events in a row is unsubscribed. Does not keep the store alive.
        """
        self._enter()
        return Delivery(actor_ref, self._feeds, self.snapshot, prefix, since)

    def wait_for(
        self,
        cursor: CursorLike | None = None,
        timeout_s: float | None = WAIT_TIMEOUT_S,
        *,
        seq: SeqLike | None = None,
    ) -> None:
        """Wait until reads see everything up to `cursor` or batch `seq`. RequestTimeout after
        `timeout_s`.

        `seq` may be the version that `put`, `create`, `update` or `delete` returned, also in
        another process, or its number: a read after this sees that write. Cursors are ordered as
        `protocol.tokens.has_reached` says. A follower raises InvalidFormatError at once if a
        directory has the log's name: a RocksDB store, say, which cannot be followed.
        """
        position = Position(cursor, seq)
        self._enter()
        wait_until(self._feeds, self.snapshot, position, timeout_s)
