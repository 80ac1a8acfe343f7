"""The measurements. Each runs in its own process, on a store of `entries` entries prepared before.

A case is a function of a `Trial`; it returns figures by name: seconds, MB or rates, as `FIGURES`
says. Files are in the page cache.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import workload
from harness import each, private_kb, timed
from subjects import (
    ENGINES,
    NEVER,
    READ_BY_MANY,
    THREADED,
    Diskcache,
    Foldlog,
    Store,
    StoreSynced,
    Subject,
)

PASS_LIMIT_S = 2.0
"""Writes, ranges and asks of a slow subject stop after this time; the figure is the mean of what
was done."""
LARGE = 1_000_000
"""With more entries than this, only some cases are run."""
KEYS = 1_000_000
"""A pass of gets reads all entries, or this many random ones if there are more."""
THREADS_S = 2.0


class Trial(NamedTuple):
    """One run of one case."""

    subject: type[Subject]
    entries: int
    prepared: Path
    """The directory with the prepared stores, which trials must not change."""
    scratch: Path
    """An empty directory for this trial alone."""
    seed: str

    @property
    def original(self) -> Path:
        return self.prepared / self.subject.name

    def copy(self, suffix: str = "") -> Path:
        """A copy of the prepared store, which the trial may change."""
        source = self.prepared / (self.subject.name + suffix)
        # In its own directory: foldlog keeps files next to a log.
        target = Path(tempfile.mkdtemp(dir=self.scratch)) / source.name
        # Not with shutil, which would fill the holes of a sparse file.
        subprocess.run(["cp", "-r", "--sparse=always", source, target], check=True)
        return target


class Case(NamedTuple):
    run: Callable[[Trial], dict[str, float]]
    subjects: tuple[type[Subject], ...] = ENGINES
    large: bool = False
    """Also run at more than 1,000,000 entries."""


def settle() -> None:
    """Exclude what the trial has built so far from garbage collection."""
    gc.collect()
    gc.freeze()


def private_mb() -> float:
    """Private memory of this process, in MB."""
    return private_kb() * 1024 / 1e6


def mean_s(call: Callable[[Any], Any], arguments: list[Any]) -> float:
    """The mean time of a call over all arguments, in seconds."""
    return timed(partial(each, call, arguments)) / len(arguments)


def limited_mean_s(call: Callable[[Any], Any], arguments: list[Any]) -> float:
    """The mean time of a call, over all arguments or until `PASS_LIMIT_S`, in seconds."""
    start, done = perf_counter(), 0
    for argument in arguments:
        call(argument)
        done += 1
        if perf_counter() - start > PASS_LIMIT_S:
            break
    return (perf_counter() - start) / done


# Opening


def open_compacted(trial: Trial) -> dict[str, float]:
    store_path, first = trial.copy(), workload.key(trial.entries // 3)
    trial.subject.record("k", b"", 0)  # imports are not part of the time
    settle()
    before = private_mb()
    start = perf_counter()
    store = trial.subject(store_path)
    entry = store.get(first)
    took = perf_counter() - start
    assert entry is not None
    after_open = private_mb()
    choose = random.Random(trial.seed).randrange
    for _ in range(100_000):
        store.get(workload.key(choose(trial.entries)))
    return {
        "open": took,
        "memory_start": before,
        "memory_open": after_open,
        "memory_gets": private_mb(),
    }


def open_batches(trial: Trial) -> dict[str, float]:
    from foldlog.storage.engines.append_log.engine import LogEngine as Engine

    path, first = trial.copy("-batches"), workload.key(trial.entries // 3)
    settle()
    start = perf_counter()
    engine = Engine(path)
    assert engine.fold.get(first) is not None
    served = perf_counter() - start
    memory = private_mb()
    engine.close()
    del engine
    start = perf_counter()
    store = trial.subject(path)
    assert store.get(first) is not None
    return {
        "open_batches": served,
        "open_batches_compacted": perf_counter() - start,
        "memory_open_batches": memory,
    }


# Reading


def random_keys(trial: Trial) -> list[str]:
    """The keys of all entries in random order, or of `KEYS` of them."""
    return [
        workload.key(n)
        for n in random.Random(trial.seed).sample(range(trial.entries), min(trial.entries, KEYS))
    ]


def gets(trial: Trial) -> dict[str, float]:
    store = trial.subject(trial.copy())
    keys = random_keys(trial)
    again = keys.copy()
    random.Random(trial.seed + "again").shuffle(again)
    absent = [
        workload.absent_key(number)
        for number in workload.shuffled(min(trial.entries, 200_000), trial.seed)
    ]
    settle()
    figures = {"get_first": mean_s(store.get, keys)}
    mean_s(store.get, again)
    return {
        **figures,
        "get_steady": mean_s(store.get, keys),
        "get_absent": mean_s(store.get, absent),
    }


def hot_gets(trial: Trial) -> dict[str, float]:
    store = trial.subject(trial.copy())
    hot = random_keys(trial)[:1000]
    settle()
    mean_s(store.get, hot)
    return {"get_hot": mean_s(store.get, hot * 200)}


def hot_gets_with_changes(trial: Trial) -> dict[str, float]:
    """Gets of hot keys with changes on top of the base: one settled batch and a few runs."""
    store = trial.subject(trial.copy())
    hot = random_keys(trial)[:1000]
    apply_all(store, batches(trial, workload.shuffled(trial.entries, "hot")[:11_111], 1000))
    newer = batches(trial, workload.shuffled(trial.entries, "hotter")[:60], 1)
    apply_all(store, (update for number, update in enumerate(newer) if number % 3))
    settle()
    mean_s(store.get, hot)
    return {"get_hot_changed": mean_s(store.get, hot * 200)}


def ranges(trial: Trial) -> dict[str, float]:
    store = trial.subject(trial.copy())
    figures = {}
    for width, count in ((100, 200), (10_000, 10)):
        if width > trial.entries:
            continue
        prefixes = workload.prefixes(trial.entries, width, count, trial.seed)
        assert len(store.range(prefixes[0])) == width
        settle()
        figures[f"range_{width}"] = limited_mean_s(store.range, prefixes)
    settle()
    start = perf_counter()
    found = store.range("")
    figures["range_all"] = perf_counter() - start
    # Some subjects keep the cursor as an entry.
    assert trial.entries <= len(found) <= trial.entries + 1
    return figures


# Writing


def each_batch(trial: Trial, numbers: Iterable[int], size: int) -> Iterator[tuple[list[Any], Any]]:
    """Updates of the entries `numbers` in batches with cursors, as the subject's `apply` takes
    them."""
    subject = trial.subject
    records = workload.records(iter(numbers), trial.seed)
    count = 0
    while batch := [subject.record(key, value, count) for key, value in islice(records, size)]:
        count += len(batch)
        yield batch, subject.position(count)


def batches(trial: Trial, numbers: Iterable[int], size: int) -> list[tuple[list[Any], Any]]:
    """`batches`, created before the clock starts."""
    return list(each_batch(trial, numbers, size))


def timed_applies(store: Subject, work: list[tuple[list[Any], Any]]) -> list[float]:
    """The time of each apply in seconds, until `PASS_LIMIT_S`."""
    apply = store.apply
    times = []
    begun = end = perf_counter()
    for batch, cursor in work:
        start = end
        apply(batch, cursor)
        end = perf_counter()
        times.append(end - start)
        if end - begun > PASS_LIMIT_S:
            break
    return times


def applies_to_copy(trial: Trial, work: list[tuple[list[Any], Any]]) -> list[float]:
    """`timed_applies` to a copy of the prepared store, which is then removed."""
    path = trial.copy()
    store = trial.subject(path)
    settle()
    times = timed_applies(store, work)
    store.close()
    del store
    gc.unfreeze()
    shutil.rmtree(path.parent)
    return times


def applies(trial: Trial) -> dict[str, float]:
    count = 100_000
    choose = random.Random(trial.seed).randrange
    figures = {}
    for kind in ("fresh", "overwrite"):
        for size in (1, 10, 100, 1000):
            if kind == "fresh":
                numbers = [
                    trial.entries + number for number in workload.shuffled(count, trial.seed)
                ]
            else:
                numbers = [choose(trial.entries) for _ in range(count)]
            times = applies_to_copy(trial, batches(trial, numbers, size))
            figures[f"apply_{kind}_{size}"] = sum(times) / (len(times) * size)
            if kind == "overwrite" and size == 100:
                times.sort()
                figures["publish_median"] = median(times)
                figures["publish_p99"] = times[len(times) * 99 // 100]
                figures["publish_max"] = times[-1]
    return figures


def apply_all(store: Any, work: Iterable[tuple[list[Any], Any]]) -> None:
    for batch, cursor in work:
        store.apply(batch, cursor)


def load(trial: Trial) -> dict[str, float]:
    """Load all entries into an empty store in batches of 1000, in random order; foldlog compacts
    when due."""
    work = batches(trial, workload.shuffled(trial.entries, "load"), workload.BATCH)
    path = trial.scratch / "loaded"
    store = trial.subject(path)
    settle()
    figures = {"load": timed(partial(apply_all, store, work)) / trial.entries}
    store.close()
    if trial.subject is Foldlog:
        from foldlog import AppendLogSnapshot

        _, snap = AppendLogSnapshot.load(trial.scratch / "default")
        settle()
        figures["load_compacting"] = timed(partial(apply_all, snap, work)) / trial.entries
        snap.close()
    return figures


# foldlog alone


def compactions(trial: Trial) -> dict[str, float]:
    part = trial.entries // 100
    start_at = trial.entries // 3
    touched = {
        "contiguous": list(range(start_at, start_at + part)),
        "random": workload.shuffled(trial.entries, trial.seed)[:part],
        "all": workload.shuffled(trial.entries, trial.seed),
    }
    figures = {}
    for name, numbers in touched.items():
        path = trial.copy()
        store = trial.subject(path)
        apply_all(store, batches(trial, numbers, workload.BATCH))
        gc.collect()
        figures[f"compact_{name}"] = timed(store.opened.compact)  # type: ignore[attr-defined]
        store.close()
        size = path.stat().st_size
        shutil.rmtree(path.parent)
    figures["disk_write"] = write_and_sync(trial.scratch / "floor", size)
    return figures


def write_and_sync(path: Path, size: int) -> float:
    """The time to write and sync `size` bytes, computing nothing: the lower bound of a rewrite."""
    piece = os.urandom(1 << 20)
    start = perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size >> 20):
            file.write(piece)
        os.fsync(file.fileno())
    took = perf_counter() - start
    path.unlink()
    return took


def artifacts(trial: Trial) -> dict[str, float]:
    from foldlog import AppendLogSnapshot

    store = trial.subject(trial.copy())
    artifact, landed = trial.scratch / "artifact", trial.scratch / "landed"
    settle()
    exported = timed(lambda: store.opened.export_to(artifact))  # type: ignore[attr-defined]
    store.close()
    start = perf_counter()
    _, snap = AppendLogSnapshot.import_artifact(artifact, landed, NEVER)
    assert snap.get(workload.key(trial.entries // 3)) is not None
    imported = perf_counter() - start
    snap.close()
    return {
        "export": exported,
        "import": imported,
        "disk_write": write_and_sync(trial.scratch / "floor", landed.stat().st_size),
    }


# Many threads


def rate(calls: list[Callable[[threading.Event], int]]) -> float:
    """Calls per second in total, with each of `calls` repeated in a thread until told to stop."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(calls)) as pool:
        start = perf_counter()
        running = [pool.submit(call, stop) for call in calls]
        stop.wait(THREADS_S)
        stop.set()
        return sum(done.result() for done in running) / (perf_counter() - start)


@contextmanager
def own(store: Subject) -> Iterator[Subject]:
    """The store, as this thread is to use it."""
    mine = store.for_thread()
    yield mine
    if mine is not store:
        mine.close()


def applying(store: Subject, work: list[tuple[list[Any], Any]], stop: threading.Event) -> int:
    """Apply the batches over and over until told to stop. Returns how many it applied."""
    done = 0
    with own(store) as mine:
        for batch, cursor in cycle(work):  # ends by the clock, never for lack of work
            if stop.is_set():
                break
            mine.apply(batch, cursor)
            done += 1
    return done


def commits(trial: Trial) -> dict[str, float]:
    """Commits per second, of one update each, from 1, 4 and 16 threads that wait for their own
    commits."""
    store = trial.subject(trial.copy())

    figures = {}
    for threads in (1, 4, 16):
        work = batches(trial, workload.shuffled(min(trial.entries, 50_000), f"{threads}"), 1)
        figures[f"commits_{threads}"] = rate(
            [partial(applying, store, work[number::threads]) for number in range(threads)]
        )
    store.close()
    return figures


def reads(trial: Trial) -> dict[str, float]:
    """Gets per second of 1,000 hot keys from 1 to 8 threads, and from 4 while a fifth applies
    batches of 100."""
    store = trial.subject(trial.copy())
    hot = random_keys(trial)[:1000]

    def reading(stop: threading.Event) -> int:
        done = 0
        with own(store) as mine:
            while not stop.is_set():
                mean_s(mine.get, hot)
                done += len(hot)
        return done

    work = batches(trial, workload.shuffled(trial.entries, trial.seed)[:100_000], 100)

    def writing(stop: threading.Event) -> int:
        applying(store, work, stop)
        return 0  # its calls are not counted

    figures = {f"reads_{threads}": rate([reading] * threads) for threads in (1, 2, 4, 8)}
    figures["reads_4_writing"] = rate([*[reading] * 4, writing])
    store.close()
    return figures


def store_calls(trial: Trial) -> dict[str, float]:
    """What one caller of a store sees: applies, asynchronous applies, and reads by message."""
    from foldlog.protocol.messages import Get, Range

    choose = random.Random(trial.seed).randrange
    figures = {}
    for size in (1, 10, 100, 1000):
        numbers = [choose(trial.entries) for _ in range(20_000 if size == 1 else 100_000)]
        times = applies_to_copy(trial, batches(trial, numbers, size))
        figures[f"store_apply_{size}"] = sum(times) / (len(times) * size)
    subject = trial.subject(trial.copy())
    store = subject.opened  # type: ignore[attr-defined]
    work = batches(trial, [choose(trial.entries) for _ in range(20_000)], 1)
    settle()
    start = perf_counter()
    # Waits if the mailbox is full.
    futures = [store.apply_async(batch, cursor, 60) for batch, cursor in work]
    futures[-1].result(60)
    figures["store_apply_async_1"] = (perf_counter() - start) / len(work)
    asks = [Get(workload.key(choose(trial.entries))) for _ in range(5000)]
    for ask in asks:
        store.get(ask.key)  # the asking is measured, not a first read
    figures["ask_get"] = limited_mean_s(store.reader.ask, asks)
    asks = [Range(prefix) for prefix in workload.prefixes(trial.entries, 100, 1000, trial.seed)]
    figures["ask_range_100"] = limited_mean_s(store.reader.ask, asks)
    subject.close()
    return figures


ALONE = (Foldlog,)
CASES: dict[str, Case] = {
    "open": Case(open_compacted, large=True),
    "open_batches": Case(open_batches, ALONE),
    "get": Case(gets, large=True),
    "get_hot": Case(hot_gets, large=True),
    "get_changed": Case(hot_gets_with_changes, ALONE),
    "range": Case(
        ranges, tuple(subject for subject in ENGINES if subject is not Diskcache), large=True
    ),
    "apply": Case(applies),
    "load": Case(load),
    "compact": Case(compactions, ALONE),
    "artifact": Case(artifacts, ALONE),
    "commits": Case(commits, THREADED),
    "reads": Case(reads, READ_BY_MANY),
    "store": Case(store_calls, (Store, StoreSynced)),
}


def prepare(subject: type[Subject], entries: int, folder: Path) -> None:
    """Create the stores that trials start from, unless they exist. Large ones are loaded in key
    order, which is faster."""
    path = folder / subject.name
    done = folder / f"{subject.name}.done"
    if done.exists():
        return
    trial = Trial(subject, entries, folder, folder, "prepare")
    large = entries > LARGE
    for suffix in ("", "-batches") if subject is Foldlog and not large else ("",):
        store = subject(path.with_name(path.name + suffix))
        numbers = range(entries) if large else workload.shuffled(entries, "load")
        apply_all(store, each_batch(trial, numbers, workload.BATCH))
        if not suffix:
            store.load_done()
        store.close()
    done.touch()
