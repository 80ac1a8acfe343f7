"""The thread for work off the loop: each call is answered, also if memory runs out on the way."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, cursor, in_thread, until
from interrupts import RunsOut

import foldlog
from foldlog import Put, aio
from foldlog.actors.base.threads import OwnThread
from foldlog.aio import answers
from foldlog.aio.bridge import Bridge
from foldlog.aio.off_loop import OffLoop

pytestmark = pytest.mark.usefixtures("nothing_left")


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "foldlog-aio"]


def ended() -> None:
    until(lambda: not running(), "the thread has ended")


def test_each_call_is_answered_though_memory_runs_out_at_any_point_of_the_thread():
    """The thread of the pool died, and nobody replaced it: who awaited a call waited for ever."""
    for number in range(1, 1000):
        strike = RunsOut(number)
        thread = OffLoop()
        ran: list[int] = []

        def call(
            which: int, strike: RunsOut | None = None, ran: list[int] = ran
        ) -> Callable[[], int]:
            def run() -> int:
                ran.append(which)
                sys.setprofile(strike)
                return which

            return run

        calls = [thread.submit(call(which, None if which else strike)) for which in range(4)]
        for which, answer in enumerate(calls):
            assert answer.result(DEADLINE_S) == which
        assert ran == [0, 1, 2, 3]
        thread.end()
        ended()
        if not strike.fired:
            break
    assert number > 5


def test_what_a_call_raises_is_its_answer_and_the_thread_goes_on():
    thread = OffLoop()

    def fail(error: BaseException) -> None:
        raise error

    for error in (ValueError("a"), MemoryError("b"), SystemExit("c"), KeyboardInterrupt("d")):
        with pytest.raises(type(error), match=str(error)):
            thread.submit(lambda error=error: fail(error)).result(DEADLINE_S)
    assert len(running()) == 1
    thread.end()
    ended()


def test_a_call_that_was_cancelled_before_it_began_is_not_made():
    thread, go_on, ran = OffLoop(), threading.Event(), []
    held = thread.submit(lambda: go_on.wait(DEADLINE_S))
    until(held.running, "the first has begun")
    cancelled = thread.submit(lambda: ran.append(1))
    assert cancelled.cancel()
    go_on.set()
    assert held.result(DEADLINE_S)
    thread.end()
    ended()
    assert ran == []


def test_calls_made_before_the_end_are_carried_out_and_later_ones_refused():
    thread, go_on = OffLoop(), threading.Event()
    calls = [thread.submit(lambda: go_on.wait(DEADLINE_S)) for _ in range(3)]
    thread.end()
    go_on.set()
    assert [call.result(DEADLINE_S) for call in calls] == [True] * 3
    ended()
    with pytest.raises(RuntimeError, match="told to end"):
        thread.submit(lambda: None)


def test_no_call_that_races_with_the_end_is_left_unanswered():
    for _ in range(50):
        thread, ready = OffLoop(), threading.Barrier(2)
        thread.submit(lambda: None)

        def calls(thread: OffLoop = thread, ready: threading.Barrier = ready) -> list[Any]:
            made: list[Any] = []
            ready.wait(DEADLINE_S)
            try:
                while True:
                    made.append(thread.submit(lambda: None))
            except RuntimeError:
                return made

        making = in_thread(calls)
        ready.wait(DEADLINE_S)
        thread.end()
        for call in making.result(DEADLINE_S):
            call.result(DEADLINE_S)
    ended()


def test_two_threads_started_at_once_both_serve_and_both_end(monkeypatch: pytest.MonkeyPatch):
    thread, begin, both = OffLoop(), OwnThread.begin, threading.Barrier(2)

    def together(self: OwnThread) -> None:
        both.wait(DEADLINE_S)
        begin(self)

    monkeypatch.setattr(OwnThread, "begin", together)
    first = in_thread(lambda: thread.submit(lambda: 1).result(DEADLINE_S))
    assert thread.submit(lambda: 2).result(DEADLINE_S) == 2
    assert first.result(DEADLINE_S) == 1
    assert len(running()) == 2
    thread.end()
    ended()


def test_the_thread_ends_once_nobody_holds_its_owner():
    thread = OffLoop()
    thread.submit(lambda: None).result(DEADLINE_S)
    del thread
    until(lambda: gc.collect() >= 0 and not running(), "the thread has ended")


@pytest.mark.parametrize("call", ["apply", "close"])
def test_an_answer_of_which_no_memory_was_left_to_tell_is_found(
    monkeypatch: pytest.MonkeyPatch, path: Path, call: str
):
    """The loop was not woken: `close` waited for ever, and `apply` until its timeout."""
    monkeypatch.setattr(answers, "LOOK_S", 0.01)
    post, lost = Bridge.post, []

    def struck(self: Bridge, what: Callable[[], object]) -> None:
        if lost:
            post(self, what)
        else:
            lost.append(what)
            raise MemoryError("injected")

    async def main() -> None:
        async with aio.open(path) as store:
            monkeypatch.setattr(Bridge, "post", struck)
            if call == "apply":
                assert await store.apply([Put("k", b"1")], cursor(1), None) == 1

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    until(lambda: lost, "it was told in vain")  # perhaps only after the answer was found


def test_a_store_whose_thread_off_the_loop_does_not_begin_is_not_opened(
    monkeypatch: pytest.MonkeyPatch, path: Path
):
    """The loop waited for ever for the thread."""

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(OwnThread, "run", lambda self: None)
            patch.setattr("foldlog.actors.base.threads.LOOKS", 1)
            with pytest.raises(MemoryError, match="foldlog-aio did not begin"):
                await aio.open(path)
        async with aio.open(path) as store:
            assert await store.apply([Put("k", b"1")], cursor(1)) == 1

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))


def test_a_close_that_failed_can_be_called_again(monkeypatch: pytest.MonkeyPatch, path: Path):
    """It raised the same error for ever, and the store stayed open."""
    close, strikes = foldlog.Store.close, iter([MemoryError("injected")])

    def struck(self: foldlog.Store, timeout_s: float | None = None) -> None:
        if error := next(strikes, None):
            raise error
        close(self, timeout_s)

    async def main() -> None:
        store = await aio.open(path)
        with monkeypatch.context() as patch:
            patch.setattr(foldlog.Store, "close", struck)
            with pytest.raises(MemoryError):
                await store.close()
            await store.close()
            await store.close()
        assert store.state is foldlog.State.CLOSED

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    ended()


def test_a_store_that_opens_after_its_caller_was_cancelled_is_closed(
    monkeypatch: pytest.MonkeyPatch, path: Path
):
    opening, go_on = threading.Event(), threading.Event()

    def slowly(*arguments: Any, **options: Any) -> foldlog.Store:
        opening.set()
        assert go_on.wait(DEADLINE_S)
        return foldlog.open(path)

    async def main() -> None:
        task = asyncio.create_task(aio.Opening(slowly, aio.AsyncStore)._open())
        while not opening.is_set():
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()

    asyncio.run(asyncio.wait_for(main(), DEADLINE_S))
    ended()
    foldlog.open(path).close()
