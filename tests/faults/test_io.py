"""Every I/O call of every operation fails in turn, until the operation completes without a fault.

SQLite's tests loop the same way. After each fault: acknowledged data is there, nothing is half
there, the log verifies, no descriptor and no temporary file is left, and the store continues,
after `compact` where needed.
"""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from faultkit import (
    UNSYNCED,
    Model,
    batch,
    fail_every_call,
    fault_of,
    fold_of,
    run_with,
    view,
)
from logfiles import companions

from foldlog import AppendLogSnapshot, FoldlogError, LogPoisonedError, WatchCursor
from foldlog.protocol.updates import encode_batch
from foldlog.storage.repair.verify import verify_log
from foldlog.testing import Fault, FaultyFiles

pytestmark = pytest.mark.exhaustive

STOOD_BEFORE = [1, 2, 3, 4]


class Bench:
    """A log of four batches, two of them in the base, in its own directory, with an artifact."""

    def __init__(self, template: Path, folder: Path, *, sync: str) -> None:
        shutil.copytree(template, folder)
        self.sync = sync
        self.path = folder / "log" / "state.log"
        self.artifact = folder / "artifact"
        self.dest = folder / "made" / "dest"
        self.dest.parent.mkdir()
        self.files = FaultyFiles(inner=UNSYNCED)
        self.model = Model(STOOD_BEFORE)
        self.snap: AppendLogSnapshot | None = None

    def open(self) -> None:
        _, self.snap = AppendLogSnapshot.open(
            self.path,
            files=self.files,
            sync=self.sync,  # type: ignore[arg-type]
        )

    @property
    def opened(self) -> AppendLogSnapshot:
        assert self.snap is not None
        return self.snap

    def apply_group(self, numbers: tuple[int, ...]) -> None:
        self.opened._engine.commit(
            [encode_batch(batch(number), WatchCursor.from_u64(number)) for number in numbers]
        )


class Operation(NamedTuple):
    """Something to do while calls fail."""

    name: str
    run: Callable[[Bench], None]
    opened: bool = True
    """The log is open when it begins."""
    written: bool = True
    """And has been appended to."""


def import_there(bench: Bench) -> None:
    _, snap = AppendLogSnapshot.import_artifact(bench.artifact, bench.dest, files=bench.files)
    snap.close()


OPERATIONS = [
    Operation("open", Bench.open, opened=False),
    Operation(
        "the first apply",
        lambda bench: bench.model.apply(bench.opened, 6, durable=True),
        written=False,
    ),
    Operation("apply", lambda bench: bench.model.apply(bench.opened, 6, durable=True)),
    Operation("commit a group", lambda bench: bench.model.apply(bench, 6, 7, 8, durable=True)),
    Operation("sync", lambda bench: bench.opened.sync()),
    Operation("compact", lambda bench: bench.opened.compact()),
    Operation("export", lambda bench: bench.opened.export_to(bench.dest) and None),
    Operation("import", import_there, opened=False),
    Operation("verify", lambda bench: bench.opened.verify() and None),
    Operation("close", lambda bench: bench.opened.close()),
]
KINDS: dict[str, Callable[[int], Fault]] = {
    "EIO once": lambda nth: Fault(nth=nth, error=errno.EIO),
    "EIO for good": lambda nth: Fault(nth=nth, error=errno.EIO, lasting=True),
    "ENOSPC once": lambda nth: Fault(nth=nth, error=errno.ENOSPC),
    "ENOSPC for good": lambda nth: Fault(nth=nth, error=errno.ENOSPC, lasting=True),
    "7 bytes and ENOSPC": lambda nth: Fault("write", nth, errno.ENOSPC, takes=7),
    "7 bytes and EIO for good": lambda nth: Fault("write", nth, errno.EIO, takes=7, lasting=True),
    "7 bytes and no error": lambda nth: Fault("write", nth, 0, takes=7),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    folder.joinpath("log").mkdir()
    _, snap = AppendLogSnapshot.open(folder / "log" / "state.log")
    for number in STOOD_BEFORE:
        snap.apply(batch(number), WatchCursor.from_u64(number))
        if number == 2:
            snap.compact()
    snap.export_to(folder / "artifact")
    snap.close()
    return folder


def go_on(bench: Bench) -> None:
    """The disk works again: acknowledged data is there; writes work, perhaps after `compact`."""
    snap = bench.opened
    assert view(snap) == fold_of(bench.model.acked), (
        "a batch that was not acknowledged shows, or one that was does not"
    )
    assert snap.verify().problems == ()
    try:
        snap.apply(batch(9), WatchCursor.from_u64(9))
    except LogPoisonedError:
        snap.compact()
        snap.apply(batch(9), WatchCursor.from_u64(9))
    bench.model.acked.append(9)
    bench.model.all_durable()
    assert snap.verify().problems == ()
    snap.close()


def one_fault(bench: Bench, operation: Operation, fault: Fault) -> bool:
    """Run the operation with a fault in it; check everything. Returns True if it fired."""
    if operation.opened:
        bench.open()
        if operation.written:
            bench.model.apply(bench.snap, 5, durable=True)
    fired, failed = run_with(fault, bench.files, lambda: operation.run(bench))
    what = f"{operation.name} with {fault}, which hit {fired[:1]}"
    if not fired:
        assert failed is None, what
    try:
        if bench.snap is not None and operation.name != "close":
            go_on(bench)
        elif bench.snap is not None:
            bench.snap.close()
        wrong = fault_of(bench.path, bench.model.in_process())
        assert not wrong
        check_what_was_made(bench, operation, complete=failed is None)
    except (AssertionError, OSError, FoldlogError) as error:
        raise AssertionError(f"{what}: {error}") from error
    return bool(fired)


def check_what_was_made(bench: Bench, operation: Operation, *, complete: bool) -> None:
    """An export or an import is whole or absent."""
    left = [
        file.name
        for file in bench.dest.parent.iterdir()
        if file.name not in ("dest", *companions(bench.dest))
    ]
    assert not left or set(left) <= {f"dest.torn-{n}-1" for n in range(9)} or not complete, left
    if not bench.dest.exists():
        assert not complete or operation.name not in ("export", "import")
        return
    expected = [*STOOD_BEFORE, 5] if operation.name == "export" else STOOD_BEFORE
    if operation.name == "export":
        copy = bench.dest.with_name("copy")
        AppendLogSnapshot.import_artifact(bench.dest, copy, files=UNSYNCED)[1].close()
    else:
        copy = bench.dest
    with AppendLogSnapshot.open(copy, files=UNSYNCED)[1] as snap:
        assert view(snap) == fold_of(expected)
    assert verify_log(copy).ok


QUICK = [
    ("EIO once", "never"),
    ("ENOSPC for good", "always"),
    ("7 bytes and ENOSPC", "never"),
    ("7 bytes and no error", "always"),
]
WAYS = [
    pytest.param(*way, marks=[] if way in QUICK else pytest.mark.slow)
    for way in itertools.product(KINDS, ("never", "always"))
]


@pytest.mark.parametrize(("kind", "sync"), WAYS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_call_of_an_operation_may_fail(template, folder, operation, kind, sync):
    def attempt(own: Path, nth: int) -> bool:
        return one_fault(Bench(template, own, sync=sync), operation, KINDS[kind](nth))

    faults = fail_every_call(folder, operation.name, attempt)
    if kind.startswith("7 bytes"):
        assert faults or operation.name in ("sync", "verify", "close", "open")
    else:
        assert faults or operation.name == "verify"
    print(f"{faults} faults injected: {kind}, {operation.name}, sync={sync}")
