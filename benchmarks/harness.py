"""What the smaller benchmarks share: their options, their tables, and the memory of a process."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=formatter)


def rollup_kb(*fields: str, pid: int | str = "self") -> int:
    """The sum of some fields of a process's /proc/PID/smaps_rollup, in units of 1024 bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    rows = (line.split() for line in lines)
    return sum(int(row[1]) for row in rows if row[0].rstrip(":") in fields)


def private_kb(pid: int | str = "self") -> int:
    """The private memory of a process, in units of 1024 bytes."""
    return rollup_kb("Private_Clean", "Private_Dirty", pid=pid)


def timed(work: Callable[[], object]) -> float:
    """The time that it takes, in seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def each(call: Callable[[Any], object], values: Iterable[Any]) -> None:
    for value in values:
        call(value)


class Table:
    """A Markdown table, whose rows are printed as they come, and kept in a file, if there is
    one."""

    def __init__(self, before: str = "", file: Path | None = None) -> None:
        self._file, self.rows = file, list[tuple[str, str, str]]()
        print(f"{before}{os.cpu_count()} CPUs; load {os.getloadavg()[0]:.1f} at the start\n")
        print("| what | measured | goal |\n|---|---|---|", flush=True)

    def row(self, what: str, measured: str, goal: str = "-") -> None:
        self.rows.append((what, measured, goal))
        print(f"| {what} | {measured} | {goal} |", flush=True)
        if self._file is not None:
            rows = ",\n".join(json.dumps(row) for row in self.rows)
            self._file.write_text(f"[\n{rows}\n]\n")
