"""A subscription delivered to an actor: each event is a message, sent by the dispatcher."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import pykka
from pykka._envelope import Envelope

from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.feeds.subscription import Since, Subscription
from foldlog.protocol.engine import Snapshot
from foldlog.protocol.events import Ended, Event
from foldlog.protocol.logger import log
from foldlog.protocol.options import check_timeout
from foldlog.storage.handover import Latch

IN_FLIGHT = 64
"""Events that may be in an actor's mailbox, unhandled, before sending pauses."""
MAX_FAILURES = 3
"""Events in a row that an actor may fail on before it is unsubscribed."""


class Delivery:
    """Delivers the events of a subscription to an actor.

    At most `IN_FLIGHT` events are in the actor's mailbox unhandled, so a slow actor lags as any
    slow subscriber does. An actor that is dead, or that fails on `MAX_FAILURES` events in a row, is
    unsubscribed. The last message is `Ended`, if the actor is still alive.
    """

    def __init__(
        self,
        ref: pykka.ActorRef[Any],
        feeds: Feeds,
        current: Callable[[], Snapshot],
        prefix: str,
        since: Since,
    ) -> None:
        """Not public: use `store.subscribe` or `follower.subscribe`."""
        if not all(hasattr(ref, name) for name in ("actor_inbox", "is_alive", "tell")):
            raise TypeError(f"actor_ref is a pykka.ActorRef, not {type(ref).__name__}")
        self._sending = sending = _Sending(ref, feeds, prefix)
        try:
            self._subscription = sending.subscription = Subscription(
                feeds, current, prefix, since, sending.bookmark, feeds.dispatcher.index
            )
            feeds.dispatcher.add(sending)
        except BaseException:  # also between the two
            sending.over.set()
            feeds.remove(sending.bookmark)
            raise

    @property
    def ended(self) -> str | None:
        """Why it is over; None while it is not."""
        return self._subscription.ended

    def cancel(self) -> None:
        """Stop delivering. Returns at once; one event may still be on its way."""
        self._subscription.close()

    def wait_ended(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing more is sent, `Ended` included. False after `timeout_s`."""
        return self._sending.over.wait(check_timeout(timeout_s))


class _Receipt(pykka.Future[Any]):
    """Set by the actor once it has handled an event. It keeps no value and wakes nobody, unless
    that matters."""

    def __init__(self, sending: _Sending) -> None:
        super().__init__()
        self._sending = sending

    def set(self, value: Any = None) -> None:
        self._sending.note(None)

    def set_exception(self, exc_info: Any = None) -> None:
        self._sending.note((exc_info or sys.exc_info())[1] or RuntimeError("unknown"))


class _Sending:
    """What the dispatcher does for one actor."""

    def __init__(self, ref: pykka.ActorRef[Any], feeds: Feeds, prefix: str) -> None:
        self._ref, self._dispatcher = ref, feeds.dispatcher
        self.bookmark = Bookmark(prefix, self._wake)
        self.subscription: Subscription
        self.over = Latch()
        self._in_flight = 0
        self._answers: deque[BaseException | None] = deque()
        """What became of events: appended by the actor, in order."""
        self._failures = 0
        """In a row."""
        self._is_blocked = False
        """It has no room, so that the next answer wakes the dispatcher."""
        self._was_stuck = False

    def _wake(self) -> None:
        self._dispatcher.wake(self)

    @property
    def is_over(self) -> bool:
        return self.over.is_set()

    def note(self, error: BaseException | None) -> None:
        """The actor is done with an event. On the actor's thread."""
        self._answers.append(error)
        if self._is_blocked or error is not None:
            self._wake()

    def serve(self, limit: int) -> bool:
        """See `Served`."""
        if self.is_over:
            return False
        try:
            return self._serve(limit)
        except pykka.ActorDeadError:
            self.give_up("the actor is dead")
        except BaseException as error:  # a mailbox of the user's may raise anything
            self._failed(error)
        return False

    def _failed(self, error: BaseException) -> None:
        log.error("a subscription ended", exc_info=error)
        self.give_up(f"{type(error).__name__}: {error}")

    def _serve(self, limit: int) -> bool:
        subscription, is_parked = self.subscription, False
        while limit:
            if not self._has_room() or self.is_over:
                return False
            event = subscription.next(0.0)
            if event is not None:
                self._send(event)
                limit -= 1
            elif subscription.ended is not None:
                self.give_up(subscription.ended)
                return False
            elif is_parked:
                return False
            else:
                self.bookmark.join()  # look again: a group may have come just before
                is_parked = True
        return True

    def _send(self, event: Event) -> None:
        if not self._ref.is_alive():
            raise pykka.ActorDeadError
        self._in_flight += 1
        self._ref.actor_inbox.put(Envelope(event, reply_to=_Receipt(self)))

    def _has_room(self) -> bool:
        self._is_blocked = False
        self._settle()
        if self._is_free():
            return True
        self._is_blocked = True
        self._settle()  # an answer may have come just before
        if not self._is_free():
            return False
        self._is_blocked = False
        return True

    def _is_free(self) -> bool:
        # After a failure, what is in flight is waited for: three in a row end it.
        return not self._in_flight or (self._in_flight < IN_FLIGHT and not self._failures)

    def _settle(self) -> None:
        answers = self._answers
        while answers:
            error = answers.popleft()
            self._in_flight -= 1
            self._was_stuck = False
            if error is None:
                self._failures = 0
                continue
            if isinstance(error, pykka.ActorDeadError) and not self._ref.is_alive():
                raise error  # else it is another actor's death, raised by its handler
            self._failures += 1
            log.warning("a subscriber failed on an event: %s: %s", type(error).__name__, error)
            if self._failures >= MAX_FAILURES:
                self.give_up(f"the actor failed on {MAX_FAILURES} events in a row")
                return

    def check(self) -> None:
        """See `Served`."""
        try:
            self._check()
        except BaseException as error:  # of a reference of the user's
            self._failed(error)

    def _check(self) -> None:
        if not self._ref.is_alive():
            self.give_up("the actor is dead")
        elif self.bookmark.ended is not None and self._is_blocked:
            if self._was_stuck:  # it does not answer, and there is no reason left to wait for it
                self.give_up(self.bookmark.ended)
            self._was_stuck = True

    def give_up(self, reason: str) -> None:
        """End it, and tell the actor, if it is alive."""
        if self.is_over:
            return
        subscription = self.subscription
        subscription.close(reason)
        subscription.ended = self.bookmark.ended
        try:
            if self._ref.is_alive():
                self._ref.tell(Ended(subscription.ended or "over"))
        except BaseException as error:  # it died just now, or its mailbox refuses
            log.info("a subscriber was not told of its end: %s", error)
        finally:
            self.over.set()

    def after_fork(self) -> None:
        """See `Served`."""
        self.subscription.close(self.bookmark.ended or "the process was forked")
        self.over.set()
