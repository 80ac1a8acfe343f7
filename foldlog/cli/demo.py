"""The command `demo`: what foldlog is for, shown on real data in a few seconds.

Threads read at full speed while a feeder applies the history of the Unicode database. Meanwhile the
writer crashes three times, the log is compacted and exported, and a follower in another process
keeps up. At the end, everything is compared with a plain dict that received the same changes.
"""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import logging
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from foldlog.cli.show import counted, printable, size_text, token_text, value_text
from foldlog.cli.stream import Batcher, Change, read_changes
from foldlog.cli.unicode import ALL_CODE_POINTS, History, Model, differences
from foldlog.follow import follow
from foldlog.protocol.updates import KvEntry, Put
from foldlog.storage.artifacts.artifact import import_artifact
from foldlog.storage.engines.append_log import AppendLogSnapshot
from foldlog.storage.fold.collector import no_full_collections
from foldlog.storage.readable import Reads
from foldlog.store import Store
from foldlog.store import open as open_store

READERS = 3
BATCH = 500
"""Changes in a batch; a 60th of all changes, if that is less."""
READ_FOR_S = 12.0
"""Readers stop after this, so that the demo ends in time even on a slow machine."""
SWITCH_S = 0.000_5
"""The interpreter's thread switch interval during the demo. With the default of 5 ms, the pauses
measured would show little else."""
CRASHES = ((0.2, "writer.before_write"), (0.5, "writer.after_write"), (0.8, "writer.after_publish"))
"""When the writer crashes, as a fraction of the changes, and at which step."""
COMPACT_AT, EXPORT_AT = 0.35, 0.65
SHOWN_KEYS = ("U+0041", "U+20AC", "U+FB50")
FOLLOWER_TIMEOUT_S = 20.0
FOLLOWER = "import sys; from foldlog.cli.demo import follow_along; follow_along(sys.argv[1])"


class Crashes:
    """The `step` of the demo's store. Kills the writer once at the step that is due."""

    def __init__(self) -> None:
        self.due: str | None = None
        self.done = 0

    def __call__(self, step: str) -> None:
        if step == self.due:
            self.due = None
            self.done += 1
            raise SystemExit(f"crashed at {step}, on purpose")


class ReaderThread(threading.Thread):
    """Reads at full speed, checks each answer against the history, and records its longest
    pause."""

    def __init__(
        self, store: Store, keys: Sequence[str], known: dict[str, set[tuple[bytes, bytes]]]
    ):
        super().__init__(name="demo-reader", daemon=True)
        self._store, self._keys, self._known = store, keys, known
        self.reads = self.wrong = 0
        self.longest_s = 0.0
        self.error: BaseException | None = None
        self.told_to_end = False

    def run(self) -> None:
        try:
            self._read()
        except BaseException as error:
            self.error = error

    def _read(self) -> None:
        get, known, clock = self._store.get, self._known, time.perf_counter
        ends = clock() + READ_FOR_S
        before = clock()
        while not self.told_to_end and before < ends:
            for key in self._keys:
                entry = get(key)
                now = clock()
                if now - before > self.longest_s:
                    self.longest_s = now - before
                before = now
                self.reads += 1
                if entry is not None and (entry.value, bytes(entry.version)) not in known[key]:
                    self.wrong += 1
                if self.told_to_end:
                    break


class Show:
    """The demo's output: on a terminal, a status line that is redrawn; in a pipe, one each second.
    Events get lines of their own."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        self._start = self._printed = time.monotonic()
        self._width = 0

    def event(self, text: str) -> None:
        """Print an event."""
        self._clear()
        click.echo(f"{time.monotonic() - self._start:6.1f} s  {text}")

    def progress(self, text: Callable[[], str]) -> None:
        """Show the status line if it is due; only then is `text` called."""
        now = time.monotonic()
        if now - self._printed < (0.1 if self._live else 1.0):
            return
        self._printed = now
        line = f"{now - self._start:6.1f} s  {text()}"[:79]
        if self._live:
            self._clear()
            click.echo(line, nl=False)
            self._width = len(line)
        else:
            click.echo(line)

    def _clear(self) -> None:
        if self._width:
            click.echo("\r" + " " * self._width + "\r", nl=False)
            self._width = 0


class Demo:
    """One run, in a directory of its own."""

    def __init__(self, directory: Path, code_points: Sequence[int]) -> None:
        self.log, self.copy = directory / "unicode.log", directory / "copy.log"
        self.artifact = directory / "artifact"
        for path in (self.log, self.copy, self.artifact):
            if path.exists():
                raise FileExistsError(errno.EEXIST, "the demo never overwrites", str(path))
        self.show, self.crashes = Show(), Crashes()
        with no_full_collections():  # they would take a fifth of the time
            self.history = History(code_points)
            self.batches = _batches(self.history.lines)
        gc.freeze()  # all of it stays
        self.applied = 0
        self._jobs: list[threading.Thread] = []
        self._job_errors: list[BaseException] = []

    def run(self) -> bool:
        """Run the demo. True if no reader stopped and nothing was wrong."""
        show, history = self.show, self.history
        show.event(f"{len(history.lines):,} changes to the Unicode database, in four steps:")
        for what, count in history.steps:
            click.echo(f"{'':10}{count:>9,}  {what}")
        with (
            _quiet(),
            open_store(self.log, step=self.crashes, sync="interval") as store,
            _follower(self.log) as follower,
        ):
            readers = self._start_readers(store)
            try:
                self._feed(store, readers)
            finally:
                for reader in readers:
                    reader.told_to_end = True
                for thread in (*readers, *self._jobs):
                    thread.join()
            followed = self._check_follower(store, follower)
            equal = self._check(store, "the store")
            self._show_some(store)
        equal = self._check_copy() and equal
        return self._verdict(readers, equal and followed)

    def _start_readers(self, store: Store) -> list[ReaderThread]:
        known: dict[str, set[tuple[bytes, bytes]]] = {}
        for batch in self.batches:
            for update in (change.update for change in batch):
                values = known.setdefault(update.key, set())
                if isinstance(update, Put):
                    values.add((update.value, bytes(update.version)))
        keys = list(known)
        readers = [ReaderThread(store, keys[n::READERS], known) for n in range(READERS)]
        for reader in readers:
            reader.start()
        self.show.event(
            f"{READERS} threads read at full speed; another process follows; feeding starts"
        )
        return readers

    def _feed(self, store: Store, readers: list[ReaderThread]) -> None:
        crashes = list(CRASHES)
        compacted = exported = False
        start = time.monotonic()
        for batch in self.batches:
            store.apply([change.update for change in batch], batch[-1].cursor)
            self.applied += len(batch)
            part = self.applied / len(self.history.lines)
            if crashes and part >= crashes[0][0]:
                self.crashes.due = crashes.pop(0)[1]
                self.show.event(f"the writer crashes ({self.crashes.due}) at {self._at(store)}")
            if not compacted and part >= COMPACT_AT:
                compacted = True
                self._beside("compacted", store.compact)
            if not exported and part >= EXPORT_AT:
                exported = True
                self._beside("exported", lambda: store.export_to(self.artifact))
            self.show.progress(lambda: self._rates(readers, time.monotonic() - start))
        self.show.event(f"all {self.applied:,} changes are applied, at {self._at(store)}")

    def _beside(self, what: str, job: Callable[[], object]) -> None:
        def run() -> None:
            start = time.monotonic()
            try:
                job()
            except BaseException as error:
                self._job_errors.append(error)
            else:
                self.show.event(f"{what} meanwhile, in {time.monotonic() - start:.2f} s")

        thread = threading.Thread(target=run, name=f"demo-{what}", daemon=True)
        thread.start()
        self._jobs.append(thread)

    def _rates(self, readers: list[ReaderThread], elapsed_s: float) -> str:
        reads = sum(reader.reads for reader in readers) / min(elapsed_s, READ_FOR_S)
        pause = max(reader.longest_s for reader in readers) * 1e3
        return (
            f"{reads:,.0f} reads/s  {self.applied / elapsed_s:,.0f} changes/s  "
            f"{counted(self.crashes.done, 'restart')}  longest pause {pause:.1f} ms"
        )

    def _at(self, store: Store) -> str:
        return f"cursor {token_text(store.cursor())}"

    def _check_follower(self, store: Store, follower: subprocess.Popen[str]) -> bool:
        seq = store.snapshot().seq
        answer = _ask(follower, seq)
        if answer.get("digest") != digest(store):
            click.echo(f"foldlog: the follower differs: {answer}", err=True)
            return False
        self.show.event(
            f"the follower has batch {answer['seq']:,} and the same {answer['entries']:,} entries"
        )
        return True

    def _check(self, fold: Store | AppendLogSnapshot, what: str) -> bool:
        return _equal(
            list(differences(fold.snapshot(), self.history.model)), self.history.model, what
        )

    def _check_copy(self) -> bool:
        """Import the artifact, made half-way, and apply the rest of the stream: the state must be
        the same."""
        import_artifact(self.artifact, self.copy)
        with AppendLogSnapshot.open(self.copy)[1] as copy:
            start = copy.cursor().as_u64() or 0
            for batch in self.batches:
                if batch[-1].cursor > copy.cursor():  # bytes of equal length, so they sort
                    copy.apply([change.update for change in batch], batch[-1].cursor)
            self.show.event(
                f"the export, imported at cursor {start} and fed the rest: "
                f"{size_text(self.copy.stat().st_size).split(' (')[0]}"
            )
            return self._check(copy, "the copy")

    def _show_some(self, store: Store) -> None:
        for key in SHOWN_KEYS:
            click.echo(f"{'':10}get {key:<9} {_shown(store.get(key))}"[:79])

    def _verdict(self, readers: list[ReaderThread], equal: bool) -> bool:
        reads = sum(reader.reads for reader in readers)
        wrong = sum(reader.wrong for reader in readers)
        stopped = [reader for reader in readers if reader.error is not None]
        pause_s = max(reader.longest_s for reader in readers)
        for failed in (*(reader.error for reader in stopped), *self._job_errors):
            click.echo(f"foldlog: {failed!r}", err=True)
        click.echo(
            f"{reads:,} reads, {len(stopped)} stopped, {wrong} wrong; longest pause "
            f"{pause_s * 1e3:.1f} ms; {self.crashes.done} crashes healed"
        )
        click.echo(
            "Try next: foldlog put x.log greeting hello; foldlog top x.log; docs/tutorial.md"
        )
        return equal and not stopped and not wrong and not self._job_errors


def _batches(lines: Sequence[bytes]) -> list[list[Change]]:
    batcher = Batcher(max(min(BATCH, len(lines) // 60), 1))
    changes = read_changes(lines, "the stream")
    batches = [batcher.push(change) for change in changes if change is not None]
    return [batch for batch in (*batches, batcher.rest()) if batch]


def run(directory: Path, code_points: Sequence[int] = ALL_CODE_POINTS) -> bool:
    """Run the demo in `directory`, and print its report. True if all went well. Cost: 5 to 15 s."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        return Demo(directory, code_points).run()
    finally:
        sys.setswitchinterval(before)


def digest(store: Reads) -> str:
    """A digest of all keys and values, in order."""
    total = hashlib.blake2b(digest_size=16)
    for key, value in store.items():
        total.update(key.encode() + b"\0" + value + b"\0")
    return total.hexdigest()


def follow_along(log: str) -> None:
    """The follower's process: reads a sequence from stdin, waits for it, and prints what it has."""
    with follow(log) as follower:
        print("following", flush=True)
        line = sys.stdin.readline()
        if line:
            follower.wait_for(seq=int(line), timeout_s=FOLLOWER_TIMEOUT_S)
            snapshot = follower.snapshot()
            answer = {"seq": snapshot.seq, "entries": len(snapshot), "digest": digest(follower)}
            print(json.dumps(answer), flush=True)


@contextmanager
def _follower(log: Path) -> Iterator[subprocess.Popen[str]]:
    command = (sys.executable, "-c", FOLLOWER, str(log))
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def _ask(follower: subprocess.Popen[str], seq: int) -> dict[str, Any]:
    try:
        out, _ = follower.communicate(f"{seq}\n", timeout=FOLLOWER_TIMEOUT_S + 5)
        answer: dict[str, Any] = json.loads(out)
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return {"error": repr(error)}
    return answer


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the supervisor's warnings about the deliberate crashes."""
    logger = logging.getLogger("foldlog")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _shown(entry: KvEntry | None) -> str:
    if entry is None:
        return "no entry"
    return f"{value_text(entry.value)}  (version {token_text(entry.version)})"


def _equal(wrong: list[str], model: Model, what: str) -> bool:
    if wrong:
        shown = ", ".join(map(printable, wrong[:5]))
        click.echo(
            f"foldlog: {what} and the dict differ in {counted(len(wrong), 'key')}: {shown}",
            err=True,
        )
        return False
    click.echo(f"{'':10}{what}: verified against a dict: {len(model):,} entries equal")
    return True


@click.command(epilog="Example: foldlog demo")
@click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    help="Work in this directory and keep the files, instead of in a temporary directory.",
)
def demo(directory: Path | None) -> None:
    """Show reads at full speed while a feeder applies, the writer crashes, and the log is compacted
    and exported.

    Uses the history of the Unicode character database, and a follower in another process. Takes up
    to 20 s. Exit code 1 if a reader stopped or read a wrong value, or if the log differs from a
    plain dict that received the same changes.
    """
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="foldlog-demo-") as temporary:
            well = run(Path(temporary))
    else:
        directory.mkdir(parents=True, exist_ok=True)
        well = run(directory)
    if not well:
        raise click.exceptions.Exit(1)


COMMANDS = (demo,)
