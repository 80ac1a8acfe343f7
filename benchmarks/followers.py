"""What followers cost: delay, memory, the writer's slowdown, and the time of a difference.

    python benchmarks/followers.py            1,000,000 entries, 8 followers: two minutes
    python benchmarks/followers.py --quick    100,000 entries, shorter rounds: 20 seconds

Prints a Markdown table. Followers run in their own processes. Compare only within one run; the two
rates of a slowdown are measured in turns.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Set
from pathlib import Path
from typing import NamedTuple

from harness import Table, parser_of, private_kb, rollup_kb

import foldlog
from foldlog import AppendLogSnapshot, Put, VersionToken, WatchCursor, diff

FOLLOWER = """
import os, sys, time
if sys.argv[2]:
    os.sched_setaffinity(0, set(map(int, sys.argv[2].split(","))))
import foldlog
follower = foldlog.follow(sys.argv[1])
print("open", flush=True)
for line in sys.stdin:
    command = line.split()
    if command[0] == "wait":  # print when each batch of a range is first seen
        first, last = int(command[1]), int(command[2])
        seen = []
        for number in range(first, last + 1):
            follower.wait_for(foldlog.WatchCursor.from_u64(number), 60)
            seen.append(time.clock_gettime(time.CLOCK_MONOTONIC))
        print(*seen, flush=True)
    elif command[0] == "reach":
        follower.wait_for(foldlog.WatchCursor.from_u64(int(command[1])), 60)
        print("there", flush=True)
"""


class Process:
    """A follower in its own process."""

    def __init__(self, log: Path, cpus: set[int]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", FOLLOWER, str(log), ",".join(map(str, cpus))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self.read() == "open"

    def ask(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextlib.contextmanager
def followers(log: Path, count: int, cpus: Set[int] = frozenset()) -> Iterator[list[Process]]:
    """`count` followers of a log, pinned to `cpus` if given, all open when the block starts."""
    processes: list[Process] = []
    try:
        processes.extend(Process(log, cpus) for _ in range(count))
        yield processes
    finally:
        for process in processes:
            process.close()


def fill(log: Path, entries: int) -> list[str]:
    """Create a compacted log of `entries` entries of 100 bytes. Returns the keys."""
    keys = [f"tenants/{number:08}/routes" for number in range(entries)]
    with AppendLogSnapshot.open(log)[1] as snap:
        for start in range(0, entries, 10_000):
            batch = [
                Put(key, (key * 5)[:100].encode(), VersionToken.from_u64(1))
                for key in keys[start : start + 10_000]
            ]
            snap.apply(batch, WatchCursor.from_u64(start + 1))
        snap.compact()
    return keys


def measure_delay(log: Path, keys: list[str], batches: int, pause_s: float) -> tuple[float, float]:
    """p50 and p99 in ms from the answer to an `apply` until a follower in another process sees
    it."""
    with foldlog.open(log) as store, followers(log, 1) as (follower,):
        first = (store.cursor().as_u64() or 0) + 1
        follower.ask(f"wait {first} {first + batches - 1}")
        answered = []
        for number in range(first, first + batches):
            time.sleep(pause_s * random.uniform(0.5, 1.5))
            store.apply([Put(random.choice(keys), b"x" * 100)], WatchCursor.from_u64(number))
            answered.append(time.clock_gettime(time.CLOCK_MONOTONIC))
        seen = [float(moment) for moment in follower.read().split()]
    delays = sorted((then - at) * 1e3 for at, then in zip(answered, seen, strict=True))
    return delays[len(delays) // 2], delays[len(delays) * 99 // 100]


def latency(store: foldlog.Store, keys: list[str], rate: int, seconds: float) -> float:
    """The median time of an `apply` of 10 updates in us, at a fixed rate per second."""
    number = store.cursor().as_u64() or 0
    begun = time.monotonic()
    took = []
    for turn in range(int(rate * seconds)):
        batch = [Put(key, b"x" * 100) for key in random.sample(keys, 10)]
        at = time.perf_counter()
        store.apply(batch, WatchCursor.from_u64(number + turn + 1))
        took.append(time.perf_counter() - at)
        time.sleep(max(begun + (turn + 1) / rate - time.monotonic(), 0.0))
    return statistics.median(took) * 1e6


def full_speed(store: foldlog.Store, keys: list[str], seconds: float) -> float:
    """Batches of 10 updates applied per second, one after another."""
    number = store.cursor().as_u64() or 0
    batches = [[Put(key, b"x" * 100) for key in random.sample(keys, 10)] for _ in range(100)]
    begun = time.monotonic()
    count = 0
    while time.monotonic() < begun + seconds:
        count += 1
        store.apply(batches[count % 100], WatchCursor.from_u64(number + count))
    return count / (time.monotonic() - begun)


class Pace(NamedTuple):
    """How fast the writer was."""

    apply_us: float
    """The median time of an apply in us, at 200 per second."""
    batches_per_s: float
    """Applies per second, one after another."""
    cpu_us: float
    """CPU time of the writer's process per apply, in us."""


def measure_pace(log: Path, keys: list[str], count: int, seconds: float, cpus: set[int]) -> Pace:
    """The writer's speed with `count` followers."""
    with (
        foldlog.open(log, compact_threshold=1 << 40) as store,
        followers(log, count, cpus) as processes,
    ):
        apply_us = latency(store, keys, 200, seconds)
        cpu, seq = time.process_time(), store.snapshot().seq
        batches_per_s = full_speed(store, keys, seconds)
        cpu_us = (time.process_time() - cpu) / (store.snapshot().seq - seq) * 1e6
        for process in processes:
            process.ask(f"reach {store.cursor().as_u64()}")
        for process in processes:
            assert process.read() == "there"
    with AppendLogSnapshot.open(log)[1] as snap:
        snap.compact()
    return Pace(apply_us, batches_per_s, cpu_us)


def measure_slowdown(
    log: Path, keys: list[str], count: int, seconds: float, rounds: int, own_core: bool
) -> list[tuple[float, float]]:
    """(without, with followers) for each figure: medians of the rounds. With `own_core`, no
    follower runs on the writer's core."""
    everywhere = os.sched_getaffinity(0)
    mine = {min(everywhere)} if own_core else everywhere
    os.sched_setaffinity(0, mine)
    try:
        rows = [
            (
                measure_pace(log, keys, 0, seconds, set()),
                measure_pace(log, keys, count, seconds, everywhere - mine or everywhere),
            )
            for _ in range(rounds)
        ]
    finally:
        os.sched_setaffinity(0, everywhere)
    alone, followed = zip(*rows, strict=True)
    return [
        (statistics.median(before), statistics.median(after))
        for before, after in zip(zip(*alone, strict=True), zip(*followed, strict=True), strict=True)
    ]


def measure_diff(log: Path, keys: list[str], compacted: bool) -> float:
    """The time of a difference with 1,000 random changes, in ms."""
    with AppendLogSnapshot.open(log)[1] as snap:
        old = snap.snapshot()
        number = (snap.cursor().as_u64() or 0) + 1
        changes = [Put(key, b"%d" % number) for key in random.sample(keys, 1000)]
        snap.apply(changes, WatchCursor.from_u64(number))
        if compacted:
            snap.compact()
        begun = time.perf_counter()
        assert len(list(diff(old, snap.snapshot()))) == 1000
        return (time.perf_counter() - begun) * 1e3


def measure_memory(table: Table, log: Path) -> None:
    for count in (1, 4, 8):
        with followers(log, count) as processes:
            private = [private_kb(process.pid) / 1024 for process in processes]
            share = sum(rollup_kb("Pss", pid=process.pid) for process in processes) / 1024
        text = f"{statistics.mean(private):.0f} MB each, {share:.0f} MB of shared memory in total"
        what = f"private memory of {count} follower{'s' if count > 1 else ''} after open"
        table.row(what, text, "<= 60 MB each")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="100,000 entries, and less of everything"
    )
    quick = parser.parse_args().quick
    entries = 100_000 if quick else 1_000_000
    random.seed(5)
    table = Table(f"{entries:,} entries of 100 bytes; ")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "state.log"
        keys = fill(log, entries)
        measure_memory(table, log)
        for pause_s in (0.02, 0.003):
            p50, p99 = measure_delay(log, keys, 300 if quick else 1000, pause_s)
            what = f"delay to a follower, a batch every {pause_s * 1e3:.0f} ms, p50 / p99"
            table.row(what, f"{p50:.2f} / {p99:.2f} ms", "p50 <= 5 ms")
        seconds, rounds = (1.0, 2) if quick else (2.0, 3)
        for own_core in (True, False):
            where = "with a core of its own" if own_core else "on shared cores"
            slow = measure_slowdown(log, keys, 8, seconds, rounds, own_core)
            (alone, followed), full, cpu = slow
            what = f"an apply of 10 updates, 200 a second, with 8 followers, {where}"
            text = f"{alone:.0f} -> {followed:.0f} us, {followed / alone - 1:+.0%}"
            table.row(what, text, "<= +10 %")
            what = f"applies of 10 updates at full speed, with 8 followers, {where}"
            text = f"{full[0]:,.0f} -> {full[1]:,.0f} a second, {full[1] / full[0] - 1:+.0%}"
            table.row(what, text, ">= -10 %")
            text = f"{cpu[0]:.0f} -> {cpu[1]:.0f} us, {cpu[1] / cpu[0] - 1:+.0%}"
            table.row(f"the writer's CPU time for each of these, {where}", text, "<= +10 %")
        for compacted, where in ((False, "on the same base"), (True, "across a compaction")):
            text = f"{measure_diff(log, keys, compacted):.0f} ms"
            table.row(f"difference of 1,000 changes, {where}", text)


if __name__ == "__main__":
    main()
