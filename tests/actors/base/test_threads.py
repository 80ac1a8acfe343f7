"""Threads of the product's own: none dies unnoticed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, cursor, until
from interrupts import RunsOut

import foldlog
from foldlog import Put
from foldlog.actors.base import adapter
from foldlog.actors.base import answers as answers_module
from foldlog.actors.base import threads as threads_module
from foldlog.actors.base.answers import Answer
from foldlog.actors.base.threads import OwnThread

# What strikes outside of all that a thread guards is reported and swallowed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def nothing() -> None:
    pass


def dies_before_its_first_line(self: threading.Thread) -> None:
    """In the place of `run`."""


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that cannot begin is given up at once."""
    monkeypatch.setattr(threads_module, "LOOKS", 1)


@pytest.fixture(params=["before it is started", "as it begins"])
def dying(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, impatient: None) -> None:
    """Each thread dies before its first line."""
    if request.param == "as it begins":
        monkeypatch.setattr(OwnThread, "run", dies_before_its_first_line)
    else:
        monkeypatch.setattr(adapter, "call_aside", lambda call, failed: None)


def test_who_starts_a_thread_that_dies_before_its_first_line_is_told(dying: None):
    """`start` of a link and of derived state waited for ever."""
    ran: list[str] = []
    thread = OwnThread("foldlog-test", lambda: ran.append("work"), nothing)
    with pytest.raises(MemoryError, match="foldlog-test did not begin"):
        thread.begin()
    with pytest.raises(TimeoutError):
        OwnThread("foldlog-test", nothing, nothing).begin(0.0)
    assert ran == []


def test_a_thread_that_was_given_up_does_not_begin_later(
    monkeypatch: pytest.MonkeyPatch, impatient: None
):
    late: list[Callable[[], object]] = []
    monkeypatch.setattr(adapter, "call_aside", lambda call, failed: late.append(call))
    ran: list[str] = []
    thread = OwnThread("foldlog-test", lambda: ran.append("work"), lambda: ran.append("end"))
    with pytest.raises(MemoryError):
        thread.begin()
    late[0]()
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert ran == []


def test_a_thread_that_cannot_be_started_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="can't start"):
        OwnThread("foldlog-test", nothing, nothing).begin()


def test_a_memory_error_at_any_point_ends_no_thread_and_its_end_is_told_once_more():
    """One within a handler ended the thread of a follower, of a link and of derived state."""
    for number in range(1, 100):
        strike = RunsOut(number)
        steps: list[str] = []

        def work(strike: RunsOut = strike, steps: list[str] = steps) -> None:
            if not strike.fired:
                sys.setprofile(strike)
            steps.append("work")

        def at_end(steps: list[str] = steps) -> None:
            steps.append("end")
            sys.setprofile(None)

        thread = OwnThread("foldlog-test", _as_foldlogs(work), _as_foldlogs(at_end))
        thread.begin()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        assert steps[-1] == "end"
        assert "work" in steps
        if not strike.fired:
            break
    assert number > 2


def _as_foldlogs(call: Callable[..., None]) -> Callable[[], None]:
    """A strike comes only in calls of foldlog's: make it one."""
    code, names = call.__code__, {**call.__globals__, "__name__": "foldlog.test"}
    return type(call)(code, names, call.__name__, call.__defaults__, call.__closure__)  # type: ignore[return-value]


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, GeneratorExit, ValueError])
def test_whatever_ends_a_thread_its_end_is_told(error: type[BaseException]):
    ends: list[str] = []

    def work() -> None:
        raise error("injected")

    thread = OwnThread("foldlog-test", work, lambda: ends.append("end"))
    thread.begin()
    thread.join(DEADLINE_S)
    assert ends == ["end"]


def opened(kind: str, path: Path, store: foldlog.Store) -> Any:
    if kind == "follow":
        return foldlog.follow(path)
    if kind == "derive":
        return foldlog.derive(store, len, lambda known, updates: known + 1)
    return foldlog.mirror(path.with_name("copy.log"), foldlog.upstreams.LogFile(path))


@pytest.mark.parametrize("kind", ["follow", "derive", "mirror"])
def test_an_opener_whose_thread_dies_before_its_first_line_is_told_and_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch, nothing_left: None, path: Path, kind: str
):
    with foldlog.open(path) as store:
        with monkeypatch.context() as patch:
            patch.setattr(OwnThread, "run", dies_before_its_first_line)
            patch.setattr(threads_module, "LOOKS", 1)
            with pytest.raises(MemoryError, match="did not begin"):
                opened(kind, path, store)
        store.apply([Put("k", b"1")], cursor(1))
        with opened(kind, path, store) as well:
            until(lambda: well.snapshot.seq if kind == "derive" else well.get("k"), "it is seen")


def test_callbacks_whose_thread_dies_before_its_first_line_are_called_by_another(
    monkeypatch: pytest.MonkeyPatch,
):
    """They waited until the next answer came."""
    called = threading.Event()
    answer: Answer[int] = Answer()
    answer.add_done_callback(lambda _: called.set())
    with monkeypatch.context() as patch:
        patch.setattr(answers_module, "callback_threads", {})
        patch.setattr(answers_module._thread, "start_new_thread", lambda call, arguments: 0)
        answer.finish(1)
    answers_module.look_after_callbacks()
    assert called.wait(DEADLINE_S)
