"""Random reads of a log that is larger than its cache: memory held, and time, by `cache_bytes`.

    python benchmarks/cache.py 10000000 --reads 2000000 --cache-mb 512

Prints the most that the cache held (by its own count), the private memory of the process, and the
time of a read in each part of the run. Exit code 1 if the count exceeded the bound.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from engines import CURSOR, LOAD_BATCH, batches, key, private_mb

from foldlog import AppendLogSnapshot

PARTS = 10


def load(path: Path, entries: int) -> None:
    """A compacted log with so many entries of 100 bytes."""
    with AppendLogSnapshot.open(path, compact_threshold=1 << 28)[1] as snap:
        for updates in batches(range(entries), LOAD_BATCH):
            snap.apply(updates, CURSOR)
        snap.compact()


def read(path: Path, entries: int, reads: int, cache_bytes: int) -> bool:
    """Read at random, and print what it takes. True if the bound held."""
    chance = random.Random(1)
    most = 0
    with AppendLogSnapshot.open(path, cache_bytes=cache_bytes)[1] as snap:
        fold = snap.snapshot()
        print(f"opened: {private_mb():.0f} MB private")
        for part in range(1, PARTS + 1):
            keys = [key(chance.randrange(entries)) for _ in range(reads // PARTS)]
            start = time.thread_time()
            for k in keys:
                if snap.get(k) is None:
                    raise SystemExit(f"{k} is missing")
                most = max(most, fold.cached_bytes)
            each_us = (time.thread_time() - start) / len(keys) * 1e6
            print(
                f"{part * len(keys):>12,} reads: {fold.cached_bytes / 2**20:6.0f} MB held,"
                f" {most / 2**20:6.0f} MB at most, {private_mb():6.0f} MB private,"
                f" {each_us:6.2f} us CPU a read",
                flush=True,
            )
    return most <= cache_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("entries", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--reads", type=int, default=1_000_000)
    parser.add_argument("--cache-mb", type=int, default=64)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the log goes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="foldlog-cache-", dir=options.folder) as place:
        path = Path(place) / "log"
        load(path, options.entries)
        print(f"{options.entries:,} entries in {path.stat().st_size / 2**20:.0f} MB")
        held = read(path, options.entries, options.reads, options.cache_mb * 2**20)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
