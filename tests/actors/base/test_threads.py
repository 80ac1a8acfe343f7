"""Threads of the product's own: none dies unnoticed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, cursor, in_thread, until
from interrupts import RunsOut

import foldlog
from foldlog import Put
from foldlog.actors.base import answers as answers_module
from foldlog.actors.base import threads as threads_module
from foldlog.actors.base.adapter import NoThread
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


class Bootstrap:
    """Lets foldlog's threads die in the interpreter's own first lines: `Thread.start` waits for
    ever."""

    def __init__(self) -> None:
        self._begin = threading.Thread._bootstrap_inner
        self._start = threading.Thread.start
        self._dead: dict[threading.Thread, threading.Event] = {}
        self._dying, self._looks = "", threads_module.LOOKS
        self._lock = threading.Lock()

    @property
    def dying(self) -> str:
        """The beginning of the names of those that die; none, if empty. Meanwhile, a thread is
        given up soon."""
        return self._dying

    @dying.setter
    def dying(self, name: str) -> None:
        self._dying = name
        threads_module.LOOKS = 1 if name else self._looks

    def start(self, thread: threading.Thread) -> None:
        with self._lock:
            if self.dying and thread.name.startswith(self.dying):
                self._dead[thread] = threading.Event()
        self._start(thread)

    def begin(self, thread: threading.Thread) -> None:
        if thread in self._dead:
            self._dead[thread].set()
        else:
            self._begin(thread)

    def release(self) -> None:
        """Let go of who waits in `Thread.start`."""
        with self._lock:
            self.dying = ""
        for thread, is_dead in self._dead.items():
            assert is_dead.wait(DEADLINE_S)
            thread._started.set()
            threading._limbo.pop(thread, None)


@pytest.fixture
def bootstrap(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bootstrap]:
    bootstrap = Bootstrap()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda thread: bootstrap.start(thread))
        patch.setattr(threading.Thread, "_bootstrap_inner", lambda thread: bootstrap.begin(thread))
        yield bootstrap
        bootstrap.release()


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
        monkeypatch.setattr(threads_module, "call_aside", lambda call, failed: None)


def test_who_starts_a_thread_that_dies_before_its_first_line_is_told(dying: None):
    """`start` of a link and of derived state waited for ever."""
    ran: list[str] = []
    thread = OwnThread("foldlog-test", lambda: ran.append("work"), nothing)
    with pytest.raises(MemoryError, match="foldlog-test did not begin"):
        thread.begin()
    assert not OwnThread("foldlog-test", nothing, nothing).begin(0.0)
    assert ran == []


def test_a_thread_that_was_given_up_does_not_begin_later(
    monkeypatch: pytest.MonkeyPatch, impatient: None
):
    late: list[Callable[[], object]] = []
    monkeypatch.setattr(threads_module, "call_aside", lambda call, failed: late.append(call))
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


@pytest.mark.parametrize("name", ["supervisor", "writer", "maintenance", "syncer", "reader-0"])
def test_a_store_whose_thread_dies_in_the_interpreters_first_lines_is_not_opened(
    nothing_left: None, bootstrap: Bootstrap, path: Path, name: str
):
    """The supervisor, which had started it, waited for ever; or `open` did, for the supervisor."""
    bootstrap.dying = f"foldlog-{name}"
    with pytest.raises((MemoryError, NoThread), match="did not begin"):
        foldlog.open(path)
    bootstrap.release()
    foldlog.open(path).close()


def test_a_writer_whose_new_thread_dies_in_the_interpreters_first_lines_is_started_again(
    nothing_left: None, bootstrap: Bootstrap, path: Path
):
    """The supervisor waited for ever for the thread, and every request for the supervisor."""
    crashes = iter(["foldlog-writer"])

    def step(name: str) -> None:
        if name == "writer.before_write":
            bootstrap.dying = next(crashes, "")
            if bootstrap.dying:
                raise RuntimeError("injected")

    with foldlog.open(path, step=step) as store:
        future = store.apply_async([Put("k", b"1")], cursor(1))
        until(lambda: len(store.stats().restarts) > 1, "its thread has died twice")
        bootstrap.dying = ""
        assert future.result(DEADLINE_S) == 1


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


def finish_three(strike: RunsOut) -> None:
    """Answers with callbacks, for which someone waits, while memory runs out on the thread that
    calls the callbacks."""
    answers: list[Answer[int]] = [Answer() for _ in range(3)]
    called: list[int] = []
    answers[0].add_done_callback(lambda _: sys.setprofile(strike))
    for answer in answers:
        answer.add_done_callback(lambda _: called.append(1))
    waiting = in_thread(wait, answers, DEADLINE_S)
    until(lambda: all(answer._facts.get("watchers") for answer in answers), "it waits")
    for answer in answers:
        answer.finish(1)
    assert not waiting.result(DEADLINE_S).not_done
    until(lambda: len(called) == 3, "all callbacks are called")
    last, is_over = Answer[None](), threading.Event()
    last.add_done_callback(lambda _: sys.setprofile(None))
    last.add_done_callback(lambda _: is_over.set())
    last.finish(None)
    assert is_over.wait(DEADLINE_S)


def test_each_callback_is_called_though_memory_runs_out_at_any_point_of_their_thread():
    """The call in hand was lost: `concurrent.futures.wait` and an event loop waited for ever."""
    struck = 0
    for number in range(1, 40):  # how many points there are depends on who comes first
        strike = RunsOut(number)
        finish_three(strike)
        struck += strike.fired
    assert struck > 1


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
