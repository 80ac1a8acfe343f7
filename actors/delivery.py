"""A subscription delivered to an actor: each event is a message, sent from a thread that waits on
the actor's behalf."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import pykka

from foldlog.actors.adapter import log
from foldlog.actors.feeds import Subscription
from foldlog.protocol.events import Ended

IN_FLIGHT = 64
"""Events that may be in an actor's mailbox, unhandled, before sending pauses."""
MAX_FAILURES = 3
"""Events in a row that an actor may fail on before it is unsubscribed."""
CHECK_S = 1.0
"""How long it may take to notice, while no events come, that the actor is dead."""


class Delivery:
    """Delivers the events of a subscription to an actor.

    At most `IN_FLIGHT` events are in the actor's mailbox unhandled, so a slow actor lags as any
    slow subscriber does. An actor that is dead, or that fails on `MAX_FAILURES` events in a row, is
    unsubscribed. The last message is `Ended`, if the actor is still alive.
    """

    def __init__(self, ref: pykka.ActorRef[Any], subscription: Subscription) -> None:
        """Not public: use `store.subscribe` or `follower.subscribe`."""
        self._ref, self._subscription = ref, subscription
        self._in_flight: deque[pykka.Future[Any]] = deque()
        self._failures = 0
        self.thread = threading.Thread(target=self._run, name="foldlog-delivery", daemon=True)
        try:
            self.thread.start()
        except RuntimeError:
            subscription.close()
            raise

    @property
    def ended(self) -> str | None:
        """Why it is over; None while it is not."""
        return self._subscription.ended

    def cancel(self) -> None:
        """Stop delivering. Returns at once; one event may still be on its way."""
        self._subscription.close()

    def _run(self) -> None:
        subscription = self._subscription
        try:
            self._deliver()
        except pykka.ActorDeadError:
            subscription.close("the actor is dead")
        except Exception as error:
            log.exception("a subscription ended")
            subscription.close(f"{type(error).__name__}: {error}")
        else:
            subscription.close()
        finally:
            subscription.ended = subscription.buffer.ended
            if self._ref.is_alive():
                try:
                    self._ref.tell(Ended(subscription.ended or "over"))
                except Exception as error:  # it died just now, or its mailbox refuses
                    log.info("a subscriber was not told of its end: %s", error)

    def _deliver(self) -> None:
        subscription, in_flight = self._subscription, self._in_flight
        while True:
            event = subscription.next(CHECK_S)
            if event is None:
                if subscription.ended is not None:
                    return
                if not self._ref.is_alive():
                    raise pykka.ActorDeadError
            else:
                in_flight.append(self._ref.ask(event, block=False))
            while in_flight and self._settle(
                in_flight[0], wait=len(in_flight) >= IN_FLIGHT or self._failures > 0
            ):
                in_flight.popleft()
                if self._failures >= MAX_FAILURES:
                    subscription.close(f"the actor failed on {MAX_FAILURES} events in a row")
                    return

    def _settle(self, future: pykka.Future[Any], *, wait: bool) -> bool:
        """True if the actor is done with an event. With `wait`, waits until it is."""
        while True:
            try:
                future.get(timeout=CHECK_S if wait else 0.0)
            except pykka.Timeout:
                if not wait:
                    return False
                if self._subscription.buffer.ended is not None or not self._ref.is_alive():
                    # It does not answer, and there is no reason left to wait for it.
                    raise pykka.ActorDeadError from None
                continue
            except pykka.ActorDeadError:
                if not self._ref.is_alive():
                    raise
                self._failures += 1  # another actor's death, raised by its handler
            except Exception as error:
                self._failures += 1
                log.warning("a subscriber failed on an event: %s: %s", type(error).__name__, error)
            else:
                self._failures = 0
            return True
