"""A MemoryError at any point of any of the store's threads: nothing hangs, nothing is lost.

A descriptor may stay open where the call that closes it has no memory.
"""

from __future__ import annotations

import itertools
import sys
import threading
from pathlib import Path

import pytest
from actor_kit import DEADLINE_S, batch, cursor, in_thread, threads, until
from interrupts import RunsOut, points

import foldlog
from foldlog import Get, State, WriterCrashed
from foldlog.actors.base.adapter import Ended, Inbox, Mail, NoThread, SupervisedActor
from foldlog.actors.store.internal import Rewritten
from foldlog.actors.store.maintenance import Maintenance
from foldlog.actors.store.requests import CompactRequest, Request
from foldlog.actors.store.supervisor import Supervisor

ON_EACH_ENGINE = True

# What strikes outside of all that a thread guards, or in a finalizer, is reported and swallowed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NUMBERS = itertools.count(1)


@pytest.fixture(params=[11, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def stride(request: pytest.FixtureRequest) -> int:
    """Try each so many-th point: all of them in the slow set."""
    return request.param  # type: ignore[no-any-return]


def strike_in(monkeypatch: pytest.MonkeyPatch, name: str, strike: RunsOut) -> None:
    """Let memory run out in the store's thread of this name: once, even if it is restarted."""
    owner, loop = (Supervisor, "_run") if name == "supervisor" else (SupervisedActor, "_actor_loop")
    original = getattr(owner, loop)

    def struck(self: Supervisor | SupervisedActor) -> None:
        if (self.name if isinstance(self, SupervisedActor) else "supervisor") == name:
            sys.setprofile(None if strike.fired else strike)
        original(self)

    monkeypatch.setattr(owner, loop, struck)


def live(path: Path) -> int:
    """What a store does in its life, with the crash of its writer. Returns the last batch."""
    crashes = iter(["writer.before_write"])

    def crash(step: str) -> None:
        if step == "writer.before_write" and next(crashes, None):
            raise RuntimeError("injected")

    with foldlog.open(path, max_restarts=3, readers=1, step=crash, sync_interval_s=0.01) as store:
        number = next(NUMBERS)
        store.apply(batch(number), cursor(number))
        store.compact(DEADLINE_S)
        store.sync(DEADLINE_S)
        assert store.reader.ask(Get("shared/0"), timeout=DEADLINE_S).value == b"%d" % number
        store.reopen(DEADLINE_S)
        seq = store.apply(batch(number + 1), cursor(number + 1), timeout_s=DEADLINE_S)
        until(lambda: store.state is State.RUNNING, "what was struck last has restarted")
    return seq


def of_stores(running: list[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in running if thread.name.startswith("foldlog-")]


@pytest.mark.parametrize("name", ["supervisor", "writer", "reader-0", "maintenance", "syncer"])
def test_a_store_outlives_a_memory_error_at_any_point_of_its_own_threads(
    monkeypatch, path, name, stride
):
    """A thread that had no memory left to tell its end was never missed: each write hung."""
    for number in points(stride):
        strike = RunsOut(number)
        with monkeypatch.context() as patch:
            strike_in(patch, name, strike)
            try:
                seq = live(path)
            except (MemoryError, NoThread, WriterCrashed):
                assert strike.fired
                seq = None  # it was being opened, or at work on a request
        with foldlog.open(path) as store:
            assert store.verify().ok
            assert seq in (None, store.snapshot().seq)
        if not strike.fired:
            break
    assert number > 1
    until(lambda: not of_stores(threads()), "the store's threads have ended")


def test_a_close_that_runs_out_of_memory_as_it_ends_is_finished(open_store, monkeypatch, path):
    """The writer was restarted, and replayed the log with a lock that it had released."""
    store = open_store()
    store.apply(batch(1), cursor(1))
    engine, strikes = type(store._engine), iter([MemoryError("injected")])
    close = engine.close

    def struck(self):
        close(self)
        if error := next(strikes, None):
            raise error

    monkeypatch.setattr(engine, "close", struck)
    store.close(DEADLINE_S)
    assert next(strikes, None) is None
    with foldlog.open(path) as again:
        assert again.snapshot().seq == 1


@pytest.mark.parametrize("name", ["writer", "maintenance", "syncer", "reader-0"])
def test_an_actor_that_runs_out_of_memory_once_it_has_stopped_is_not_restarted(
    open_store, monkeypatch, path, name
):
    """The writer replayed the log, with a lock that it had released."""
    store = open_store(readers=1)
    retire, strikes = SupervisedActor.retire, iter([MemoryError("injected")])

    def struck(self: SupervisedActor) -> None:
        if self.name == name and (error := next(strikes, None)):
            raise error
        retire(self)

    monkeypatch.setattr(SupervisedActor, "retire", struck)
    store.apply(batch(1), cursor(1))
    store.close(DEADLINE_S)
    assert next(strikes, None) is None
    assert not store._core.statistics.restarts_by_cause
    with foldlog.open(path) as again:
        assert again.snapshot().seq == 1


def test_nobody_is_resumed_once_the_store_has_closed(open_store, monkeypatch, path):
    """The supervisor ran out of memory with the last notice in hand, closed the store as it caught
    up, and then resumed its actors: the log stayed locked."""
    receive, strikes = Supervisor._receive, iter([MemoryError("injected")])

    def received(self: Supervisor, timeout_s: float) -> bool:
        has_one, notice = receive(self, timeout_s), self._notice
        is_last = isinstance(notice, Ended) and self._running == {notice.actor}
        if is_last and (error := next(strikes, None)):
            raise error
        return has_one

    monkeypatch.setattr(Supervisor, "_receive", received)
    open_store().close(DEADLINE_S)
    assert next(strikes, None) is None
    until(lambda: not of_stores(threads()), "the store's threads have ended")
    foldlog.open(path).close()


@pytest.mark.parametrize("struck", ["tell", "clear"])
def test_a_rewrite_that_the_writer_has_is_not_discarded_by_who_wrote_it(
    open_store, steps, monkeypatch, struck
):
    """Maintenance ran out of memory after the message had arrived, and closed the file of which
    the writer was making its log, or removed it."""
    post, start = Inbox._post, Maintenance.on_start
    strikes, restarted = iter([MemoryError("injected")]), threading.Event()

    def strike(where: str) -> None:
        if where == struck and (error := next(strikes, None)):
            raise error

    def posted(self: Inbox, mail: Mail) -> None:
        post(self, mail)
        if isinstance(mail.message, Rewritten):
            strike("tell")

    class Taken(list[Mail]):
        def clear(self) -> None:
            strike("clear")
            super().clear()

    def started(self: Maintenance) -> None:
        start(self)
        if isinstance(self.taken, Taken):
            restarted.set()
        self.taken = Taken(self.taken)

    monkeypatch.setattr(Inbox, "_post", posted)
    monkeypatch.setattr(Maintenance, "on_start", started)
    store = open_store()
    store.apply(batch(1), cursor(1))
    gate, compaction = steps.parked("compact.finish", in_thread, store.compact, DEADLINE_S)
    assert restarted.wait(DEADLINE_S)
    gate.open()
    compaction.result(DEADLINE_S)
    store.apply(batch(2), cursor(2))
    assert store.stats().compactions == 1
    assert store.verify().ok


def test_a_restarted_writer_that_has_no_memory_to_return_its_requests_keeps_them(
    open_store, steps, monkeypatch
):
    """They were in its mailbox no more, and not yet in its hands: their callers waited in vain."""
    return_taken, strikes = Inbox.return_taken, iter([MemoryError("injected")])

    def struck(self: Inbox, taken: list[Mail]) -> None:
        if taken and (error := next(strikes, None)):
            raise error
        return_taken(self, taken)

    monkeypatch.setattr(Inbox, "return_taken", struck)
    store = open_store()
    steps.crash("writer.before_write")
    assert store.apply(batch(1), cursor(1), timeout_s=DEADLINE_S) == 1
    assert next(strikes, None) is None


def test_who_asked_for_a_compaction_is_answered_though_memory_ran_out_on_the_way(
    open_store, monkeypatch
):
    """Those still to be answered were forgotten, and waited in vain."""
    start, strikes = Request.start, iter([MemoryError("injected")])

    def struck(self: Request) -> bool:
        if isinstance(self, CompactRequest) and (error := next(strikes, None)):
            raise error
        return start(self)

    monkeypatch.setattr(Request, "start", struck)
    store = open_store()
    store.apply(batch(1), cursor(1))
    store.compact(DEADLINE_S)
    assert next(strikes, None) is None
