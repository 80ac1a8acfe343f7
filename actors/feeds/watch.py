"""A watch: a subscription read by a loop."""

from __future__ import annotations

from collections.abc import Iterator

from foldlog.actors.feeds.subscription import Subscription
from foldlog.protocol.closing import Closing
from foldlog.protocol.events import Event


class Watch(Closing):
    """An iterator of events: the state or the changes since, one Synced, then changes as they come.

    One thread reads it. `next(timeout_s)` waits no longer than that. Iterating waits without limit,
    and ends when the watch or its store is closed. A watch holds a reference to its store.
    """

    def __init__(self, subscription: Subscription, owner: object) -> None:
        """Not public: use `store.watch` or `follower.watch`."""
        self._subscription, self._owner = subscription, owner

    @property
    def ended(self) -> str | None:
        """Why it is over; None while there may be events."""
        return self._subscription.ended

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        event = None
        while event is None:
            event = self._subscription.offer(None)
            if event is None and self._subscription.ended is not None:
                raise StopIteration
        self._subscription.accept()
        return event

    def next(self, timeout_s: float | None = None) -> Event | None:
        """The next event; None if there is none within `timeout_s`, or if it is over (`ended`).

        After an interruption (an exception from a signal handler, say) it can be called again, and
        resumes where it was. ReentrantCall if a handler calls it during such a call.
        """
        event = self._subscription.offer(timeout_s)
        if event is not None:
            self._subscription.accept()
        return event

    def offer(self, timeout_s: float | None = None) -> Event | None:
        """As `next`, but the same event is offered again until `accept`: for a reader that an
        exception may interrupt before it has done with the event."""
        return self._subscription.offer(timeout_s)

    def accept(self) -> None:
        """Go on to the event after the one that was offered."""
        self._subscription.accept()

    def close(self) -> None:
        """Stop listening. Waiting events are dropped; a thread waiting for one returns. Any thread
        may call it."""
        self._subscription.close()
