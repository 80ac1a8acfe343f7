"""A mirror: an exact copy of part of a log, which catches up after it was closed.

Run: python examples/mirror_of_a_log.py

For a NATS bucket, use NatsKv("nats://127.0.0.1:4222", bucket="routes") instead of LogFile(source).
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import foldlog
from foldlog import Changed, MirrorReadOnly
from foldlog.upstreams import LogFile


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, copy = Path(folder) / "routes.log", Path(folder) / "copy.log"
        with foldlog.open(source) as routes:
            for number in (1, 2, 3):
                routes.put(f"eu/{number}", f"10.0.0.{number}".encode())
            routes.put("us/1", b"10.1.0.1")
            follow_for_a_while(routes, LogFile(source), copy)

            routes.delete("eu/3")  # no mirror is open, and compaction drops the history
            routes.compact()
            with foldlog.mirror(copy, LogFile(source), prefix="eu/") as mirror:
                mirror.wait_synced()
                print("caught up:", dict(mirror.snapshot().items()))
                try:
                    mirror.put("eu/9", b"")
                except MirrorReadOnly:
                    print("refused: only its upstream writes to a mirror")


def follow_for_a_while(routes: foldlog.Store, upstream: LogFile, copy: Path) -> None:
    with foldlog.mirror(copy, upstream, prefix="eu/") as mirror:
        mirror.wait_synced()
        print(f"synced: {len(mirror)} routes, the link is {mirror.link.state}")
        with mirror.watch(since=mirror.snapshot()) as watch:
            watch.next(10)  # Synced
            routes.put("eu/4", b"10.0.0.4")
            routes.delete("eu/1")
            for _ in range(2):
                event = watch.next(10)
                assert isinstance(event, Changed)
                print(f"changed: {type(event.update).__name__} {event.update.key}")


if __name__ == "__main__":
    main()
