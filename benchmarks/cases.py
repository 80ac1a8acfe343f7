"""The measurements. Each runs in a process of its own, on a store of `entries` entries that was prepared before.

A case is a function of a `Trial`; it returns figures by name, in the units of `FIGURES`. Files are in the page cache.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import workload
from subjects import ENGINES, NEVER, THREADED, Diskcache, Foldlog, Store, StoreSynced, Subject

PASS_LIMIT_S = 2.0
"""A pass of reads or writes of a slow subject ends after this time; its figure is the mean of what it did."""


COMMITS_S = 2.0


class Trial(NamedTuple):
    """One run of one case."""

    subject: type[Subject]
    entries: int
    prepared: Path
    """The folder with the prepared stores; not to be changed."""
    scratch: Path
    """An empty folder for this trial alone."""
    seed: str

    @property
    def original(self) -> Path:
        return self.prepared / self.subject.name

    def copy(self, suffix: str = "") -> Path:
        """A copy of the prepared store, to change."""
        source = self.prepared / (self.subject.name + suffix)
        target = Path(tempfile.mkdtemp(dir=self.scratch)) / source.name  # a folder of its own: foldlog keeps notes beside a log
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
        return target


class Case(NamedTuple):
    run: Callable[[Trial], dict[str, float]]
    subjects: tuple[type[Subject], ...] = ENGINES


def settle() -> None:
    """Keep what the trial has built up to here out of the garbage collector's work."""
    gc.collect()
    gc.freeze()


def private_mb() -> float:
    """Memory that is this process's own: Private_Clean + Private_Dirty of /proc/self/smaps_rollup, in MB."""
    rows = (line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines())
    return sum(int(row[1]) for row in rows if row[0] in ("Private_Clean:", "Private_Dirty:")) * 1024 / 1e6


def mean_s(call: Callable[[Any], Any], arguments: list[Any], chunk: int = 1000) -> float:
    """The mean time of a call, over all arguments or `PASS_LIMIT_S`."""
    done = 0
    start = perf_counter()
    while done < len(arguments):
        for argument in arguments[done : done + chunk]:
            call(argument)
        done = min(done + chunk, len(arguments))
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
    return {"open": took, "memory_start": before, "memory_open": after_open, "memory_gets": private_mb()}


def open_batches(trial: Trial) -> dict[str, float]:
    from foldlog.storage.engine import Engine

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
    return {"open_batches": served, "open_batches_compacted": perf_counter() - start, "memory_open_batches": memory}


# Reading


def gets(trial: Trial) -> dict[str, float]:
    store = trial.subject(trial.copy())
    keys = [workload.key(number) for number in workload.shuffled(trial.entries, trial.seed)]
    again = [workload.key(number) for number in workload.shuffled(trial.entries, trial.seed + "again")]
    absent = [workload.absent_key(number) for number in workload.shuffled(min(trial.entries, 200_000), trial.seed)]
    hot = keys[:1000] * 200
    settle()
    first = mean_s(store.get, keys)
    mean_s(store.get, again)
    random.Random(trial.seed).shuffle(keys)
    steady = mean_s(store.get, keys)
    mean_s(store.get, hot[:1000])
    return {
        "get_first": first,
        "get_steady": steady,
        "get_hot": mean_s(store.get, hot),
        "get_absent": mean_s(store.get, absent),
    }


def hot_gets_with_changes(trial: Trial) -> dict[str, float]:
    """Hot keys while changes stand above the base: after one settled batch, and a few runs."""
    store = trial.subject(trial.copy())
    hot = [workload.key(number) for number in workload.shuffled(trial.entries, trial.seed)[:1000]] * 200
    for batch, cursor in batches(trial, workload.shuffled(trial.entries, "hot")[:11_111], 1000):
        store.apply(batch, cursor)
    for number, (batch, cursor) in enumerate(batches(trial, workload.shuffled(trial.entries, "hotter")[:60], 1)):
        if number % 3:
            store.apply(batch, cursor)
    settle()
    mean_s(store.get, hot[:1000])
    return {"get_hot_changed": mean_s(store.get, hot)}


def ranges(trial: Trial) -> dict[str, float]:
    store = trial.subject(trial.copy())
    figures = {}
    for width, count in ((100, 200), (10_000, 10)):
        if width > trial.entries:
            continue
        prefixes = workload.prefixes(trial.entries, width, count, trial.seed)
        assert len(store.range(prefixes[0])) == width
        settle()
        figures[f"range_{width}"] = mean_s(store.range, prefixes, chunk=1)
    settle()
    start = perf_counter()
    found = store.range("")
    figures["range_all"] = perf_counter() - start
    assert trial.entries <= len(found) <= trial.entries + 1  # some keep the cursor among the entries
    return figures


# Writing


def batches(trial: Trial, numbers: Iterable[int], size: int) -> list[tuple[list[Any], Any]]:
    """Updates of the entries `numbers` in batches, each with its cursor, as the subject takes them."""
    subject = trial.subject
    records = workload.records(iter(numbers), trial.seed)
    found = []
    count = 0
    while batch := [subject.record(key, value, count) for key, value in islice(records, size)]:
        count += len(batch)
        found.append((batch, subject.position(count)))
    return found


def timed_applies(store: Subject, work: list[tuple[list[Any], Any]]) -> list[float]:
    """The time of each apply, until `PASS_LIMIT_S`."""
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


def applies(trial: Trial) -> dict[str, float]:
    count = 100_000
    choose = random.Random(trial.seed).randrange
    figures = {}
    for kind in ("fresh", "overwrite"):
        for size in (1, 10, 100, 1000):
            if kind == "fresh":
                numbers = [trial.entries + number for number in workload.shuffled(count, trial.seed)]
            else:
                numbers = [choose(trial.entries) for _ in range(count)]
            work = batches(trial, numbers, size)
            path = trial.copy()
            store = trial.subject(path)
            settle()
            times = timed_applies(store, work)
            store.close()
            del store
            gc.unfreeze()
            shutil.rmtree(path.parent)
            figures[f"apply_{kind}_{size}"] = sum(times) / (len(times) * size)
            if kind == "overwrite" and size == 100:
                times.sort()
                figures["publish_median"] = median(times)
                figures["publish_p99"] = times[len(times) * 99 // 100]
                figures["publish_max"] = times[-1]
    return figures


def load(trial: Trial) -> dict[str, float]:
    """All entries into an empty store in batches of 1000, in random order; foldlog compacts when it finds it due."""
    work = batches(trial, workload.shuffled(trial.entries, "load"), workload.BATCH)
    path = trial.scratch / "loaded"
    store = trial.subject(path)
    settle()
    start = perf_counter()
    for batch, cursor in work:
        store.apply(batch, cursor)
    took = perf_counter() - start
    store.close()
    figures = {"load": took / trial.entries}
    if trial.subject is Foldlog:
        from foldlog import AppendLogSnapshot

        _, snap = AppendLogSnapshot.load(trial.scratch / "default")
        settle()
        start = perf_counter()
        for batch, cursor in work:
            snap.apply(batch, cursor)
        figures["load_compacting"] = (perf_counter() - start) / trial.entries
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
        for batch, cursor in batches(trial, numbers, workload.BATCH):
            store.apply(batch, cursor)
        gc.collect()
        start = perf_counter()
        store.snap.compact()  # type: ignore[attr-defined]
        figures[f"compact_{name}"] = perf_counter() - start
        store.close()
        size = path.stat().st_size
        shutil.rmtree(path.parent)
    figures["disk_write"] = write_and_sync(trial.scratch / "floor", size)
    return figures


def write_and_sync(path: Path, size: int) -> float:
    """What the disk takes for so many bytes, with nothing computed: the floor of a rewrite."""
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
    start = perf_counter()
    store.snap.export_to(artifact)  # type: ignore[attr-defined]
    exported = perf_counter() - start
    store.close()
    start = perf_counter()
    _, snap = AppendLogSnapshot.import_artifact(artifact, landed, NEVER)
    assert snap.get(workload.key(trial.entries // 3)) is not None
    imported = perf_counter() - start
    snap.close()
    return {"export": exported, "import": imported, "disk_write": write_and_sync(trial.scratch / "floor", landed.stat().st_size)}


# Many threads


def commits(trial: Trial) -> dict[str, float]:
    """Commits of one update a second, from 1, 4 and 16 threads that each wait for their own."""
    store = trial.subject(trial.copy())
    figures = {}
    for threads in (1, 4, 16):
        work = batches(trial, workload.shuffled(min(trial.entries, 50_000), f"{threads}"), 1)
        done = [0] * threads
        stop = threading.Event()

        def commit(number: int, work: Any = work, done: Any = done, stop: Any = stop, step: int = threads) -> None:
            mine = store.for_thread()
            for batch, cursor in cycle(work[number::step]):  # the clock ends it, never the work
                if stop.is_set():
                    break
                mine.apply(batch, cursor)
                done[number] += 1
            if mine is not store:
                mine.close()

        running = [threading.Thread(target=commit, args=(number,)) for number in range(threads)]
        start = perf_counter()
        for thread in running:
            thread.start()
        stop.wait(COMMITS_S)
        stop.set()
        for thread in running:
            thread.join()
        figures[f"commits_{threads}"] = sum(done) / (perf_counter() - start)
    store.close()
    return figures


def store_calls(trial: Trial) -> dict[str, float]:
    """What one caller sees of the store: applies, asynchronous applies, and reads by message."""
    from foldlog.protocol.messages import Get, Range

    subject: Any = trial.subject(trial.copy())
    choose = random.Random(trial.seed).randrange
    figures = {}
    for size in (1, 10, 100, 1000):
        work = batches(trial, [choose(trial.entries) for _ in range(20_000 if size == 1 else 100_000)], size)
        settle()
        times = timed_applies(subject, work)
        figures[f"store_apply_{size}"] = sum(times) / (len(times) * size)
    work = batches(trial, [choose(trial.entries) for _ in range(20_000)], 1)
    settle()
    start = perf_counter()
    futures = [subject.store.apply_async(batch, cursor) for batch, cursor in work]
    futures[-1].result(60)
    figures["store_apply_async_1"] = (perf_counter() - start) / len(work)
    asks = [Get(workload.key(choose(trial.entries))) for _ in range(5000)]
    figures["ask_get"] = mean_s(subject.store.reader.ask, asks)
    asks = [Range(prefix) for prefix in workload.prefixes(trial.entries, 100, 1000, trial.seed)]
    figures["ask_range_100"] = mean_s(subject.store.reader.ask, asks)
    subject.close()
    return figures


ALONE = (Foldlog,)
CASES: dict[str, Case] = {
    "open": Case(open_compacted),
    "open_batches": Case(open_batches, ALONE),
    "get": Case(gets),
    "get_changed": Case(hot_gets_with_changes, ALONE),
    "range": Case(ranges, tuple(subject for subject in ENGINES if subject is not Diskcache)),
    "apply": Case(applies),
    "load": Case(load),
    "compact": Case(compactions, ALONE),
    "artifact": Case(artifacts, ALONE),
    "commits": Case(commits, THREADED),
    "store": Case(store_calls, (Store, StoreSynced)),
}


def prepare(subject: type[Subject], entries: int, folder: Path) -> None:
    """Make the stores that trials start from, unless they are there."""
    path = folder / subject.name
    done = folder / f"{subject.name}.done"
    if done.exists():
        return
    trial = Trial(subject, entries, folder, folder, "prepare")
    work = batches(trial, workload.shuffled(entries, "load"), workload.BATCH)
    for suffix in ("", "-batches") if subject is Foldlog else ("",):
        store = subject(path.with_name(path.name + suffix))
        for batch, cursor in work:
            store.apply(batch, cursor)
        if not suffix:
            store.load_done()
        store.close()
    done.touch()
