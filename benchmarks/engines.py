"""The cost of the two engines and of raw `rocksdict` at several sizes.

Prints a table, writes JSON and a plot.

    python benchmarks/engines.py 1000000 10000000 --out benchmarks/results

Each subject and size runs in its own process, one after another, so that memory is measured
separately. Entries have keys of 13 bytes and values of 100. Compare only within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from harness import each, timed

from foldlog import AppendLogSnapshot, Put, RocksDbSnapshot, WatchCursor

LOAD_BATCH = 1000
GETS = 100_000
APPLIES = 2000
APPLY_BATCH = 100
PER_ROUND = 3000
"""Records of a round of `--overhead`."""
_CHANCE = random.Random(7)
VALUES = [_CHANCE.randbytes(100) for _ in range(997)]
CURSOR = WatchCursor.from_u64(1)
FOLDLOG_ROCKSDB, FOLDLOG_LOG, RAW = "foldlog on RocksDB", "foldlog's log", "rocksdict, raw"
PLOTTED = {
    "reopen_s": "open to the first get, s",
    "memory_mb": "memory after the gets, MB",
    "get_us": "get, random, us",
    "apply_us": "apply 100, us a record",
    "export_s": "export, s",
    "load_us": "load, us a record",
}


def key(number: int) -> str:
    return f"key/{number:09d}"


def private_mb() -> float:
    """Private memory of this process in MB, without pages of files."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))


class Raw:
    """Plain `rocksdict`, opened with the options that foldlog passes to RocksDB."""

    def __init__(self, path: Path) -> None:
        from foldlog.storage.engines.rocksdb.database import opening

        self._rocksdict = opening.binding()
        self._db = opening.open_database(path, create=True)

    def apply(self, updates: list[Put], cursor: WatchCursor) -> None:
        batch = self._rocksdict.WriteBatch(raw_mode=True)
        for update in updates:
            batch.put(update.key.encode(), update.value)
        self._db.write(batch)

    def get(self, key: str) -> object:
        return self._db.get(key.encode())

    def range(self, prefix: str) -> list[tuple[str, bytes]]:
        options = self._rocksdict.ReadOptions()
        low = prefix.encode()
        options.set_iterate_upper_bound(low + b"\xff")
        return [(k.decode(), v) for k, v in self._db.items(from_key=low, read_opt=options)]

    def export_to(self, dest: Path) -> None:
        self._rocksdict.Checkpoint(self._db).create_checkpoint(os.fspath(dest))

    def close(self) -> None:
        self._db.close()


OPENERS: dict[str, Callable[[Path], Any]] = {
    FOLDLOG_ROCKSDB: lambda path: RocksDbSnapshot.open(path)[1],
    FOLDLOG_LOG: lambda path: AppendLogSnapshot.open(path)[1],
    RAW: Raw,
}


def batches(numbers: Sequence[int], size: int) -> Iterator[list[Put]]:
    for start in range(0, len(numbers), size):
        yield [Put(key(n), VALUES[n % 997]) for n in numbers[start : start + size]]


def measure(subject: str, entries: int, folder: Path) -> dict[str, Any]:
    """All figures of one subject at one size. Call it in a new process."""
    path = folder / "store"
    chance = random.Random(11)
    store = OPENERS[subject](path)
    started, loading = time.perf_counter(), 0.0
    for updates in batches(range(entries), LOAD_BATCH):
        loading += timed(lambda updates=updates: store.apply(updates, CURSOR))  # type: ignore[misc]
    print(f"  {subject}, {entries:,}: loaded in {time.perf_counter() - started:.0f} s", flush=True)
    loaded_mb = private_mb()
    store.close()

    start = time.perf_counter()
    store = OPENERS[subject](path)
    store.get(key(entries // 2))
    reopen_s = time.perf_counter() - start
    probes = [key(chance.randrange(entries)) for _ in range(GETS)]

    first_get, later_get = (timed(partial(each, store.get, probes)) for _ in range(2))
    hot_get = timed(partial(each, store.get, probes[:100] * (GETS // 100)))
    memory_mb = private_mb()
    prefixes = [key(chance.randrange(entries // 100) * 100)[:-2] for _ in range(200)]
    range_s = timed(lambda: [store.range(prefix) for prefix in prefixes])
    work = list(batches([chance.randrange(entries) for _ in range(APPLIES * APPLY_BATCH)], 100))
    apply_s = timed(lambda: [store.apply(updates, CURSOR) for updates in work])
    export_s = timed(lambda: store.export_to(folder / "artifact"))
    size = sum(file.stat().st_size for file in [path, *path.glob("*")] if file.is_file())
    store.close()
    return {
        "subject": subject,
        "entries": entries,
        "load_us": loading / entries * 1e6,
        "memory_loaded_mb": loaded_mb,
        "reopen_s": reopen_s,
        "get_first_us": first_get / GETS * 1e6,
        "get_us": later_get / GETS * 1e6,
        "get_hot_us": hot_get / GETS * 1e6,
        "memory_mb": memory_mb,
        "range_100_us": range_s / len(prefixes) * 1e6,
        "apply_us": apply_s / APPLIES / APPLY_BATCH * 1e6,
        "export_s": export_s,
        "disk_mb": size / 1e6,
    }


def overhead(entries: int, folder: Path, rounds: int = 40) -> dict[str, float]:
    """What foldlog adds to raw `rocksdict`: both take turns in one process.

    Measured as CPU time of the calling thread: other load and RocksDB's own threads would be noise.
    The ratio is the median of those of all rounds, which are short: the two halves of a round find
    the machine equally busy.
    """
    stores = {name: OPENERS[name](folder / name) for name in (RAW, FOLDLOG_ROCKSDB)}
    chance = random.Random(3)
    spent: dict[tuple[str, str], list[float]] = {}

    def take(work: str, name: str, run: Callable[[], object], records: int) -> None:
        start = time.thread_time()
        run()
        spent.setdefault((work, name), []).append((time.thread_time() - start) / records * 1e6)

    for store in stores.values():
        for updates in batches(range(entries), LOAD_BATCH):
            store.apply(updates, CURSOR)
        store.close()
    stores = {name: OPENERS[name](folder / name) for name in stores}
    for _ in range(rounds):
        probes = [key(chance.randrange(entries)) for _ in range(PER_ROUND)]
        numbers = [chance.randrange(entries) for _ in range(PER_ROUND)]
        work = {size: list(batches(numbers, size)) for size in (10, 100, 1000)}
        for name, store in stores.items():
            take("get, random", name, partial(each, store.get, probes), PER_ROUND)
        for name, store in stores.items():
            take("get, hot", name, partial(each, store.get, probes[:50] * 60), PER_ROUND)
        for size, updates_of in work.items():
            for name, store in stores.items():
                apply = partial(store.apply, cursor=CURSOR)
                take(f"apply {size}", name, partial(each, apply, updates_of), PER_ROUND)
    for store in stores.values():
        store.close()
    for (work, name), times in spent.items():
        print(f"{work:12} {name:20} {min(times):6.2f} us at best, {median(times):6.2f} us mostly")
    ratios = {}
    for work in dict.fromkeys(work for work, _ in spent):
        pairs = zip(spent[work, FOLDLOG_ROCKSDB], spent[work, RAW], strict=True)
        ratios[work] = round(median(own / raw for own, raw in pairs), 2)
    return ratios


def in_process(subject: str, entries: int, folder: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="foldlog-engines-", dir=folder) as place:
        command = [sys.executable, __file__, "--one", subject, str(entries), "--folder", place]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        shutil.rmtree(place, ignore_errors=True)
        os.mkdir(place)
    *progress, last = done.stdout.splitlines()
    print(*progress, sep="\n", flush=True)
    result: dict[str, Any] = json.loads(last)
    return result


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Plot each figure against the number of entries."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7))
    for axis, (name, title) in zip(axes.flat, PLOTTED.items(), strict=True):
        for subject in OPENERS:
            points = sorted((r["entries"], r[name]) for r in results if r["subject"] == subject)
            axis.plot(*zip(*points, strict=True), marker="o", label=subject)
        axis.set(title=title, xscale="log", yscale="log", xlabel="entries")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", type=int, default=[1_000_000])
    parser.add_argument("--one", nargs=2, metavar=("SUBJECT", "ENTRIES"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the stores go")
    parser.add_argument("--skip", action="append", default=[], metavar="SUBJECT:ENTRIES")
    parser.add_argument("--out", type=Path, help="a directory for engines.json and engines.png")
    parser.add_argument("--overhead", action="store_true", help="foldlog beside raw rocksdict only")
    options = parser.parse_args()
    if options.overhead:
        with tempfile.TemporaryDirectory(prefix="foldlog-engines-", dir=options.folder) as place:
            print(overhead(options.sizes[0], Path(place)))
        return
    if options.one:
        subject, entries = options.one
        print(json.dumps(measure(subject, int(entries), Path(options.folder))))
        return
    results = []
    for entries in options.sizes:
        for subject in OPENERS:
            if f"{subject}:{entries}" not in options.skip:
                results.append(in_process(subject, entries, options.folder))
                print(json.dumps(results[-1]), flush=True)
                if options.out:
                    text = json.dumps(results, indent=1) + "\n"
                    (options.out / "engines.json").write_text(text, encoding="utf-8")
                    plot(results, options.out / "engines.png")


if __name__ == "__main__":
    main()
