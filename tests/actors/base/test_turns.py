"""A caller that is struck in its turn, and the turns after it."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections import deque
from concurrent.futures import Future
from functools import partial

import pytest
from actor_kit import DEADLINE_S, in_thread
from interrupts import At, Struck, strike

from foldlog.actors.base import adapter
from foldlog.actors.base.adapter import STOP, Ended, Inbox, Mail, SharedActor, Started
from foldlog.actors.base.answers import Reply
from foldlog.storage.handover import is_over


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
        self.before_look = lambda: None

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
        self.before_look()
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
    actor.resume()
    assert actor.notices.get(timeout=DEADLINE_S) == Started(actor)
    yield actor
    end(actor)


def end(actor: Numbers) -> None:
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


def held_turn(numbers: Numbers, message: int) -> tuple[Future[bool], threading.Event]:
    """A caller in the middle of its turn, on another thread: its result, and what lets it go on."""
    working, go_on = threading.Event(), threading.Event()
    numbers.in_handle = lambda _: (working.set(), go_on.wait(DEADLINE_S))
    turn = in_thread(partial(numbers.work_in_turn, Mail(message)))
    assert working.wait(DEADLINE_S)
    return turn, go_on


def test_a_caller_that_leaves_while_the_actor_looks_is_not_taken_for_the_next_one(
    numbers, monkeypatch
):
    """The actor's thread saw who had the turn, then that it had ended, and took it for dead, though
    it had left in good order. The turn that it took away was the next caller's, who was writing."""
    looking, go_on = threading.Event(), threading.Event()

    def look(frame: object) -> bool:
        looking.set()
        assert go_on.wait(DEADLINE_S)
        return is_over(frame)

    first, end_first = held_turn(numbers, 1)
    monkeypatch.setattr(adapter, "is_over", look)
    numbers.inbox.wake()
    assert looking.wait(DEADLINE_S)
    end_first.set()
    assert first.result(DEADLINE_S)
    second, end_second = held_turn(numbers, 2)
    while numbers.looks.acquire(blocking=False):
        pass
    go_on.set()
    numbers.wait_for_look()
    assert numbers.turn[0] is not numbers
    assert numbers.notices.empty()
    end_second.set()
    assert second.result(DEADLINE_S)
    assert numbers.settle() == 0
    assert numbers.served == [1, 2]


class Held:
    """A step that one thread is held at."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def hold(self) -> None:
        self.reached.set()
        assert self.opened.wait(DEADLINE_S)


class SlowLine(deque[object]):
    """A line in which each caller stops before it enters, and after."""

    def __init__(self, line: deque[object]) -> None:
        super().__init__(line)
        self.before, self.after = Held(), Held()
        self.slow: threading.Thread | None = None

    def append(self, owner: object) -> None:
        is_slow = threading.current_thread() is self.slow
        if is_slow:
            self.before.hold()
        super().append(owner)
        if is_slow:
            self.after.hold()


def test_a_caller_that_comes_while_another_dies_does_not_work_beside_the_restart(nothing_left):
    """It had seen that the turn was free, entered the line behind the caller that was dying, and
    was first in it once the actor's thread had removed that one: ahead of the actor itself."""
    numbers = Numbers()
    numbers.turn = line = SlowLine(numbers.turn)
    looks = Held()
    numbers.resume()
    assert numbers.notices.get(timeout=DEADLINE_S) == Started(numbers)
    while line:
        numbers.wait_for_look()
    numbers.before_look = looks.hold
    outcome: list[bool] = []
    slow = threading.Thread(target=lambda: outcome.append(numbers.work_in_turn(Mail(2))))
    line.slow = slow
    slow.start()
    assert line.before.reached.wait(DEADLINE_S)

    def die(number: int) -> None:
        raise Struck

    numbers.in_handle = die
    with pytest.raises(Struck):
        numbers.work_in_turn(Mail(1))
    numbers.in_handle = lambda _: None
    line.before.opened.set()
    assert line.after.reached.wait(DEADLINE_S)
    looks.opened.set()
    ended = numbers.notices.get(timeout=DEADLINE_S)
    assert isinstance(ended, Ended)
    line.after.opened.set()
    slow.join(DEADLINE_S)
    assert (outcome, numbers.served) == ([False], [])
    numbers.notices.put(ended)
    assert numbers.settle() == 1
    assert numbers.served == [1]
    end(numbers)
