"""A multithreaded service: one thread feeds a store from upstream, the others answer requests.

Run it twice: the second run resumes from the cursor of the first.

    python examples/threaded_service.py [LOG]
"""

from __future__ import annotations

import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import foldlog
from foldlog import Delete, Put, Update, VersionToken, WatchCursor


def upstream(after: WatchCursor) -> Iterator[tuple[WatchCursor, list[Update]]]:
    """What a watch on etcd or FoundationDB would return: the batches after a revision, each with
    its own revision."""
    last = after.as_u64() or 0
    for revision in range(last + 1, last + 201):
        host, version = f"route/{revision % 20:02}", VersionToken.from_u64(revision)
        updates: list[Update] = [
            Put(host, b"10.0.0.%d" % (revision % 250), version),
            Put("revision", b"%d" % revision, version),
        ]
        if revision % 50 == 0:
            updates.append(Delete("route/00", version))
        yield WatchCursor.from_u64(revision), updates


def feed(store: foldlog.Store) -> int:
    """Apply all changes from upstream. The cursor says where to resume, even after a crash."""
    batches = 0
    for cursor, updates in upstream(store.cursor()):
        store.apply(updates, cursor)
        batches += 1
    return batches


def serve(store: foldlog.Store, over: threading.Event) -> int:
    """Answer requests. Each uses one snapshot, so its whole answer is from one revision."""
    requests = 0
    while not over.is_set() or requests == 0:
        snapshot = store.snapshot()
        revision = snapshot.get("revision")
        assert revision is None or int(revision.value) == snapshot.cursor().as_u64(), "half a batch"
        list(snapshot.range("route/"))
        requests += 1
    return requests


def main(path: Path) -> None:
    over = threading.Event()
    with foldlog.open(path) as store, ThreadPoolExecutor(5) as pool:
        print(f"opened at {store.cursor()!r} with {len(store)} entries")
        serving = [pool.submit(serve, store, over) for _ in range(4)]
        feeding = pool.submit(feed, store)
        try:
            print(f"applied {feeding.result()} batches, up to {store.cursor()!r}")
        finally:
            over.set()
        answered = sum(served.result() for served in serving)
        print("served requests in 4 threads meanwhile" if answered >= 4 else "nobody was served")
        store.compact()
        print(f"compacted {store.stats().entries} entries")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder) / "routes.log")
