"""An exception at any point of a caller's thread, and a handler that calls the store there."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import pykka
import pytest
from actor_kit import DEADLINE_S, cursor, in_thread, until
from engine_kit import ENGINES
from engine_kit import backend as backend
from interrupts import At, Struck, points, strike, strikes

import foldlog
from foldlog import FoldlogError, Put, RequestTimeout
from foldlog.actors.base.adapter import SharedActor
from foldlog.actors.feeds.delivery import Delivery
from foldlog.actors.link.intake import LinkConfig
from foldlog.actors.store.writer import Writer
from foldlog.protocol.store import Backend
from foldlog.storage.handover import Bell

ON_EACH_ENGINE = True

# What strikes within a finalizer is reported by CPython, and swallowed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

NUMBERS = itertools.count(1)


def an_update() -> list[Put]:
    return [Put(f"k/{next(NUMBERS) % 7}", b"v")]


STORE_CALLS: dict[str, Callable[[foldlog.Store], Any]] = {
    "apply": lambda store: store.apply(an_update(), cursor(next(NUMBERS))),
    "apply, handed over": lambda store: store.apply(
        an_update(), cursor(next(NUMBERS)), timeout_s=DEADLINE_S / 2
    ),
    "apply_async": lambda store: store.apply_async(an_update(), cursor(next(NUMBERS))).result(
        DEADLINE_S
    ),
    "put": lambda store: store.put("p", b"1"),
    "create": lambda store: store.create(f"new/{next(NUMBERS)}", b"1"),
    "delete": lambda store: store.delete("p"),
    "get": lambda store: store.get("p"),
    "range": lambda store: store.range(""),
    "snapshot": lambda store: store.snapshot().get("p"),
    "compact": lambda store: store.compact(),
    "verify": lambda store: store.verify(),
    "stats": lambda store: store.stats(),
    "watch": lambda store: watched(store),
    "ask the writer": lambda store: store.writer.ask(
        foldlog.Apply(an_update(), cursor(next(NUMBERS))), timeout=DEADLINE_S
    ),
    "ask a reader": lambda store: store.reader.ask(foldlog.Get("p"), timeout=DEADLINE_S),
    "tell the writer": lambda store: store.writer.tell(
        foldlog.Apply(an_update(), cursor(next(NUMBERS)))
    ),
    "reopen": lambda store: store.reopen(DEADLINE_S),
}


def read_some(watch: foldlog.Watch, events: list[Any]) -> None:
    for _ in range(3):
        # Keep each event, in case the next call is interrupted.
        events.append(watch.next(0.0))  # noqa: PERF401


def watched(store: foldlog.Store) -> None:
    with store.watch() as watch:
        while not isinstance(watch.next(0.0), foldlog.Synced):
            pass


def goes_on(store: foldlog.Store) -> None:
    """Another thread writes, and what it wrote is there."""
    number = next(NUMBERS)
    in_thread(lambda: store.put("other", b"%d" % number, timeout_s=DEADLINE_S)).result(DEADLINE_S)
    entry = store.get("other")
    assert entry is not None
    assert entry.value == b"%d" % number


@pytest.fixture(params=[37, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def stride(request: pytest.FixtureRequest) -> int:
    """Try each so many-th point: all of them in the slow set."""
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", STORE_CALLS)
def test_a_store_outlives_an_exception_at_any_point_of_a_call(
    tmp_path: Path, name: str, stride: int
):
    """An exception in `Condition.__enter__` left a lock held; writer and supervisor hung."""
    call = STORE_CALLS[name]
    path = tmp_path / "a.log"
    store = foldlog.open(path, max_restarts=1)
    call(store)
    for at in strikes(stride):
        with contextlib.suppress(Struck):
            at.run(lambda: call(store))
        goes_on(store)
    assert at.number > 1
    store.close(DEADLINE_S)
    with foldlog.open(path) as store:
        assert store.verify().ok


class Watched:
    """Counts how often an actor's own thread has looked after its turn, and how often any actor was
    restarted; holds a caller in its turn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
        self.step, self.store = step, None
        self.looks = threading.Semaphore(0)
        self.holder: threading.Thread | None = None
        self.reached, self.opened = threading.Event(), threading.Event()
        look = SharedActor._look_after_turn

        def counted(actor: SharedActor) -> None:
            try:
                look(actor)
            finally:
                if self.store is not None and actor is self.actor:
                    self.looks.release()

        monkeypatch.setattr(SharedActor, "_look_after_turn", counted)
        monkeypatch.setattr(Writer, "tick_s", inf)  # it has a turn now and then

    @property
    def actor(self) -> SharedActor:
        supervisor = self.store._supervisor
        return supervisor.readers[0] if self.step == "reader.handle" else supervisor.writer

    @property
    def restarts(self) -> int:
        return sum(self.store._core.statistics.restarts_by_cause.values())

    def on_step(self, name: str) -> None:
        if name == self.step and threading.current_thread() is self.holder:
            self.reached.set()
            assert self.opened.wait(DEADLINE_S)

    def settle(self) -> None:
        """Wait until the actor is idle."""
        actor = self.actor
        until(lambda: not actor.turn and not actor.inbox.mails, "the actor is idle")

    @contextlib.contextmanager
    def another_at_work(self, call: Callable[[], Any]) -> Iterator[None]:
        """Another thread is in the middle of a turn: while the block runs, and while the actor's
        own thread looks twice after it. Then it goes on, and nothing was restarted."""
        self.reached, self.opened = threading.Event(), threading.Event()
        outcome: list[Any] = []
        self.holder = threading.Thread(target=lambda: outcome.append(call()))
        before = self.restarts
        try:
            self.holder.start()
            assert self.reached.wait(DEADLINE_S), "it has the turn"
            yield
            while self.looks.acquire(blocking=False):
                pass
            for _ in range(2):  # the first may have begun before
                self.actor.inbox.wake()
                assert self.looks.acquire(timeout=DEADLINE_S)
        finally:
            self.opened.set()
            self.holder.join(DEADLINE_S)
        assert outcome, "it had its answer"
        self.settle()
        assert self.restarts == before


def press_ctrl_c() -> None:
    """`strike`, but never taken for a failure of a step."""
    raise KeyboardInterrupt


IN_A_TURN: dict[str, tuple[str, Callable[[foldlog.Store], Any]]] = {
    name: ("reader.handle" if name == "ask a reader" else "writer.before_write", STORE_CALLS[name])
    for name in ("apply", "put", "create", "ask a reader")
}


@pytest.fixture(params=[41, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["some", "all"])
def each(request: pytest.FixtureRequest) -> int:
    """Try each so many-th point: all of them in the exhaustive set."""
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", IN_A_TURN)
def test_nothing_is_restarted_under_a_caller_at_work_after_another_was_struck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, each: int
):
    """What the struck caller left behind was believed in the next one's turn: the log was replayed
    while that one was writing."""
    step, call = IN_A_TURN[name]
    watched = Watched(monkeypatch, step)
    path = tmp_path / "a.log"
    store = watched.store = foldlog.open(
        path, readers=1, sync_interval_s=1_000.0, step=watched.on_step
    )
    store.put("p", b"1")
    for at in strikes(each, press_ctrl_c):
        with contextlib.suppress(KeyboardInterrupt):
            at.run(partial(call, store))
        watched.settle()
        with watched.another_at_work(partial(call, store)):
            pass
    assert at.number > 1
    assert {kind for _, kind in store._core.statistics.restarts_by_cause} <= {"DiedInTurn"}
    store.close(DEADLINE_S)
    with foldlog.open(path) as store:
        assert store.verify().ok


@pytest.mark.parametrize("name", ["apply_async", "tell the writer", "watch", "stats", "get"])
def test_a_caller_at_work_goes_on_when_another_is_struck_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, each: int
):
    calls = {**STORE_CALLS, "apply_async": lambda store: store.apply_async(an_update(), cursor(1))}
    watched = Watched(monkeypatch, "writer.before_write")
    path = tmp_path / "a.log"
    store = watched.store = foldlog.open(
        path, readers=1, sync_interval_s=1_000.0, step=watched.on_step
    )
    for at in strikes(each, press_ctrl_c):
        watched.settle()
        with (
            watched.another_at_work(lambda: store.put("other", b"1")),
            contextlib.suppress(KeyboardInterrupt),
        ):
            at.run(partial(calls[name], store))
    assert at.number > 1
    assert watched.restarts == 0
    store.close(DEADLINE_S)
    with foldlog.open(path) as store:
        assert store.verify().ok


@pytest.mark.parametrize("name", ["apply", "put", "compact", "watch", "ask a reader"])
@pytest.mark.parametrize("handler", ["put", "apply_async", "get", "close"])
def test_a_handler_that_calls_the_store_again_works_or_is_refused_at_once(
    tmp_path: Path, name: str, handler: str, stride: int
):
    """A handler wrote while its thread was filling the mailbox, and waited for its own lock."""
    call = STORE_CALLS[name]
    acts: dict[str, Callable[[], Any]] = {
        "put": lambda: store.put("handler", b"1", timeout_s=DEADLINE_S),
        "apply_async": lambda: store.apply_async(an_update(), cursor(next(NUMBERS))),
        "get": lambda: store.get("p"),
        "close": lambda: store.close(DEADLINE_S),
    }
    refusals: list[Exception] = []

    def act() -> None:
        try:
            acts[handler]()
        except FoldlogError as refused:
            refusals.append(refused)

    stride *= 3 if stride > 1 and handler == "close" else 1
    store = foldlog.open(tmp_path / "a.log")
    for at in strikes(stride, act, first=stride):
        if handler == "close" and at.number > stride:
            store.close(DEADLINE_S)
            store = foldlog.open(tmp_path / "a.log")
        try:
            at.run(partial(call, store))
        except FoldlogError:
            assert handler == "close"
        if handler != "close":
            goes_on(store)
    assert not any(isinstance(error, RequestTimeout) for error in refusals)
    store.close(DEADLINE_S)
    foldlog.open(tmp_path / "a.log").close()


@pytest.mark.parametrize("first", range(3))
def test_a_close_that_was_interrupted_can_be_called_again(tmp_path: Path, stride: int, first: int):
    for at in strikes(stride // 2, first=first + 1):
        store = foldlog.open(tmp_path / "a.log")
        store.put("k", b"%d" % at.number)
        try:
            at.run(partial(store.close, DEADLINE_S))
        except Struck:
            store.close(DEADLINE_S)
        with foldlog.open(tmp_path / "a.log") as store:
            assert store.get("k").value == b"%d" % at.number
            assert store.verify().ok


def test_an_open_that_was_interrupted_leaves_nothing_open(tmp_path: Path, stride: int):
    for at in strikes(stride):
        try:
            store = at.run(lambda: foldlog.open(tmp_path / "a.log"))
        except Struck:
            store = foldlog.open(tmp_path / "a.log")
        store.put("k", b"1")
        store.close(DEADLINE_S)
    assert foldlog_threads() == []


def foldlog_threads() -> list[threading.Thread]:
    for thread in threading.enumerate():
        if thread.name.startswith("foldlog"):
            thread.join(DEADLINE_S)
    return [thread for thread in threading.enumerate() if thread.name.startswith("foldlog")]


ENGINE_CALLS: dict[str, Callable[[Any], Any]] = {
    "apply": lambda snap: snap.apply(an_update(), cursor(next(NUMBERS))),
    "compact": lambda snap: (snap.apply(an_update(), cursor(next(NUMBERS))), snap.compact()),
    "sync": lambda snap: snap.sync(),
    "get": lambda snap: snap.get("k/1"),
    "range": lambda snap: snap.range(""),
    "verify": lambda snap: snap.verify(),
}


@pytest.mark.parametrize("name", ENGINE_CALLS)
def test_an_engine_outlives_an_exception_at_any_point_of_a_call(
    tmp_path: Path, backend: Backend, name: str, stride: int
):
    """An interrupt between a compaction's rename and its adoption made a false LogChangedError.

    RocksDB's engine took the exception for an error of RocksDB: it raised a FoldlogError instead,
    and refused to write from then on.
    """
    path = tmp_path / "a.log"
    _, snap = ENGINES[backend].open(path)
    snap.apply(an_update(), cursor(next(NUMBERS)))
    for at in strikes(stride // 3):
        with contextlib.suppress(Struck):
            at.run(lambda: ENGINE_CALLS[name](snap))
        position = cursor(next(NUMBERS))
        snap.apply([Put("after", b"%d" % at.number)], position)
        assert snap.get("after").value == b"%d" % at.number
    assert snap.verify().ok
    before = snap.range("")
    snap.close()
    at_end, snap = ENGINES[backend].open(path)
    assert (at_end, snap.range("")) == (position, before)
    snap.close()


@pytest.mark.parametrize("first", range(2))
def test_an_engine_whose_close_was_interrupted_lets_go_of_its_lock(
    tmp_path: Path, backend: Backend, stride: int, first: int
):
    """It counted as closed, and the lock was never given back."""
    for at in strikes(stride // 3, first=first + 1):
        _, snap = ENGINES[backend].open(tmp_path / "a.log")
        snap.apply([Put("k", b"%d" % at.number)], cursor(at.number))
        try:
            at.run(snap.close)
        except Struck:
            snap.close()
        at_end, snap = ENGINES[backend].open(tmp_path / "a.log")
        assert at_end == cursor(at.number)
        assert snap.verify().ok  # it was sealed once
        snap.close()


def test_an_engine_whose_open_was_interrupted_lets_go_of_its_lock(
    tmp_path: Path, backend: Backend, stride: int
):
    """Once the exception is gone: a frame of its traceback may hold RocksDB's database."""
    for at in strikes(stride // 3):
        snap = None
        with contextlib.suppress(Struck):
            _, snap = at.run(lambda: ENGINES[backend].open(tmp_path / "a.log"))
        if snap is None:
            _, snap = ENGINES[backend].open(tmp_path / "a.log")
        snap.apply([Put("k", b"%d" % at.number)], cursor(at.number))
        snap.close()


def test_an_engine_refuses_a_call_within_a_call(tmp_path: Path, backend: Backend, stride: int):
    """Both calls to RocksDB's engine wrote a batch with the same sequence."""
    _, snap = ENGINES[backend].open(tmp_path / "a.log")
    outcomes: list[object] = []

    def act() -> None:
        try:
            outcomes.append(snap.apply(an_update(), cursor(next(NUMBERS))))
        except foldlog.ReentrantCall as error:
            outcomes.append(error)

    for at in strikes(stride // 3, act):
        at.run(lambda: snap.apply(an_update(), cursor(next(NUMBERS))))
    assert any(isinstance(outcome, foldlog.ReentrantCall) for outcome in outcomes)
    assert snap.verify().ok
    snap.close()


def test_a_watch_that_was_interrupted_goes_on_where_it_was(tmp_path: Path, stride: int):
    """The generator that made its events was dead then, and the watch over, without a word."""
    with foldlog.open(tmp_path / "a.log") as store:
        store.apply([Put(f"s/{n}", b"0") for n in range(5)], cursor(1))
        watch = store.watch()
        state: dict[str, bytes] = {}
        for at in strikes(stride // 3):
            store.put("k", b"%d" % at.number)
            events: list[Any] = []
            with contextlib.suppress(Struck):
                at.run(partial(read_some, watch, events))
            while (event := watch.next(0.0)) is not None:
                events.append(event)
            assert watch.ended is None
            for event in events:
                if isinstance(event, foldlog.Changed):
                    state[event.update.key] = event.update.value
        assert state["k"] == store.get("k").value
        assert len(state) == 6


@pytest.mark.append_log("it is followed")
def test_a_follower_outlives_an_exception_at_any_point_of_a_wait(tmp_path: Path, stride: int):
    with foldlog.open(tmp_path / "a.log") as store, foldlog.follow(tmp_path / "a.log") as follower:
        position = 1
        for at in strikes(stride):
            with contextlib.suppress(Struck, RequestTimeout):
                at.run(lambda: follower.wait_for(cursor(2**40), 0.005))
            position += 1
            store.apply(an_update(), cursor(position))
            follower.wait_for(cursor(position), DEADLINE_S)


@pytest.mark.append_log("it is followed")
def test_a_follow_or_its_close_that_was_interrupted_leaves_nothing(tmp_path: Path, stride: int):
    foldlog.open(tmp_path / "a.log").close()
    for number in points(stride):
        at = At(number, strike)
        try:
            follower = at.run(lambda: foldlog.follow(tmp_path / "a.log"))
        except Struck:
            continue
        closing = At(number, strike)
        try:
            closing.run(follower.close)
        except Struck:
            follower.close()
        assert follower.state is foldlog.FollowerState.CLOSED
        if not at.fired and not closing.fired:
            break
    assert foldlog_threads() == []


class Hears(pykka.ThreadingActor):
    """A subscriber."""

    use_daemon_thread = True

    def on_receive(self, message: Any) -> None:
        pass


def test_a_wait_that_was_interrupted_leaves_no_waiter(tmp_path: Path):
    """The writer looked after each batch whether it had come for one that waited no more."""
    with foldlog.open(tmp_path / "a.log") as store:
        for at in strikes():
            with contextlib.suppress(Struck, RequestTimeout):
                at.run(lambda: store.wait_for(seq=2**40, timeout_s=0.001))
            assert not store._feeds.wanted, at.number
    assert at.number > 50


def test_a_subscription_that_was_interrupted_is_taken_back(tmp_path: Path):
    """Nobody had a hold of it, and each batch was kept for it."""
    actor = Hears.start()
    with foldlog.open(tmp_path / "a.log") as store:
        for at in strikes():
            delivery = Delivery.__new__(Delivery)  # at hand, if the answer is lost
            with contextlib.suppress(Struck):
                at.run(partial(delivery.__init__, actor, store._feeds, store.snapshot, "", None))
            with contextlib.suppress(AttributeError):  # it was not made
                delivery.cancel()
            until(lambda: not store._feeds.wanted, f"taken back after point {at.number}")
    assert at.number > 50
    actor.stop()


def test_a_derived_state_whose_close_was_interrupted_can_be_closed_again(tmp_path: Path):
    """The second close did nothing, and its thread went on."""
    with foldlog.open(tmp_path / "a.log") as store:
        for at in strikes():
            derived = foldlog.derive(store, len, lambda count, _: count)
            try:
                at.run(derived.close)
            except Struck:
                derived.close()
            assert derived.ended is not None
            assert not store._feeds.wanted
    assert at.number > 10


@pytest.mark.filterwarnings("ignore:a foldlog store was dropped:ResourceWarning")
def test_a_mirror_that_was_interrupted_while_it_took_over_its_store_lets_go_of_the_lock(
    tmp_path: Path, backend: Backend
):
    """It took the store's finalizer away before it had its own: the log stayed locked."""
    path = tmp_path / "a.log"
    upstream = foldlog.upstreams.LogFile(tmp_path / "upstream.log")
    foldlog.mirror(path, upstream, backend=backend).close()  # imports what a link needs
    for at in itertools.takewhile(lambda at: at.number < 50, strikes(9)):
        store = foldlog.open(path, backend=backend)
        with contextlib.suppress(Struck):
            at.run(partial(foldlog.Mirror, store, upstream, LinkConfig())).close()
        del store
        gc.collect()
        foldlog.open(path, backend=backend).close()


def run_out_of_time() -> None:
    """What handlers of SIGALRM are often written to raise: it is an OSError, too."""
    raise TimeoutError


@pytest.mark.parametrize("name", ["apply", "put", "compact", "stats", "ask a reader", "reopen"])
def test_a_time_limit_that_raises_a_timeout_error_is_not_taken_for_the_systems(
    tmp_path: Path, backend: Backend, name: str
):
    """On RocksDB, one within the check of the directory counted as "is gone": the store had
    failed."""
    call = STORE_CALLS[name]
    with foldlog.open(tmp_path / "a.log", backend=backend) as store:
        for at in strikes(5, run_out_of_time):
            try:
                at.run(partial(call, store))
                assert not at.fired
            except TimeoutError as error:
                assert type(error) is TimeoutError  # noqa: PT017 - and not one of foldlog's
            goes_on(store)
        assert store.verify().ok
    assert at.number > 20


def check_given_up(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """A time limit that raises a TimeoutError in the first of the short waits for a thread."""
    wait_for = Bell.wait_for

    def interrupted(*_: object) -> bool:
        monkeypatch.setattr(Bell, "wait_for", wait_for)
        raise TimeoutError

    monkeypatch.setattr(Bell, "wait_for", interrupted)
    with pytest.raises(TimeoutError) as raised:
        call()
    assert type(raised.value) is TimeoutError


@pytest.mark.parametrize("opening", ["open", "mirror"])
def test_an_open_is_given_up_at_a_time_limit_that_raises_a_timeout_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opening: str
):
    """It was taken for the end of one of the waits that the wait for a thread consists of: the
    caller waited on."""
    path = tmp_path / "a.log"
    foldlog.open(path).close()
    upstream = foldlog.upstreams.LogFile(tmp_path / "upstream.log")
    calls = {"open": foldlog.open, "mirror": partial(foldlog.mirror, upstream=upstream)}
    check_given_up(partial(calls[opening], path), monkeypatch)  # type: ignore[operator]
    foldlog.open(path).close()


@pytest.mark.append_log("it is followed")
def test_a_follow_is_given_up_at_a_time_limit_that_raises_a_timeout_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As an open."""
    path = tmp_path / "a.log"
    foldlog.open(path).close()
    check_given_up(partial(foldlog.follow, path), monkeypatch)
    foldlog.open(path).close()
