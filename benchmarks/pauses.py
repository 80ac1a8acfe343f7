"""How long reads and applies stall during writes at full speed, a compaction or an export.

    python benchmarks/pauses.py [--entries 1000000] [--seconds 5]

A reader thread calls `store.get` in a loop and records the time of each call, including the wait
for the interpreter lock; another applies batches. Then the same again, with the reader replaced by
a thread that only releases and reacquires the interpreter lock, and the switch interval set so that
others release it as soon as they can. That time is how long one C call held the lock. Prints a
Markdown table.
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from harness import parser_of

import foldlog
from foldlog import Put, Store, VersionToken, WatchCursor

BATCH = 100
GOALS_MS = {"get p99.9": 10.0, "apply max": 100.0}


def load(store: Store, entries: int, rng: random.Random) -> None:
    """Fill the store with `entries` entries of 100 bytes, and compact it."""
    for start in range(0, entries, 10_000):
        batch = [
            Put(f"key-{i:08d}", rng.randbytes(100), VersionToken.from_u64(i))
            for i in range(start, start + 10_000)
        ]
        store.apply(batch, WatchCursor.from_u64(start + 1))
    store.compact()


def random_keys(entries: int) -> list[str]:
    """200 keys, always the same."""
    choose = random.Random(3).randrange
    return [f"key-{choose(entries):08d}" for _ in range(200)]


class Timed(threading.Thread):
    """Records the time of each of its calls, in seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.times_s: list[float] = []
        self.stopping = False


class Reader(Timed):
    """Gets keys."""

    def __init__(self, store: Store, keys: list[str]) -> None:
        super().__init__()
        self._store, self._keys = store, keys

    def run(self) -> None:
        get, clock, note = self._store.get, time.perf_counter, self.times_s.append
        while not self.stopping:
            for key in self._keys:
                before = clock()
                get(key)
                note(clock() - before)
            time.sleep(0.0005)  # a realistic reader, and fewer than 10 million samples


class Holds(Timed):
    """Releases the interpreter lock, and reacquires it."""

    def run(self) -> None:
        usual = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            while not self.stopping:
                before = time.perf_counter()
                time.sleep(0)
                self.times_s.append(time.perf_counter() - before)
                time.sleep(0.0002)
        finally:
            sys.setswitchinterval(usual)


class Applier(Timed):
    """Applies batches of 100, at full speed or paced."""

    def __init__(self, store: Store, entries: int, pause_s: float) -> None:
        super().__init__()
        self._store, self._entries, self._pause_s = store, entries, pause_s

    def run(self) -> None:
        rng = random.Random(5)
        while not self.stopping:
            batch = [
                Put(f"key-{rng.randrange(self._entries):08d}", b"x" * 100) for _ in range(BATCH)
            ]
            before = time.perf_counter()
            self._store.apply(batch, WatchCursor.from_u64(7))
            self.times_s.append(time.perf_counter() - before)
            time.sleep(self._pause_s)


def measure(threads: list[Timed], work: Callable[[], None]) -> list[list[float]]:
    """The times recorded by each thread while `work` runs, sorted."""
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.stopping = True
        thread.join()
    return [sorted(thread.times_s) for thread in threads]


def row(name: str, times_s: list[float]) -> str:
    """A line of the table, in milliseconds."""
    if not times_s:
        return f"| {name} | - | - | - | - | 0 |"
    at = [
        times_s[min(int(len(times_s) * share), len(times_s) - 1)] * 1e3
        for share in (0.5, 0.99, 0.999, 1.0)
    ]
    return f"| {name} | " + " | ".join(f"{ms:.3f}" for ms in at) + f" | {len(times_s)} |"


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="foldlog-pauses-") as folder,
        foldlog.open(Path(folder) / "a.log", compact_threshold=1 << 40) as store,
    ):
        load(store, options.entries, random.Random(1))

        def compact() -> None:
            for start in range(0, options.entries, 10_000):  # touches every leaf
                keys = range(start, min(start + 10_000, options.entries), 100)
                store.apply([Put(f"key-{i:08d}", b"y" * 99) for i in keys], WatchCursor.from_u64(9))
            store.compact()

        def export() -> None:
            for number in range(3):
                store.export_to(Path(folder) / f"artifact-{number}-{time.monotonic_ns()}")

        cases: list[tuple[str, Callable[[], None], float | None]] = [
            ("nothing else", lambda: time.sleep(options.seconds), None),
            ("applies at full speed", lambda: time.sleep(options.seconds), 0.0),
            ("a compaction, 1 apply in 5 ms", compact, 0.005),
            ("three exports, 1 apply in 5 ms", export, 0.005),
        ]
        print(
            f"{options.entries} entries of 100 bytes; batches of {BATCH}; goals: {GOALS_MS} ms; "
            f"{sys.version.split()[0]}\n"
        )
        print("| while | p50 ms | p99 ms | p99.9 ms | max ms | calls |\n|---|---|---|---|---|---|")
        keys = random_keys(options.entries)
        for kind in ("get", "hold of the lock"):
            for name, work, pause_s in cases:
                threads: list[Timed] = [Reader(store, keys) if kind == "get" else Holds()]
                if pause_s is not None:
                    threads.append(Applier(store, options.entries, pause_s))
                noted, *applies = measure(threads, work)
                print(row(f"{kind}: {name}", noted), flush=True)
                for times_s in applies if kind == "get" else ():
                    print(row(f"apply: {name}", times_s), flush=True)


if __name__ == "__main__":
    main()
