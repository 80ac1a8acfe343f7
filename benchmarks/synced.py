"""What a commit that waits for the disk costs, and how much of that is the growth of the file.

    python benchmarks/synced.py [--where DIRECTORY] [--rounds 20]

DIRECTORY must be on a disk: in a file system in memory a sync is free. The subjects take turns, 50
commits each, so that a busy machine disturbs all of them alike. Prints the lowest tenth and the
median of the times of single commits, and the commits per second of 1, 4 and 16 threads.

"growing" is a file that each write makes longer; "made longer", one whose next megabyte was
reserved beforehand. With "stat", the file is looked up under its name before each write, as foldlog
does to notice that another program changed it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from statistics import median

from harness import parser_of
from subjects import NEVER, PlyvelSynced, SqliteSynced, Subject

import foldlog
from foldlog import AppendLogSnapshot, Put, VersionToken, WatchCursor

AHEAD_BYTES = 1024 * 1024
FRAME_BYTES = 230
"""About what a batch of one update takes in the log."""
BURST = 50
THREADS = (1, 4, 16)
VALUE = os.urandom(100)
Commit = Callable[[int], object]


def raw(path: Path, sync: Callable[[int], None] | None, ahead: bool, look: bool) -> Iterator[None]:
    """Each step appends a frame and syncs it; `sync` None: with RWF_DSYNC, in one system call."""
    frame, fd = os.urandom(FRAME_BYTES), os.open(path, os.O_RDWR | os.O_CREAT)
    reserved = 0
    for number in count():
        offset = number * FRAME_BYTES
        if ahead and offset + FRAME_BYTES > reserved:
            reserved = offset + AHEAD_BYTES
            os.posix_fallocate(fd, offset, AHEAD_BYTES)
        if look:
            os.stat(path)
        if sync is None:
            os.pwritev(fd, [frame], offset, os.RWF_DSYNC)
        else:
            os.pwrite(fd, frame, offset)
            sync(fd)
        yield


def raw_commits(where: Path) -> dict[str, Commit]:
    """A file and a sync, nothing else."""
    commits: dict[str, Commit] = {}
    ways = {"fsync": os.fsync, "fdatasync": os.fdatasync, "RWF_DSYNC": None}
    for ahead, look in ((False, False), (False, True), (True, False), (True, True)):
        for name, sync in ways.items():
            title = f"{'made longer' if ahead else 'growing'}, {'stat, ' * look}{name}"
            steps = raw(where / title, sync, ahead, look)
            commits[title] = lambda _number, steps=steps: next(steps)
    return commits


def updates(number: int) -> tuple[list[Put], WatchCursor]:
    key = f"key-{number % 500:08d}"
    return [Put(key, VALUE, VersionToken.from_u64(number))], WatchCursor.from_u64(number)


def commits_of(subject: Subject) -> Commit:
    """A commit of a peer, through a connection of each thread's own."""
    mine = threading.local()

    def commit(number: int) -> object:
        if not hasattr(mine, "store"):
            mine.store = subject.for_thread()
        record = subject.record(f"key-{number % 500:08d}", VALUE, number)
        return mine.store.apply([record], subject.position(number))

    return commit


def burst(commit: Commit, start: int) -> list[float]:
    """The times of `BURST` commits in microseconds, without the first, which finds cold caches."""
    times = []
    for number in range(start, start + BURST):
        before = time.perf_counter()
        commit(number)
        times.append((time.perf_counter() - before) * 1e6)
    return times[1:]


def rate(commit: Commit, threads: int, seconds: float = 0.5) -> float:
    """Commits per second of so many threads, each waiting for its own."""
    stop = threading.Event()
    numbers = [0] * threads

    def run(first: int) -> None:
        while not stop.is_set():
            commit(first + threads * numbers[first])
            numbers[first] += 1

    workers = [threading.Thread(target=run, args=(first,)) for first in range(threads)]
    before = time.perf_counter()
    for worker in workers:
        worker.start()
    stop.wait(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(numbers) / (time.perf_counter() - before)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--where", type=Path, help="a directory on a disk")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.where)))
        singles = raw_commits(where)
        _, snap = AppendLogSnapshot.open(where / "engine.log", NEVER, sync="always")
        stack.callback(snap.close)
        singles["foldlog's engine"] = lambda number: snap.apply(*updates(number))
        store = foldlog.open(where / "store.log", sync="always", compact_threshold=NEVER)
        stack.callback(store.close)
        shared = {"foldlog's store": lambda number: store.apply(*updates(number))}
        shared["sqlite3, synchronous=FULL"] = commits_of(SqliteSynced(where / "sqlite"))
        with contextlib.suppress(ImportError):
            shared["plyvel, sync=True"] = commits_of(PlyvelSynced(where / "plyvel"))
        singles |= shared

        times: dict[str, list[float]] = {name: [] for name in singles}
        for number in range(options.rounds):
            for name, commit in singles.items():
                times[name] += burst(commit, number * BURST)
        print("| one thread, a commit | lowest tenth, µs | median, µs |\n|---|---:|---:|")
        for name, taken in times.items():
            print(f"| {name} | {sorted(taken)[len(taken) // 10]:.0f} | {median(taken):.0f} |")

        rates: dict[tuple[str, int], list[float]] = {}
        for _ in range(max(options.rounds // 4, 1)):
            for threads in THREADS:
                for name, commit in shared.items():
                    rates.setdefault((name, threads), []).append(rate(commit, threads))
        print("\n| commits/s, median | 1 thread | 4 threads | 16 threads |\n|---|---:|---:|---:|")
        for name in shared:
            cells = (f"{median(rates[name, threads]):,.0f}" for threads in THREADS)
            print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
