"""What watchers, subscribed actors and followers cost the writer, and what asking a reader costs.

    python benchmarks/watchers.py            2,000 of each: two minutes
    python benchmarks/watchers.py --quick    200 of each, shorter rounds: 20 seconds

Prints a Markdown table. The rates with and without are measured in turns, and their medians given:
compare them within one run. Each batch is one update of 100 bytes; nothing is synced.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pykka
from harness import Table, parser_of

import foldlog
from foldlog import Get, Put, Range

KEYS = 1000
WRITER = """
import sys, threading, foldlog
from foldlog import Put
store = foldlog.open(sys.argv[1], sync="never")
end = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), end.set()), daemon=True).start()
batches = [
    [Put(f"k{(i * 37 + j) % 100_000:06}", b"x" * 100) for j in range(10)] for i in range(1000)
]
number = 0
while not end.is_set():
    number += 1
    store.apply(batches[number % 1000], number)
store.close()
"""


class Listener(pykka.ThreadingActor):
    """Takes events, and does nothing with them."""

    use_daemon_thread = True

    def on_receive(self, message: Any) -> None:
        pass


def rate(store: foldlog.Store, seconds: float) -> float:
    """Batches applied per second, one after another."""
    batches = [[Put(f"k{number:04}", b"x" * 100)] for number in range(KEYS)]
    count = 0
    begun = time.perf_counter()
    while time.perf_counter() < begun + seconds:
        count += 1
        store.apply(batches[count % KEYS], count)
    return count / (time.perf_counter() - begun)


@contextlib.contextmanager
def nobody(_: foldlog.Store, __: int) -> Iterator[None]:
    yield


@contextlib.contextmanager
def idle(store: foldlog.Store, count: int) -> Iterator[None]:
    """Watches of everything that nobody reads."""
    watches = [store.watch() for _ in range(count)]
    yield
    for watch in watches:
        watch.close()


@contextlib.contextmanager
def sleeping(store: foldlog.Store, count: int) -> Iterator[None]:
    """Watches that threads wait on, of prefixes under which nothing changes."""
    watches = [store.watch(f"watch/{number}/") for number in range(count)]
    threads = [threading.Thread(target=list, args=(watch,), daemon=True) for watch in watches]
    for thread in threads:
        thread.start()
    time.sleep(1.0)  # until they sleep
    yield
    for watch in watches:
        watch.close()
    for thread in threads:
        thread.join()


def actors(prefix: str, per_actor: int) -> Callable[..., Any]:
    """Subscribed actors, of a prefix with their number in it; or of everything, if it is empty."""

    @contextlib.contextmanager
    def subscribed(store: foldlog.Store, count: int) -> Iterator[None]:
        refs = [Listener.start() for _ in range(count // per_actor)]
        deliveries = [
            store.subscribe(refs[number % len(refs)], prefix and f"{prefix}{number}/")
            for number in range(count)
        ]
        time.sleep(1.0)  # until they have their state
        yield
        for delivery in deliveries:
            delivery.cancel()
        for delivery in deliveries:
            delivery.wait_ended(60.0)
        for ref in refs:
            ref.stop()

    return subscribed


def compared(
    log: Path, who: Callable[..., Any], count: int, seconds: float, rounds: int
) -> tuple[float, float, int]:
    """Batches per second with nobody and with `who`, and the threads of the store with `who`."""
    without, beside = [], []
    threads = 0
    with foldlog.open(log, sync="never") as store:
        rate(store, 0.2)
        for _ in range(rounds):
            without.append(rate(store, seconds))
            with who(store, count):
                beside.append(rate(store, seconds))
                names = [thread.name for thread in threading.enumerate()]
                threads = sum(name.startswith("foldlog-") for name in names)
    return statistics.median(without), statistics.median(beside), threads


def ask_us(log: Path, message: Any, calls: int) -> float:
    """The best mean time of an `ask` to a reader, in us."""
    best = float("inf")
    with foldlog.open(log, sync="never") as store:
        store.apply([Put(f"k{number:04}", b"x" * 100) for number in range(KEYS)], 1)
        for _ in range(10):
            begun = time.perf_counter()
            for _ in range(calls):
                store.reader.ask(message)
            best = min(best, (time.perf_counter() - begun) / calls)
    return best * 1e6


def opening_s(log: Path, openings: int) -> tuple[float, float]:
    """The median and the longest time to open a follower beside a writer at full speed."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(log)], stdin=subprocess.PIPE)
    took = []
    try:
        while not log.exists() or log.stat().st_size < 1_000_000:
            time.sleep(0.01)
        for _ in range(openings):
            time.sleep(0.5)
            begun = time.perf_counter()
            foldlog.follow(log, timeout_s=60.0).close()
            took.append(time.perf_counter() - begun)
    finally:
        assert writer.stdin is not None
        writer.stdin.close()
        writer.wait(60)
    return statistics.median(took), max(took)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="200 of each, shorter rounds")
    quick = parser.parse_args().quick
    count, seconds, rounds = (200, 0.5, 2) if quick else (2000, 2.0, 3)
    table = Table()
    with tempfile.TemporaryDirectory() as folder:
        for what, who, goal in (
            ("nobody (the noise of this table)", nobody, ""),
            (f"{count:,} idle watches of everything", idle, ">= 18,000"),
            (f"{count:,} threads that sleep in watches of other prefixes", sleeping, ">= 18,000"),
            (f"{count:,} actors, each of its own prefix", actors("actor/", 1), ">= 18,000"),
            (f"{count:,} subscriptions of 1 in 20 as many actors, to all", actors("", 20), ""),
            (f"{count:,} actors, each of everything", actors("", 1), ">= 5,000"),
        ):
            log = Path(folder) / "state.log"
            without, beside, threads = compared(log, who, count, seconds, rounds)
            text = f"{without:,.0f} -> {beside:,.0f}, {threads} threads of the store"
            table.row(f"batches a second beside {what}", text, goal)
            log.unlink()
        calls = 200 if quick else 1000
        table.row("ask for a key", f"{ask_us(log, Get('k0500'), calls):.1f} us", "<= 45 us")
        table.row("ask for a range of 100", f"{ask_us(log, Range('k05'), calls):.1f} us")
        median, longest = opening_s(Path(folder) / "busy.log", 4 if quick else 12)
        what = "opening a follower beside a writer at full speed, median / longest"
        table.row(what, f"{median:.2f} / {longest:.2f} s", "<= 1 s")


if __name__ == "__main__":
    main()
