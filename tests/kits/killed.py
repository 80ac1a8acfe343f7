"""A program that is killed, for faults/test_kill.py. It forks a child per death; reports answers.

    killed.py STORY WHEN FOLDER FIRST STRIDE COUNT

For n = FIRST, FIRST + STRIDE, ... a child works on the log FOLDER/n/state.log, and writes each
answer to a pipe. WHEN:

    call       it kills itself, kill -9, before its n-th I/O call
    moment     it is killed some microseconds after an answer, while it works; n is the seed
    same-log   the same, but all children work on FOLDER/state.log, one after the other

A line of JSON describes each: {"n", "acked", "done", "error"}. Ends when a child completes, or
after COUNT deaths.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faultkit import batch

import foldlog
from foldlog import AppendLogSnapshot, RocksDbSnapshot, WatchCursor
from foldlog.storage.log.files import Files
from foldlog.testing import Call, FaultyFiles

Answer = Callable[[int], None]
TOGETHER = 4
STORY_BATCHES = 12


def numbered(number: int) -> WatchCursor:
    return WatchCursor.from_u64(number)


def engine(path: Path, files: Files, answer: Answer, last: int) -> None:
    """The engine applies, compacts each 5 batches, exports each 7, and starts anew each 9."""
    alone(lambda: AppendLogSnapshot.open(path, files=files), path, answer, last)


def alone(
    reopen: Callable[[], tuple[WatchCursor, Any]], path: Path, answer: Answer, last: int
) -> None:
    """The story of an engine."""
    cursor, snap = reopen()
    for number in range((cursor.as_u64() or 0) + 1, last + 1):
        snap.apply(batch(number), numbered(number))
        answer(number)
        if number % 5 == 0:
            snap.compact()
        if number % 7 == 0:
            snap.export_to(path.with_name(f"artifact-{number}"))
        if number % 9 == 0:
            snap.close()
            _, snap = reopen()
    snap.close()


def store(path: Path, files: Files, answer: Answer, last: int) -> None:
    """The store applies, many at a time, and compacts and exports behind it."""
    with foldlog.open(
        path, files=files, sync="always", compact_threshold=2000, readers=1
    ) as opened:
        for first in range((opened.cursor().as_u64() or 0) + 1, last + 1, TOGETHER):
            numbers = range(first, min(first + TOGETHER, last + 1))
            futures = [
                opened.apply_async(batch(number), numbered(number), timeout_s=60)
                for number in numbers
            ]
            for number, future in zip(numbers, futures, strict=True):
                future.result(60)
                answer(number)
            if first % 3 == 0:
                opened.export_to(path.with_name(f"artifact-{first}"))


def importing(path: Path, files: Files, answer: Answer, last: int) -> None:
    """An artifact is made, and imported to where the log shall stand."""
    source = path.with_name("source.log")
    _, snap = AppendLogSnapshot.open(source, files=files)
    for number in range(1, last + 1):
        snap.apply(batch(number), numbered(number))
    snap.export_to(path.with_name("artifact-0"))
    snap.close()
    AppendLogSnapshot.import_artifact(path.with_name("artifact-0"), path, files=files)[1].close()
    for number in range(1, last + 1):
        answer(number)


def rocksdb(path: Path, files: Files, answer: Answer, last: int) -> None:
    """The RocksDB engine applies, flushes every 5 batches, exports every 7, restarts every 9."""
    alone(lambda: RocksDbSnapshot.open(path), path, answer, last)


def rocksdb_store(path: Path, files: Files, answer: Answer, last: int) -> None:
    """The store on RocksDB applies, and compacts each 10 batches."""
    with foldlog.open(path, backend="rocksdb", readers=1) as opened:
        for number in range((opened.cursor().as_u64() or 0) + 1, last + 1):
            opened.apply(batch(number), numbered(number))
            answer(number)
            if number % 10 == 0:
                opened.compact()


STORIES = {
    "engine": engine,
    "store": store,
    "importing": importing,
    "rocksdb": rocksdb,
    "rocksdb_store": rocksdb_store,
}


def child(story: str, when: str, path: Path, nth: int, pipe: int) -> None:
    """Work until killed. Leaves only by _exit: nothing of the parent is flushed or run twice."""
    try:

        def die(call: Call) -> None:
            if call.total == nth:
                os.kill(os.getpid(), signal.SIGKILL)

        files = FaultyFiles(hook=die if when == "call" else None)
        last = STORY_BATCHES if when == "call" else 1_000_000
        STORIES[story](path, files, lambda number: os.write(pipe, b"%d\n" % number) and None, last)
        os.write(pipe, b"done\n")
    except BaseException as error:
        os.write(pipe, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(0)


def heard(pipe: int) -> bytes:
    """All that is still in the pipe."""
    parts = []
    while part := os.read(pipe, 65536):
        parts.append(part)
    return b"".join(parts)


def kill_behind(pid: int, pipe: int, seed: int) -> bytes:
    """Kill the child after an answer and a seeded delay; returns what it had answered by then."""
    chance = random.Random(seed)
    answers, least = b"", chance.randrange(40)
    while answers.count(b"\n") < least:
        answers += os.read(pipe, 65536)
    stop_s = time.perf_counter() + chance.random() ** 3 * 0.01
    while time.perf_counter() < stop_s:
        pass
    os.kill(pid, signal.SIGKILL)
    return answers


def main() -> None:
    story, when, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    first, stride, count = map(int, sys.argv[4:])
    for n in range(first, first + stride * count, stride):
        path = folder / "state.log" if when == "same-log" else folder / str(n) / "state.log"
        path.parent.mkdir(exist_ok=True)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            child(story, when, path, n, writing)
        os.close(writing)
        answers = b"" if when == "call" else kill_behind(pid, reading, n)
        answers += heard(reading)
        os.close(reading)
        os.waitpid(pid, 0)
        lines = answers.decode().split("\n")[
            :-1
        ]  # the last answer may be cut off: it was not given
        done = lines[-1:] == ["done"]
        error = next((line for line in lines if not line.isdigit() and line != "done"), None)
        acked = [int(line) for line in lines if line.isdigit()]
        print(json.dumps({"n": n, "acked": acked, "done": done, "error": error}), flush=True)
        if done:
            break


if __name__ == "__main__":
    main()
