"""Shared by the actors' tests: steps to crash or park at, failing files, ledgers of answers.

Nothing here sleeps. A test waits for an event or a future, with a deadline; `until` is the only
poll, and it is bounded.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pykka
import pytest

import foldlog
from foldlog import (
    AppendLogSnapshot,
    FoldlogError,
    Put,
    RequestTimeout,
    RocksDbSnapshot,
    StoreClosed,
    StoreFailed,
    VersionToken,
    WatchCursor,
)
from foldlog.actors.store.internal import CheckFile, Heal
from foldlog.testing import Call, FaultyFiles

DEADLINE_S = 60.0
"""For what takes milliseconds. Reached only where the product hangs."""

FATAL = [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit]
"""What an actor dies of: an Exception, and the three that are none."""

ACTOR_STEPS = [
    "writer.start",
    "writer.before_write",
    "writer.after_write",
    "writer.after_publish",
    "writer.stop",
    "compact.begin",
    "compact.write",
    "compact.written",
    "compact.finish",
    "compact.finished",
    "export.begin",
    "export.write",
    "export.written",
    "maintenance.start",
    "maintenance.stop",
    "reader.start",
    "reader.handle",
    "reader.stop",
    "syncer.start",
    "syncer.sync",
    "syncer.stop",
]
"""All steps but `writer.heal`, which needs a file system that fails."""


class Gate:
    """A place where an actor waits until the test lets it go on."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def wait_until_reached(self) -> None:
        assert self.reached.wait(DEADLINE_S), "no actor came to the gate"

    def open(self) -> None:
        self.opened.set()


class Crash:
    """A step that raises: so many times, or for good (None)."""

    def __init__(self, error: type[BaseException], times: int | None) -> None:
        self.error, self.times = error, times
        self.fired = 0
        self.happened = threading.Event()


class Steps:
    """The `step` of a store under test."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gates: dict[str, list[Gate]] = {}
        self._crashes: dict[str, list[Crash]] = {}
        self._reached: list[Gate] = []
        self.seen: Counter[str] = Counter()

    def park(self, name: str) -> Gate:
        """The next actor to reach the step waits there. After the gate it crashes, if so asked."""
        gate = Gate()
        with self._lock:
            self._gates.setdefault(name, []).append(gate)
        return gate

    def parked(
        self, name: str, start: Callable[..., Any], *arguments: Any, **options: Any
    ) -> tuple[Gate, Any]:
        """Start something, and wait until it has parked an actor at the step. Returns the gate and
        what `start` gave."""
        gate = self.park(name)
        started = start(*arguments, **options)
        gate.wait_until_reached()
        return gate, started

    def crash(
        self, name: str, error: type[BaseException] = RuntimeError, times: int | None = 1
    ) -> Crash:
        crash = Crash(error, times)
        with self._lock:
            self._crashes.setdefault(name, []).append(crash)
        return crash

    def mend(self) -> None:
        """No step crashes any more, and every gate is open."""
        with self._lock:
            self._crashes.clear()
            gates = [
                *self._reached,
                *(gate for waiting in self._gates.values() for gate in waiting),
            ]
            self._gates.clear()
        for gate in gates:
            gate.open()

    def __call__(self, name: str) -> None:
        with self._lock:
            self.seen[name] += 1
            gate = self._gates[name].pop(0) if self._gates.get(name) else None
            if gate is not None:
                self._reached.append(gate)
        if gate is not None:
            gate.reached.set()
            assert gate.opened.wait(3 * DEADLINE_S), f"the gate at {name} was never opened"
        with self._lock:
            crash = next(
                (
                    crash
                    for crash in self._crashes.get(name, [])
                    if crash.times is None or crash.fired < crash.times
                ),
                None,
            )
            if crash is not None:
                crash.fired += 1
        if crash is not None:
            crash.happened.set()
            raise crash.error(f"injected at {name}")


class FailingFiles(FaultyFiles):
    """Files whose chosen operations fail on paths with a given part."""

    def __init__(self) -> None:
        super().__init__(hook=self._fail_if_chosen)
        self._chosen: list[list[Any]] = []
        self.failed: Counter[str] = Counter()
        self.happened = threading.Event()

    def fail(
        self, operation: str, error: int = errno.EIO, times: int | None = 1, part: str = "state.log"
    ) -> None:
        """Fail the operation's next `times` calls (None: all) on files named with `part`."""
        self._chosen.append([operation, error, times, part])

    def mend(self) -> None:
        self._chosen.clear()

    def _fail_if_chosen(self, call: Call) -> None:
        for chosen in self._chosen:
            operation, error, times, part = chosen
            if operation != call.operation or times == 0:
                continue
            target = call.args[1] if operation == "replace" else call.args[0]
            name = (
                os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            )
            if part in name and ".foldlog-" not in name:
                if times is not None:
                    chosen[2] = times - 1
                self.failed[operation] += 1
                self.happened.set()
                raise OSError(error, os.strerror(error))


def cursor(number: int) -> WatchCursor:
    return WatchCursor.from_u64(number)


def commit_group(
    store: foldlog.Store, steps: Steps, numbers: Iterable[int]
) -> tuple[Gate, list[Future[int]]]:
    """Park the writer with the first of these batches, while the others wait as one group. Returns
    the gate and the futures of all."""
    first, *others = numbers
    gate, future = steps.parked(
        "writer.before_write", store.apply_async, batch(first), cursor(first)
    )
    return gate, [future, *(store.apply_async(batch(n), cursor(n)) for n in others)]


def batch(number: int, keys: int = 4) -> list[Put]:
    """The batch `number`: its own mark, and one value under the `keys` keys all batches share."""
    value, token = b"%d" % number, VersionToken.from_u64(number)
    return [
        Put(f"batch/{number:06}", value, token),
        *(Put(f"shared/{key}", value, token) for key in range(keys)),
    ]


def assert_whole(snapshot: Any, keys: int = 4) -> int:
    """Check that a snapshot holds whole batches and the last cursor. Returns its number, or 0."""
    values = {entry.value for entry in snapshot.range("shared/")}
    assert len(values) <= 1, f"half a batch: {values}"
    if not values:
        assert snapshot.cursor().is_none
        return 0
    number = int(values.pop())
    assert snapshot.cursor() == cursor(number)
    assert len(snapshot.range("shared/")) == keys
    assert snapshot.get(f"batch/{number:06}").value == b"%d" % number
    return number


class Ledger:
    """What was asked of a store, and how each call ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self.answered: dict[int, int] = {}
        """Batch number -> the sequence that the store answered."""
        self.local: dict[str, tuple[bytes, bytes]] = {}
        """Key of an answered local write -> (value, version)."""
        self.errors: dict[int, BaseException] = {}
        """Batch number -> the error that its call ended with."""
        self.local_errors: dict[str, BaseException] = {}

    def number(self) -> int:
        with self._lock:
            self._last += 1
            return self._last

    def settle(self, number: int, wait: Callable[[], int]) -> bool:
        """Call `wait` for the answer to batch `number`; record its outcome. A hang fails."""
        try:
            seq = wait()
        except TimeoutError as error:
            if not isinstance(error, RequestTimeout):
                raise AssertionError(f"batch {number} was never answered") from None
            self.errors[number] = error
        except (FoldlogError, OSError, pykka.ActorDeadError) as error:
            self.errors[number] = error
        else:
            self.answered[number] = seq
            return True
        return False

    def settle_local(self, key: str, value: bytes, write: Callable[[], VersionToken]) -> bool:
        try:
            version = write()
        except (FoldlogError, OSError) as error:
            self.local_errors[key] = error
        else:
            self.local[key] = value, bytes(version)
            return True
        return False

    def check(self, path: Path) -> Truth:
        """Compare the log, read by one thread, with what was answered."""
        truth = read_back(path)
        marks = {
            int(key[6:]): entry for key, entry in truth.entries.items() if key.startswith("batch/")
        }
        locals_ = {key: entry for key, entry in truth.entries.items() if key.startswith("local/")}
        assert set(self.answered) <= set(marks), "answered, and not in the log"
        for number, error in self.errors.items():
            if not isinstance(error, (StoreFailed, StoreClosed, RequestTimeout)):
                assert number not in marks, (
                    f"batch {number} is in the log, though its caller was told {error!r}"
                )
        for number, entry in marks.items():
            assert entry.value == b"%d" % number
            assert bytes(entry.version) == bytes(VersionToken.from_u64(number))
        for key, answered in self.local.items():
            assert (locals_[key].value, bytes(locals_[key].version)) == answered
        for key, error in self.local_errors.items():
            if not isinstance(error, (StoreFailed, StoreClosed, RequestTimeout)):
                assert key not in locals_, (
                    f"{key} is in the log, though its caller was told {error!r}"
                )
        # Each batch has its own sequence, and each sequence a batch: nothing was applied twice.
        seqs = [
            *self.answered.values(),
            *(int.from_bytes(version, "big") for _, version in self.local.values()),
        ]
        assert len(set(seqs)) == len(seqs)
        assert truth.seq == len(marks) + len(locals_), "a batch was applied twice, or half"
        last = int(truth.entries["shared/0"].value) if "shared/0" in truth.entries else 0
        assert {
            entry.value for key, entry in truth.entries.items() if key.startswith("shared/")
        } <= {b"%d" % last}
        assert truth.cursor == (cursor(last) if last else WatchCursor.none())
        if self.answered and set(marks) == set(self.answered):
            assert last == max(self.answered, key=self.answered.__getitem__)
        return truth


class Truth(NamedTuple):
    """What a log says when one thread reads it."""

    seq: int
    cursor: WatchCursor
    entries: dict[str, foldlog.KvEntry]


def read_back(path: Path) -> Truth:
    """Replay the log with the engine: its lock must be free."""
    engine = RocksDbSnapshot if path.is_dir() else AppendLogSnapshot
    with engine.open(path)[1] as snap:
        return Truth(
            snap.snapshot().seq, snap.cursor(), {entry.key: entry for entry in snap.range("")}
        )


def until(holds: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll for what has no event to wait for. Returns what `holds` gave."""
    end = time.monotonic() + deadline_s
    pause = threading.Event()
    while not (found := holds()):
        assert time.monotonic() < end, f"not within {deadline_s} s: {what}"
        pause.wait(0.002)
    return found


def in_thread(run: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Run something in a thread of its own; its end, or its error, is the future's."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(run(*arguments))
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=work, name="test-worker", daemon=True)
    thread.start()
    return future


def results(futures: list[Future[Any]]) -> list[Any]:
    """The results of all, in DEADLINE_S together."""
    end = time.monotonic() + DEADLINE_S
    return [future.result(max(end - time.monotonic(), 0.01)) for future in futures]


def waiting(store: foldlog.Store) -> int:
    """How many messages wait for the writer, but for the syncer's, which come when they like."""
    mails = tuple(store._supervisor.writer.inbox.mails)
    return sum(not isinstance(mail.message, (CheckFile, Heal)) for mail in mails)


@contextlib.contextmanager
def impatient(store: foldlog.Store) -> Iterator[None]:
    """A writer that is busy counts as stuck almost at once. Not so before and after: on a busy
    machine, a write that nothing holds up takes longer than that."""
    patient = store._core.config
    store._core.config = replace(patient, stuck_after_s=0.05)
    try:
        yield
    finally:
        store._core.config = patient


def nothing_pending(store: foldlog.Store) -> None:
    """After close: no mailbox and no actor holds a message."""
    supervisor = store._supervisor
    for actor in (supervisor.writer, supervisor.maintenance, *supervisor.readers):
        assert len(actor.inbox) == 0, f"{actor.name} has mail"
        assert not [mail for mail in actor.taken if not done(mail)], (
            f"{actor.name} holds {actor.taken}"
        )


def done(mail: Any) -> bool:
    future = getattr(mail.message, "future", None)
    return future is None or future.done()


NO_FORK_WARNING = (
    "-W",
    "ignore:This process:DeprecationWarning",
)  # Python 3.12 says so of every fork beside a thread


def script(
    code: str, *arguments: object, timeout_s: float = DEADLINE_S
) -> subprocess.CompletedProcess[str]:
    """Run a script in its own process, with warnings as errors except those it is about.

    Its stores are on the engine that this process opens where no backend is named.
    """
    engine = foldlog.open.__kwdefaults__["backend"]
    code = textwrap.dedent(code)
    if engine != "append-log":
        code = f"import foldlog\nfoldlog.open.__kwdefaults__['backend'] = {engine!r}\n{code}"
    return subprocess.run(
        [sys.executable, *NO_FORK_WARNING, "-P", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def threads() -> list[threading.Thread]:
    """Threads of stores, tests and watchdog, except the one watchdog keeps for the process."""
    mine = ("foldlog-", "test-worker")
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith(mine)
        or ("watchdog" in type(thread).__module__ and type(thread).__name__ != "InotifyFD")
    ]


def descriptors(under: Path) -> list[str]:
    """The open files under a folder."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{fd}")
            if target.startswith(str(under)):
                found.append(target)
    return found


class _Slim(logging.Filter):
    """Keep errors as text: pytest keeps records, and frames would hold what the test released."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info:
            record.exc_text = logging.Formatter().formatException(
                record.exc_info  # type: ignore[arg-type]
            )
            record.exc_info = None
        record.msg, record.args = record.getMessage(), None
        return True


@contextlib.contextmanager
def logging_text_only() -> Iterator[None]:
    """What foldlog logs meanwhile is kept as text, without the errors and their frames."""
    slim = _Slim()
    logging.getLogger("foldlog").addFilter(slim)
    try:
        yield
    finally:
        logging.getLogger("foldlog").removeFilter(slim)


def none_open(under: Path) -> bool:
    """Whether no file under a folder is open, once what is unreachable has been collected."""
    gc.collect()
    return not descriptors(under)


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """No thread, no registered actor and no descriptor of a store outlives the test."""
    threads_before, actors_before = set(threads()), set(pykka.ActorRegistry.get_all())
    with logging_text_only():
        yield
    until(lambda: set(threads()) <= threads_before, f"the threads have ended: {threads()}")
    assert set(pykka.ActorRegistry.get_all()) <= actors_before
    until(lambda: none_open(tmp_path), "no file is open")


@pytest.fixture
def steps() -> Iterator[Steps]:
    steps = Steps()
    yield steps
    steps.mend()


@pytest.fixture
def files() -> FailingFiles:
    return FailingFiles()


@pytest.fixture
def open_store(
    nothing_left: None, path: Path, steps: Steps
) -> Iterator[Callable[..., foldlog.Store]]:
    """foldlog.open on the test's path, with its steps; closed behind the test, whatever it left."""
    stores: list[foldlog.Store] = []

    def open_store(**options: Any) -> foldlog.Store:
        options.setdefault("step", steps)
        store = foldlog.open(options.pop("path", path), **options)
        stores.append(store)
        return store

    yield open_store
    steps.mend()
    while stores:
        with contextlib.suppress(FoldlogError, OSError, RuntimeError):
            stores.pop().close(DEADLINE_S)
