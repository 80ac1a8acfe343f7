"""What a program's own code raises in an actor's turn is the program's failure, not the store's.

It was taken for a fault of the disk, or of the actor: restarts, replays, a store FAILED for good.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pykka
import pytest
from actor_kit import DEADLINE_S, batch, cursor, in_thread, until
from pykka._envelope import Envelope

import foldlog
from foldlog import Get, Put, Range, State
from foldlog.actors.base.answers import Answer
from foldlog.protocol.messages import Export

Open = Callable[..., foldlog.Store]


class Own(BaseException):
    """A program's own."""


Raises = Callable[[], BaseException]
RAISED: dict[str, Raises] = {
    "a full disk": lambda: OSError(errno.ENOSPC, "no space left on device"),
    "no memory": lambda: MemoryError("injected"),
    "an interrupt": KeyboardInterrupt,
    "an exit": SystemExit,
    "a generator's exit": GeneratorExit,
    "a class of its own": Own,
}


@pytest.fixture(params=RAISED)
def error(request: pytest.FixtureRequest) -> Raises:
    return RAISED[request.param]


@pytest.fixture
def store(open_store: Open) -> Iterator[foldlog.Store]:
    """Checked after the test: nothing was restarted or poisoned, and it writes on."""
    store = open_store()
    yield store
    store.apply(batch(9), cursor(9))
    assert store.state is State.RUNNING
    assert store.stats().restarts == ()
    assert store.verify().ok


class Text(str):
    """A str of the program's, whose methods raise once it is armed."""

    error: Raises | None = None

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error()

    def __hash__(self) -> int:
        self._raise()
        return str.__hash__(self)

    def __eq__(self, other: object) -> bool:
        self._raise()
        return str.__eq__(self, other)

    def __len__(self) -> int:
        self._raise()
        return str.__len__(self)


def test_the_text_of_a_watchs_prefix_runs_in_no_turn_of_the_writer(
    store: foldlog.Store, error: Raises
):
    prefix = Text("shared/")
    watch = store.watch(prefix)
    watch.next(0.0)
    while watch.next(0.0) is not None:
        pass
    watch.next(0.01)  # it sleeps, and is to be woken
    prefix.error = error
    store.apply(batch(1), cursor(1))
    store.apply(batch(2), cursor(2))
    prefix.error = None
    assert watch.next(DEADLINE_S) is not None
    watch.close()


def test_the_text_of_a_message_runs_in_no_turn_of_a_reader(store: foldlog.Store, error: Raises):
    store.apply([Put("k", b"1")], cursor(1))
    for message in (Get(Text("k")), Range(Text("k"))):
        message[0].error = error
        answer = store.reader.ask(message, timeout=DEADLINE_S)
        assert answer == store.reader.ask(type(message)("k"), timeout=DEADLINE_S)


def test_the_path_of_an_export_runs_in_no_turn_of_maintenance(
    store: foldlog.Store, error: Raises, tmp_path: Path
):
    class Dest:
        def __fspath__(self) -> str:
            raise error()

    message: Any = Export(Dest())  # type: ignore[arg-type]
    with pytest.raises(type(error())):
        store.writer.ask(message, timeout=DEADLINE_S)
    dest = Text(tmp_path / "artifact")
    dest.error = error
    store.writer.ask(Export(dest), timeout=DEADLINE_S)
    assert (tmp_path / "artifact").is_dir()


class Future(pykka.ThreadingFuture[Any]):
    """A future of the program's, which fails when it is set."""

    def __init__(self, error: Raises) -> None:
        super().__init__()
        self.error, self.was_set = error, False

    def set(self, value: Any = None) -> None:
        self.was_set = True
        raise self.error()

    def set_exception(self, exc_info: Any = None) -> None:
        self.set()


def test_a_future_of_the_programs_that_fails_harms_no_actor(store: foldlog.Store, error: Raises):
    for ref, message in (
        (store.writer, foldlog.Apply([Put("k", b"1")], cursor(1))),
        (store.writer, "nonsense"),
        (store.reader, Range("k")),
        (store.reader, "nonsense"),
    ):
        future = Future(error)
        ref.actor_inbox.put(Envelope(message, reply_to=future))
        until(lambda: future.was_set, "it was set")  # noqa: B023


def test_each_callback_of_an_answer_is_called_whatever_another_raises(error: Raises):
    called: list[bool] = []

    def fail(_: object) -> None:
        raise error()

    answer: Answer[int] = Answer()
    answer.add_done_callback(fail)
    answer.add_done_callback(lambda _: called.append(True))
    answer.finish(1)
    until(lambda: called, "the second was called")


class Handler(logging.Handler):
    """A log handler of the program's that fails."""

    def __init__(self, error: Raises) -> None:
        super().__init__()
        self.error, self.lines = error, 0

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += 1
        raise self.error()


@pytest.fixture
def handler(error: Raises) -> Iterator[Handler]:
    handler, logger = Handler(error), logging.getLogger("foldlog")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_a_log_handler_that_fails_harms_no_thread_of_the_store(handler: Handler, open_store: Open):
    """The handler's disk was full: the supervisor died of it, and the store was FAILED for good."""
    crashes = iter(["writer.before_write"])

    def crash(step: str) -> None:
        if step == "writer.before_write" and next(crashes, None):
            raise RuntimeError("injected")

    store = open_store(step=crash)
    future = store.apply_async(batch(1), cursor(1), timeout_s=DEADLINE_S)
    assert future.result(DEADLINE_S) == 1

    def follow() -> None:
        with foldlog.follow(store.path) as follower:
            follower.wait_for(cursor(1), DEADLINE_S)

    in_thread(follow).result(DEADLINE_S)
    assert store.state is State.RUNNING
    assert [restart.actor for restart in store.stats().restarts] == ["writer"]
    store.close(DEADLINE_S)
    assert store.state is State.CLOSED
    assert handler.lines >= 3


def test_a_reference_of_the_programs_that_fails_ends_its_subscription_alone(
    store: foldlog.Store, error: Raises
):
    """The dispatcher gave up all subscriptions."""
    events: list[Any] = []

    class Listener(pykka.ThreadingActor):
        def on_receive(self, message: Any) -> None:
            events.append(message)

    class Ref:
        """Alive, until it raises."""

        def __init__(self, ref: pykka.ActorRef[Any]) -> None:
            self.ref, self.error = ref, None
            self.actor_inbox = ref.actor_inbox

        def is_alive(self) -> bool:
            if self.error is not None:
                raise self.error()
            return True

        def tell(self, message: Any) -> None:
            self.ref.tell(message)

    listener = Listener.start()
    try:
        bad = Ref(listener)
        failing = store.subscribe(bad)  # type: ignore[arg-type]
        well = store.subscribe(Listener.start())
        until(lambda: len(events) >= 2, "both are in step")
        bad.error = error  # type: ignore[assignment]
        assert failing.wait_ended(DEADLINE_S)
        assert type(error()).__name__ in (failing.ended or "")
        events.clear()
        store.apply([Put("k", b"1")], cursor(1))
        until(lambda: events, "the other one is served")
        assert well.ended is None
        well.cancel()
    finally:
        pykka.ActorRegistry.stop_all()
