"""An embedded store keeps working while its actors crash, and loses nothing that it has confirmed.

Four threads write. Meanwhile the store's writer, readers and maintenance are crashed repeatedly at
the worst moments, such as between writing a batch and answering it. At the end, the log is read and
compared with what was confirmed.

    python examples/embedded_survives_crashes.py
"""

from __future__ import annotations

import logging
import random
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import foldlog
from foldlog import AppendLogSnapshot, Put, WatchCursor, WriterCrashed

CRASHES = 12
BATCHES = 100
THREADS = 4


class Saboteur:
    """Crashes an actor every 5 to 20 steps of the store's actors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._random = random.Random(7)
        self._countdown = 20
        self.crashes = 0

    def __call__(self, step: str) -> None:
        with self._lock:
            if self.crashes == CRASHES or step.endswith((".start", ".stop")):
                return
            self._countdown -= 1
            if self._countdown:
                return
            self._countdown = self._random.randrange(5, 20)
            self.crashes += 1
        raise SystemExit(f"sabotage at {step}")


def write(store: foldlog.Store, thread: int) -> list[str]:
    """Write batches, and return the keys of those that were confirmed."""
    confirmed = []
    for number in range(BATCHES):
        key = f"{thread}/{number}"
        try:
            store.apply(
                [Put(f"a/{key}", b"x"), Put(f"b/{key}", b"x")], WatchCursor.from_u64(number)
            )
        except WriterCrashed:
            continue  # hit by two crashes in a row: certainly not applied
        confirmed.append(key)
    return confirmed


def main(path: Path) -> None:
    # Otherwise each crash is logged with its traceback.
    logging.getLogger("foldlog").setLevel(logging.CRITICAL)
    saboteur = Saboteur()
    # By default, the supervisor backs off longer with each restart in a row, and gives up after
    # five within a minute. This program crashes more often on purpose, so it raises the limit.
    with foldlog.open(path, step=saboteur, max_restarts=CRASHES, restart_window_s=0.1) as store:
        with ThreadPoolExecutor(THREADS) as pool:
            confirmed = [
                key
                for keys in pool.map(lambda thread: write(store, thread), range(THREADS))
                for key in keys
            ]
        print(
            f"{saboteur.crashes} crashes, {len(store.stats().restarts)} restarts; "
            f"the store is {store.state}"
        )
    _, log = AppendLogSnapshot.open(path)
    with log:
        found = {entry.key for entry in log.range("")}
        batches = log.snapshot().seq
    assert found == {f"{half}/{key}" for half in "ab" for key in confirmed}
    assert batches == len(confirmed)
    print(
        "every confirmed batch is in the log, whole, and once"
        if len(confirmed) > THREADS * BATCHES // 2
        else "too few"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "state.log")
