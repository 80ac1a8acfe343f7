"""A caller that is struck in its turn, and the turns after it."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from functools import partial

import pytest
from actor_kit import DEADLINE_S, in_thread
from interrupts import At, Struck, strike

from foldlog.actors.base.adapter import STOP, Ended, Inbox, Mail, SharedActor, Started
from foldlog.actors.base.answers import Reply


class Numbers(SharedActor):
    """Notes each number it is sent. Tells when its own thread has looked after the turn."""

    group = (int,)
    group_limit = 10

    def __init__(self) -> None:
        self.notices: queue.SimpleQueue[object] = queue.SimpleQueue()
        super().__init__("numbers", self.notices.put, Inbox())
        self.served: list[int] = []
        self.deaths = 0
        self.looks = threading.Semaphore(0)
        self.in_handle = lambda number: None

    def on_start(self) -> None:
        unserved = [mail for mail in self.taken if mail.message not in self.served]
        self.taken.clear()
        self.inbox.return_taken(unserved)

    def handle(self, mails: list[Mail]) -> None:
        for mail in mails:
            self.in_handle(mail.message)
            self.served.append(mail.message)

    def work_for_others(self) -> None:
        self.inbox.move(self.taken, self.group, self.group_limit)
        self.handle(self.taken)
        self.taken.clear()

    def on_stop(self) -> None:
        pass

    def _look_after_turn(self) -> None:
        try:
            super()._look_after_turn()
        finally:
            self.looks.release()

    def wait_for_look(self) -> None:
        assert self.looks.acquire(timeout=DEADLINE_S)

    def settle(self) -> int:
        """Wait until it is idle, and restart it when it has died. Returns how often it did."""
        before = self.deaths
        while self.turn or self.inbox.mails or not self.notices.empty():
            with contextlib.suppress(queue.Empty):
                notice = self.notices.get_nowait()
                assert isinstance(notice, Ended)
                self.thread.join(DEADLINE_S)
                self.resume()
                assert self.notices.get(timeout=DEADLINE_S) == Started(self)
                self.deaths += 1
                continue
            self.wait_for_look()
        return self.deaths - before


@pytest.fixture
def numbers(nothing_left):
    actor = Numbers()
    actor.launch()
    assert actor.notices.get(timeout=DEADLINE_S) == Started(actor)
    yield actor
    actor.settle()
    stopped = Reply()
    actor.inbox.offer(Mail(STOP, stopped))
    stopped.get(timeout=DEADLINE_S)
    actor.thread.join(DEADLINE_S)


def strike_in_a_turn(numbers: Numbers, point: int, first: int, late: int) -> bool:
    """A caller is struck at this point of its turn, during which `late` arrives. False if its turn
    has no such point."""
    arriving = iter([Mail(late)])
    numbers.in_handle = lambda _: numbers.inbox.mails.extend(arriving)  # once: one call into C
    at = At(point, strike)
    with contextlib.suppress(Struck):
        at.run(partial(numbers.work_in_turn, Mail(first)))
    numbers.settle()
    has_arrived = next(arriving, None) is None
    assert numbers.served.count(first) <= 1, f"struck at point {point}"
    assert numbers.served.count(late) == has_arrived, f"struck at point {point}"
    return at.fired


def test_a_strike_in_a_turn_loses_no_mail_and_is_not_believed_in_the_next_turn(numbers):
    """Struck after its work was done, a caller left an error behind. In a later turn, the actor's
    thread took it for that turn's: the writer replayed the log while its caller was writing. And
    what was struck while it took mail out of the mailbox lost it."""
    for point in itertools.count(1):
        first, late, second = 3 * point, 3 * point + 1, 3 * point + 2
        if not strike_in_a_turn(numbers, point, first, late):
            break

        working, go_on = threading.Event(), threading.Event()
        numbers.in_handle = lambda _, w=working, g=go_on: (w.set(), g.wait(DEADLINE_S))
        turn = in_thread(partial(numbers.work_in_turn, Mail(second)))
        try:
            assert working.wait(DEADLINE_S)
            while numbers.looks.acquire(blocking=False):
                pass
            for _ in range(2):  # the first may have begun before
                numbers.inbox.wake()
                numbers.wait_for_look()
                assert numbers.turn[0] is not numbers, f"struck at point {point}"
        finally:
            go_on.set()
        assert turn.result(DEADLINE_S)
        assert numbers.settle() == 0
        assert numbers.served.count(second) == 1
    assert numbers.deaths > 10
