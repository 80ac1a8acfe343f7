"""A mirror: a second process's own copy of a log, prefix by prefix, exact while it runs and after
it was away.

Run: python examples/mirror_of_a_log.py For a bucket of NATS, put NatsKv("nats://127.0.0.1:4222",
bucket="routes") in place of LogFile(source).
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

            routes.delete("eu/3")  # nobody is told now, and the history goes
            routes.compact()
            with foldlog.mirror(copy, LogFile(source), prefix="eu/") as mirror:
                mirror.wait_synced()
                print("while it was away:", dict(mirror.snapshot().items()))
                try:
                    mirror.put("eu/9", b"")
                except MirrorReadOnly:
                    print("refused: a mirror is written by its upstream")


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
                print(f"told: {type(event.update).__name__} {event.update.key}")


if __name__ == "__main__":
    main()
