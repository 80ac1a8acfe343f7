"""The store with all its actors: each I/O call fails in turn; power is lost after each disk change.

Answered batches are there, refused ones are not, those in doubt are whole or absent; and no file
and no thread is left.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import pytest
from actor_kit import until
from faultkit import (
    UNSYNCED,
    CrashCampaign,
    batch,
    fail_every_call,
    fault_of,
    fold_of,
    quick_folder,
    run_with,
    view,
)

import foldlog
from foldlog import (
    AppendLogSnapshot,
    FoldlogError,
    RequestTimeout,
    State,
    Store,
    StoreFailed,
    WatchCursor,
)
from foldlog.storage.repair.verify import verify_log
from foldlog.testing import STEPS, Fault, FaultyFiles, crash_at

pytestmark = pytest.mark.exhaustive

STOOD_BEFORE = [1, 2, 3]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    logging.disable(
        logging.CRITICAL
    )  # or pytest keeps the tracebacks, and with them what their frames hold open
    try:
        with quick_folder(tmp_path) as quick:
            yield quick
    finally:
        logging.disable(logging.NOTSET)
    until(
        lambda: not any(thread.name.startswith("foldlog") for thread in threading.enumerate()),
        "its threads have ended",
    )


class Bench:
    """A store's log of three batches, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.path = folder / "state.log"
        self.dest = folder / "artifact"
        self.files = FaultyFiles(inner=UNSYNCED)
        self.acked = list(STOOD_BEFORE)
        self.unknown: list[int] = []
        self.store: Store | None = None
        with AppendLogSnapshot.open(self.path, files=UNSYNCED)[1] as snap:
            for number in STOOD_BEFORE:
                snap.apply(batch(number), WatchCursor.from_u64(number))

    def open(self) -> None:
        self.store = foldlog.open(
            self.path, files=self.files, sync="always", max_restarts=1, readers=1
        )

    @property
    def opened(self) -> Store:
        assert self.store is not None
        return self.store

    def answer(self, number: int, future: Future[int]) -> None:
        """Take note of what became of a batch."""
        try:
            future.result(60)
        except (StoreFailed, RequestTimeout):
            self.unknown.append(number)
        except (OSError, FoldlogError):
            return
        else:
            self.acked.append(number)

    def apply(self, *numbers: int) -> None:
        futures = [
            (n, self.opened.apply_async(batch(n), WatchCursor.from_u64(n), timeout_s=60))
            for n in numbers
        ]
        for number, future in futures:
            self.answer(number, future)

    def may_be(self) -> list[dict[str, bytes]]:
        """All that may be there: what is unknown came in its order, each whole or absent."""
        subsets = itertools.product((False, True), repeat=len(self.unknown))
        return [
            fold_of(sorted({*self.acked, *itertools.compress(self.unknown, chosen)}))
            for chosen in subsets
        ]


class Operation(NamedTuple):
    name: str
    run: Callable[[Bench], object]
    opened: bool = True


OPERATIONS = [
    Operation("open", Bench.open, opened=False),
    Operation("apply", lambda bench: bench.apply(5)),
    Operation("commit a group", lambda bench: bench.apply(5, 6, 7, 8)),
    Operation("compact", lambda bench: bench.opened.compact(20)),
    Operation("export", lambda bench: bench.opened.export_to(bench.dest, 60)),
    Operation("close", lambda bench: bench.opened.close()),
]
KINDS: dict[str, Callable[[int], Fault]] = {
    "EIO once": lambda nth: Fault(nth=nth),
    "ENOSPC for good": lambda nth: Fault(nth=nth, error=errno.ENOSPC, lasting=True),
    "9 bytes and ENOSPC": lambda nth: Fault("write", nth, errno.ENOSPC, takes=9),
}


def one_fault(bench: Bench, operation: Operation, fault: Fault) -> bool:
    """Run the operation with a fault, then all that must still work. True if the fault fired."""
    if operation.opened:
        bench.open()
        bench.apply(4)
    fired, failed = run_with(fault, bench.files, lambda: operation.run(bench))
    assert fired or failed is None
    store = bench.store
    if store is not None and operation.name != "close":
        for number in (
            9,
            10,
        ):  # twice: it may be in the midst of failing at what came before the disk worked again
            if store.state is State.FAILED:
                store.reopen(20)
            shown = view(store)
            assert shown in bench.may_be(), "what is shown was never promised"
            bench.acked = sorted({*bench.acked, *(n for n in bench.unknown if f"key{n}" in shown)})
            bench.unknown = []
            bench.apply(number)
        assert bench.acked[-1] == 10, "the store takes no more batches, though the disk works again"
        assert store.verify().problems == ()
    if store is not None:
        with (
            contextlib.suppress(OSError, FoldlogError)
            if operation.name == "close"
            else contextlib.nullcontext()
        ):
            store.close()
    wrong = fault_of(bench.path, bench.may_be())
    assert not wrong, wrong
    if bench.dest.exists():
        AppendLogSnapshot.import_artifact(bench.dest, bench.path.with_name("copy"), files=UNSYNCED)[
            1
        ].close()
        assert verify_log(bench.path.with_name("copy")).ok
    assert failed is not None or operation.name != "export" or bench.dest.exists()
    return bool(fired)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_call_of_a_stores_operation_may_fail(folder, operation, kind):
    def attempt(own: Path, nth: int) -> bool:
        bench = Bench(own)
        try:
            return one_fault(bench, operation, KINDS[kind](nth))
        except Exception as error:
            error.add_note(
                f"{operation.name}, {KINDS[kind](nth)}, which hit "
                f"{[call[:3] for call in bench.files.fired[:1]]}"
            )
            if bench.store is not None:
                bench.files.disarm()
                bench.store.close()
            raise

    faults = fail_every_call(folder, operation.name, attempt)
    assert faults >= 1
    print(f"{faults} faults injected: {kind}, {operation.name}, store")


def a_stores_life(campaign: CrashCampaign, step: Callable[[str], None] | None = None) -> None:
    """A store that promises each answer, in front of which the power may go at any change."""
    model = campaign.model
    store = foldlog.open(campaign.path, files=campaign.files, sync="always", readers=1, step=step)
    try:
        model.apply(store, 1, durable=True)
        model.in_doubt = [2, 3, 4]
        futures = [store.apply_async(batch(n), WatchCursor.from_u64(n)) for n in (2, 3, 4)]
        for future in futures:
            future.result(60)
        model.acked += [2, 3, 4]
        model.all_durable()
        with contextlib.suppress(FoldlogError):
            store.compact(20)
        model.apply(store, 5, durable=True)
        with contextlib.suppress(FoldlogError):
            store.export_to(campaign.work / "artifact", 60)
        model.apply(store, 6, durable=True)
    finally:
        store.close()
    campaign.look("at the end")


def test_a_power_loss_after_any_change_takes_nothing_from_a_store(folder):
    campaign = CrashCampaign(folder)
    a_stores_life(campaign)
    assert campaign.faults == []
    assert campaign.model.acked == [1, 2, 3, 4, 5, 6]
    print(f"a store's life: {campaign.crashes} crashes, {campaign.images} images")


CRASHES = [step for step in STEPS if step.split(".")[0] in ("writer", "compact", "export")]
CRASHES = [step for step in CRASHES if step not in ("writer.heal", "writer.stop")]


@pytest.mark.parametrize("step", CRASHES)
def test_a_power_loss_while_a_store_gets_over_a_crash_takes_nothing(folder, step):
    crash = crash_at(step, nth=2 if step.startswith("writer.") and step != "writer.start" else 1)
    if step == "writer.start":
        crash.nth = 2  # the first is the opening itself
    campaign = CrashCampaign(folder, limit=4)
    also = crash_at("writer.after_write")  # so that there is a second start

    def steps(name: str) -> None:
        crash(name)
        if step == "writer.start":
            also(name)

    a_stores_life(campaign, steps)
    assert crash.fired.is_set()
    assert campaign.faults == []
    assert campaign.model.acked == [1, 2, 3, 4, 5, 6]
    print(f"a crash at {step}: {campaign.crashes} crashes, {campaign.images} images")


def test_a_power_loss_while_a_store_heals_from_a_failed_fsync_takes_nothing(folder):
    campaign = CrashCampaign(folder)
    model = campaign.model
    store = foldlog.open(campaign.path, files=campaign.files, sync="always", readers=1)
    model.apply(store, 1, durable=True)
    campaign.files.arm(Fault("sync", 1))
    for number in (2, 3):
        model.apply(store, number, durable=True)
    assert campaign.files.fired
    store.close()
    campaign.look("at the end")
    assert campaign.faults == []
    assert model.acked == [1, 2, 3]


def test_the_campaign_misses_a_store_that_answers_before_it_has_synced(folder):
    def mutant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr("foldlog.storage.log.log.Log.sync", lambda self: None)

    campaign = CrashCampaign(folder, mutant=mutant)
    try:
        a_stores_life(campaign)
    finally:
        campaign.end()
    assert campaign.faults
