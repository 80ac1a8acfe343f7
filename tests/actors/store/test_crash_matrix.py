"""Each actor dies at each of its steps, of every possible cause, once and for good, under load.

Whatever dies: every call ends, an answered batch is in the log and was applied once, a refused
batch is not there, and the state equals what a single thread replays.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future

import pykka
import pytest
from actor_kit import (
    ACTOR_STEPS,
    DEADLINE_S,
    FATAL,
    Ledger,
    assert_whole,
    batch,
    cursor,
    in_thread,
    nothing_pending,
    results,
    until,
)

from foldlog import Apply, FoldlogError, Get, Range, RequestTimeout, State

ON_EACH_ENGINE = True

pytestmark = pytest.mark.exhaustive

ROUNDS = 6
FIRST = {
    "writer.start": "writer.before_write",
    "maintenance.start": "export.write",
    "reader.start": "reader.handle",
    "syncer.start": "syncer.sync",
}
"""An actor starts again only after it died of something else."""


def load(store, ledger, folder):
    """Several threads use all of the store for a short while. Returns when every call has ended."""

    def apply():
        for _ in range(ROUNDS):
            number = ledger.number()
            if ledger.settle(
                number, lambda number=number: store.apply(batch(number), cursor(number), DEADLINE_S)
            ):
                with contextlib.suppress(FoldlogError):  # closed for good, perhaps
                    assert store.get(f"batch/{number:06}") is not None

    def apply_async():
        sent: list[tuple[int, Future[int]]] = []
        for _ in range(ROUNDS):
            number = ledger.number()
            try:
                sent.append((number, store.apply_async(batch(number), cursor(number), DEADLINE_S)))
            except FoldlogError as error:
                ledger.errors[number] = error
        for number, future in sent:
            ledger.settle(number, lambda future=future: future.result(DEADLINE_S))

    def ask():
        for _ in range(ROUNDS):
            number = ledger.number()
            message = Apply(batch(number), cursor(number))
            ledger.settle(
                number, lambda message=message: store.writer.ask(message, timeout=DEADLINE_S)
            )
            with contextlib.suppress(FoldlogError, pykka.ActorDeadError):
                store.reader.ask(Get("shared/0"), timeout=DEADLINE_S)
                assert (
                    len(
                        {
                            entry.value
                            for entry in store.reader.ask(Range("shared/"), timeout=DEADLINE_S)
                        }
                    )
                    <= 1
                )

    def write_locally():
        for number in range(ROUNDS):
            key, value = f"local/{number}", b"%d" % number
            write = store.create if number % 2 else store.put
            ledger.settle_local(
                key,
                value,
                lambda key=key, value=value, write=write: write(key, value, timeout_s=DEADLINE_S),
            )

    def rewrite():
        for number in range(2):
            for job in (
                store.compact,
                lambda timeout_s, number=number: store.export_to(
                    folder / f"artifact-{number}", timeout_s
                ),
            ):
                try:
                    job(timeout_s=DEADLINE_S)
                except RequestTimeout as error:
                    raise AssertionError(f"{job} was never answered") from error
                except (FoldlogError, OSError):
                    pass

    results([in_thread(work) for work in (apply, apply_async, ask, write_locally, rewrite)])


def close(store):
    try:
        store.close(DEADLINE_S)
    except RequestTimeout as error:
        raise AssertionError("the store did not close") from error
    except (FoldlogError, *FATAL):
        pass  # what the last actor died of
    assert store.state is State.CLOSED
    nothing_pending(store)


def crash_under_load(store, steps, folder, step, error, times):
    """Let a step crash while the store is in use. Returns the crash, and how each call ended."""
    crash, ledger = steps.crash(step, error, times), Ledger()
    if step in FIRST:
        steps.crash(FIRST[step], error)
    load(store, ledger, folder)
    if step in ("syncer.start", "syncer.sync"):
        # What came before may have been synced by a compaction.
        ledger.settle_local(
            "local/for the syncer", b"", lambda: store.put("local/for the syncer", b"")
        )
    if not step.endswith(".stop"):
        assert crash.happened.wait(DEADLINE_S)
    return crash, ledger


@pytest.mark.parametrize("error", FATAL, ids=lambda error: error.__name__)
@pytest.mark.parametrize("step", ACTOR_STEPS)
def test_an_actor_that_dies_once_loses_nothing_that_was_answered(
    open_store, steps, path, tmp_path, step, error
):
    store = open_store(sync_interval_s=0.02)
    crash, ledger = crash_under_load(store, steps, tmp_path, step, error, times=1)
    assert not ledger.errors, "a batch that harms once is tried again"
    assert not ledger.local_errors
    until(lambda: store.state is State.RUNNING, "the store runs")
    assert_whole(store.snapshot())
    close(store)
    assert crash.fired == 1
    truth = ledger.check(path)
    assert len(ledger.answered) == 3 * ROUNDS
    assert truth.seq == 3 * ROUNDS + len(ledger.local)
    assert len(ledger.local) >= ROUNDS


@pytest.mark.parametrize(
    ("step", "error"),
    [*zip(ACTOR_STEPS, FATAL * 6, strict=False)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_an_actor_that_dies_for_good_leaves_every_call_answered_and_the_log_whole(
    open_store, steps, path, tmp_path, step, error
):
    store = open_store(sync_interval_s=0.02, max_restarts=2)
    crash, ledger = crash_under_load(store, steps, tmp_path, step, error, times=None)
    assert_whole(store.snapshot())
    close(store)
    assert crash.fired
    ledger.check(path)
