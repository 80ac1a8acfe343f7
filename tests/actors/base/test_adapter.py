"""What the adapter needs from pykka and adds to it: a test per fact that a release could change."""

from __future__ import annotations

import inspect
import queue
import threading

import pykka
import pytest
from actor_kit import DEADLINE_S, FATAL, in_thread, results, until
from pykka._envelope import Envelope
from pykka.messages import _ActorStop

from foldlog import Backpressure, FoldlogError, StoreClosed
from foldlog.actors.base.adapter import STOP, Ended, Inbox, Mail, Started, SupervisedActor, reply
from foldlog.actors.base.answers import Reply

# Facts about pykka.


def test_pykka_still_has_the_insides_that_the_adapter_overrides():
    for name in ("_actor_loop", "_create_actor_inbox", "_create_future"):
        assert hasattr(pykka.ThreadingActor, name), name
    assert {"message", "reply_to"} <= set(Envelope.__slots__)
    assert list(inspect.signature(Envelope.__init__).parameters)[1:] == ["message", "reply_to"]
    assert pykka.ThreadingActor.use_daemon_thread is False, "why the adapter sets it"


def test_a_reference_keeps_the_mailbox_and_the_flag_that_its_actor_was_made_with():
    actor = Echo("echo", lambda notice: None)
    assert actor.actor_ref.actor_inbox is actor.inbox
    assert actor.actor_ref.actor_stopped is actor.actor_stopped
    assert actor.actor_ref.is_alive()
    actor.retire()
    assert not actor.actor_ref.is_alive()


def test_making_an_actor_registers_nothing():
    before = pykka.ActorRegistry.get_all()
    Echo("echo", lambda notice: None)
    assert pykka.ActorRegistry.get_all() == before


def test_setting_a_future_twice_raises_full():
    future = pykka.ThreadingFuture()
    future.set(1)
    with pytest.raises(queue.Full):
        future.set(2)
    reply(Mail("x", future), 3)
    reply(Mail("x", future), error=ValueError("x"))
    assert future.get(timeout=0) == 1


def test_stopping_a_reference_is_refused_and_the_actor_lives():
    """A foreign actor died of SystemExit and stopped all actors, every store's included."""
    actor = Echo("echo", lambda notice: None)
    with pytest.raises(FoldlogError, match="close"):
        actor.actor_ref.stop(timeout=DEADLINE_S)
    with pytest.raises(FoldlogError, match="close"):
        actor.actor_ref.tell(_ActorStop())
    assert not actor.inbox.mails
    assert actor.actor_ref.is_alive()


# What the adapter promises.


class Echo(SupervisedActor):
    """Answers what it is asked; dies as told."""

    starts = 0

    def on_start(self) -> None:
        self.starts += 1
        again, self.taken[:] = (
            [mail for mail in self.taken if not isinstance(mail.message, BaseException)],
            [],
        )
        self.inbox.return_taken(again)

    def handle(self, mails: list[Mail]) -> None:
        if isinstance(mails[0].message, BaseException):
            raise mails[0].message
        reply(mails[0], mails[0].message)

    def on_stop(self) -> None:
        pass


def stop(actor: SupervisedActor) -> Reply:
    """As its owner does."""
    stopped = Reply()
    actor.inbox.offer(Mail(STOP, stopped))
    return stopped


@pytest.fixture
def echo(nothing_left):
    notices: queue.SimpleQueue[object] = queue.SimpleQueue()
    actor = Echo("test", notices.put)
    actor.notices = notices
    actor.resume()
    assert notices.get(timeout=DEADLINE_S) == Started(actor)
    yield actor
    if not actor.actor_stopped.is_set():
        if not actor.thread.is_alive():
            actor.resume()
        stop(actor).get(timeout=DEADLINE_S)
    actor.thread.join(DEADLINE_S)


@pytest.mark.parametrize("how", ["ask", "tell"])
@pytest.mark.parametrize("error", FATAL, ids=lambda error: error.__name__)
def test_an_actor_says_how_it_died_and_goes_on_in_a_new_thread_with_its_mail(echo, how, error):
    bystander = pykka.ThreadingActor.start()
    try:
        gate = threading.Event()
        echo.handle = lambda mails: (gate.wait(DEADLINE_S), Echo.handle(echo, mails))
        if how == "ask":
            echo.actor_ref.ask(error("mine"), block=False)
        else:
            echo.actor_ref.tell(error("mine"))
        waiting = [echo.actor_ref.ask(number, block=False) for number in range(5)]
        gate.set()
        ended = echo.notices.get(timeout=DEADLINE_S)
        assert isinstance(ended, Ended)
        assert isinstance(ended.error, error)
        echo.thread.join(DEADLINE_S)
        assert echo.actor_ref.is_alive(), "for pykka it waits, and does not die"
        assert bystander.is_alive()
        old = echo.thread
        echo.resume()
        assert [future.get(timeout=DEADLINE_S) for future in waiting] == list(range(5))
        assert echo.thread is not old
    finally:
        bystander.stop()


@pytest.mark.parametrize("error", FATAL, ids=lambda error: error.__name__)
@pytest.mark.parametrize("hook", ["on_start", "on_stop"])
def test_a_hook_that_fails_is_heard_of(nothing_left, hook, error):
    notices: queue.SimpleQueue[object] = queue.SimpleQueue()
    actor = Echo("test", notices.put)

    def fail() -> None:
        raise error("mine")

    setattr(actor, hook, fail)
    actor.resume()
    stopping = None
    if hook == "on_stop":
        assert notices.get(timeout=DEADLINE_S) == Started(actor)
        stopping = stop(actor)
    ended = notices.get(timeout=DEADLINE_S)
    assert isinstance(ended.error, error)
    actor.thread.join(DEADLINE_S)
    if stopping is not None:
        delattr(actor, hook)
        actor.resume()
        assert stopping.get(timeout=DEADLINE_S) is None, (
            "who asked it to stop is answered by its successor"
        )
    actor.retire()


def test_asks_that_race_with_the_end_of_an_actor_are_all_answered(nothing_left):
    """pykka strands about one in 700: it checks that the actor lives, then enqueues."""
    stranded = answered = 0
    for _ in range(40):
        notices: queue.SimpleQueue[object] = queue.SimpleQueue()
        actor = Echo("test", notices.put)
        actor.resume()
        ready = threading.Barrier(4)

        def ask(actor=actor, ready=ready):
            ready.wait(DEADLINE_S)
            return [actor.actor_ref.ask(number, block=False) for number in range(100)]

        asking = [in_thread(ask) for _ in range(3)]
        ready.wait(DEADLINE_S)
        stop(actor).get(timeout=DEADLINE_S)
        actor.inbox.end(lambda: StoreClosed("over"))
        for future in [future for futures in results(asking) for future in futures]:
            try:
                future.get(timeout=DEADLINE_S)
            except pykka.Timeout:
                stranded += 1
            except (StoreClosed, pykka.ActorDeadError):
                answered += 1
            else:
                answered += 1
        actor.thread.join(DEADLINE_S)
    assert (stranded, answered) == (0, 40 * 300)


# The mailbox.


def test_whoever_sees_what_a_refusal_publishes_is_refused():
    inbox = Inbox()
    tried = []

    def publish():
        tried.append(in_thread(inbox.offer, Mail("seen it, and tries")))
        with pytest.raises(TimeoutError):
            tried[0].result(0.05)  # kept waiting: neither taken nor refused

    inbox.refuse(lambda: StoreClosed("over"), drain=True, publish=publish)
    with pytest.raises(StoreClosed):
        tried[0].result(DEADLINE_S)
    assert len(inbox) == 0


def test_a_mailbox_that_refuses_answers_asks_raises_to_tellers_and_lets_stops_through():
    inbox = Inbox()
    inbox.refuse(lambda: StoreClosed("over"), drain=True)
    future = pykka.ThreadingFuture()
    inbox.put(Mail("ask", future))
    with pytest.raises(StoreClosed):
        future.get(timeout=0)
    with pytest.raises(StoreClosed):
        inbox.put(Mail("tell"))
    inbox.put(Mail(STOP))
    assert len(inbox) == 1
    inbox.accept()
    inbox.put(Mail("tell"))
    assert len(inbox) == 2


def test_a_mailbox_that_has_ended_answers_stops_at_once():
    """A stop that came after the last look into the mailbox waited for ever, as did `stop_all`."""
    inbox = Inbox()
    waiting, late = pykka.ThreadingFuture(), pykka.ThreadingFuture()
    inbox.put(Mail(STOP, waiting))
    inbox.end(lambda: StoreClosed("over"))
    inbox.put(Mail(STOP, late))
    assert waiting.get(timeout=0) is None
    assert late.get(timeout=0) is None
    assert not inbox.mails


def test_a_mailbox_gives_groups_of_a_kind_in_order_and_up_to_a_limit():
    inbox = Inbox()
    for message in (1, 2, 3, "a", 4, 5):
        inbox.put(Mail(message))
    taken: list[Mail] = []
    groups = []
    while inbox.mails:
        inbox.move(taken, (int,), 2)
        groups.append([mail.message for mail in taken])
        taken.clear()
    assert groups == [[1, 2], [3], ["a"], [4, 5]]


def test_mail_that_is_returned_comes_first_and_past_the_bound():
    inbox = Inbox(max_messages=3)
    for message in (1, 2, 3):
        inbox.put(Mail(message))
    taken: list[Mail] = []
    inbox.move(taken, (int,), 2)
    inbox.put(Mail(4))
    inbox.return_taken(taken)
    assert taken == []
    with pytest.raises(Backpressure):
        inbox.offer(Mail(5))
    inbox.move(taken, (int,), 4)
    assert [mail.message for mail in taken] == [1, 2, 3, 4]


def test_a_take_ends_after_its_time_and_a_waiting_offer_when_there_is_room():
    inbox = Inbox(max_messages=1)
    taken: list[Mail] = []
    inbox.take(taken, timeout_s=0.01)
    assert taken == []
    inbox.put(Mail(1))
    offering = in_thread(inbox.offer, Mail(2), DEADLINE_S)
    until(lambda: inbox._line, "it waits for room")
    inbox.take(taken)
    offering.result(DEADLINE_S)
    inbox.move(taken, (int,), 2)
    assert [mail.message for mail in taken] == [1, 2]
