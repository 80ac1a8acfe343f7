"""Hot typed reads, and applies from asyncio, compared with what a Python program would use instead.

    python benchmarks/faces.py [--seconds 1]

Each figure is the best of several rounds. Subjects take turns, so that a busy machine slows all of
them alike. Compare the ratios. Needs the extras `bench` and `test` (msgspec). Prints a Markdown
table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import diskcache
import msgspec
import sqlitedict

import foldlog
from foldlog import Put, aio

ENTRIES = 1000
ROUNDS = 15
CALLS = 2000
IN_FLIGHT = 100


class Route(msgspec.Struct, frozen=True):
    """A value with a few fields."""

    host: str
    port: int
    tags: tuple[str, ...]


def route(number: int) -> Route:
    return Route(f"10.0.{number % 250}.1", 8000 + number, ("a", "b"))


def typed_reads(folder: Path) -> dict[str, float]:
    """The time of a hot read of one typed value in us, by subject."""
    with (
        foldlog.open(folder / "r.log") as store,
        diskcache.Cache(folder / "diskcache") as cache,
        sqlitedict.SqliteDict(
            folder / "sqlitedict.db", autocommit=False, encode=json.dumps, decode=json.loads
        ) as table,
    ):
        view = foldlog.view(store, Route)
        plain: dict[str, Route] = {}
        updates = []
        for number in range(ENTRIES):
            key, value = f"route/{number:06}", route(number)
            plain[key] = value
            updates.append(Put(key, msgspec.json.encode(value)))
            cache[key] = value
            table[key] = msgspec.to_builtins(value)
        table.commit()
        store.apply(updates, 1)
        store.compact()
        decode = msgspec.json.Decoder(Route).decode
        key = "route/000500"
        reads: dict[str, Callable[[], Any]] = {
            "a plain dict": lambda: plain[key],
            "`store.get`, bytes": lambda: store.get(key),
            "`store.get`, decoded at each read": lambda: decode(store.get(key).value),
            "`foldlog.view`": lambda: view[key],
            "`diskcache`": lambda: cache[key],
            "`sqlitedict`": lambda: table[key],
        }
        slow = {"`diskcache`", "`sqlitedict`"}
        best = dict.fromkeys(reads, float("inf"))
        for _ in range(ROUNDS):
            for name, read in reads.items():
                calls = CALLS // 20 if name in slow else CALLS
                start = time.perf_counter()
                for _ in range(calls):
                    read()
                best[name] = min(best[name], (time.perf_counter() - start) / calls * 1e6)
        return best


async def _rate(apply: Callable[[int], Awaitable[Any]], seconds: float) -> float:
    done, ends = 0, time.perf_counter() + seconds
    start = time.perf_counter()
    while time.perf_counter() < ends:
        await asyncio.gather(*(apply(done + each) for each in range(IN_FLIGHT)))
        done += IN_FLIGHT
    return done / (time.perf_counter() - start)


async def applies(folder: Path, seconds: float) -> dict[str, float]:
    """Writes per second from one event loop, `IN_FLIGHT` at a time, by subject."""
    found: dict[str, float] = {}
    async with aio.open(folder / "a.log") as store:

        async def ours(number: int) -> None:
            await store.apply([Put(f"{number % ENTRIES}", b"x" * 100)], number)

        found["`foldlog.aio`"] = await _rate(ours, seconds)
    with diskcache.Cache(folder / "async-diskcache") as cache:

        async def theirs(number: int) -> None:
            await asyncio.to_thread(cache.set, f"{number % ENTRIES}", b"x" * 100)

        found["`diskcache`, in threads"] = await _rate(theirs, seconds)
    with sqlitedict.SqliteDict(folder / "async.db", autocommit=True) as table:

        async def also(number: int) -> None:
            await asyncio.to_thread(table.__setitem__, f"{number % ENTRIES}", b"x" * 100)

        found["`sqlitedict`, in threads"] = await _rate(also, seconds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each subject")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="foldlog-faces-") as folder:
        reads = typed_reads(Path(folder))
        rates = asyncio.run(applies(Path(folder), seconds))
    lines = ["| a hot typed read | us | beside `store.get` |", "|---|---|---|"]
    base = reads["`store.get`, bytes"]
    lines += [f"| {name} | {us:.2f} | {us / base:.2f} |" for name, us in reads.items()]
    lines += ["", f"| applies from asyncio, {IN_FLIGHT} in flight | a second |", "|---|---|"]
    lines += [f"| {name} | {rate:,.0f} |" for name, rate in rates.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
