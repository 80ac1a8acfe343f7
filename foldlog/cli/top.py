"""The command `top`: a live view of a log, through a follower. Read only; works with or without a
writer."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from foldlog.actors.following.follower import FollowerState
from foldlog.cli import database
from foldlog.cli.args import checked, json_option, log_argument
from foldlog.cli.keyboard import Keyboard
from foldlog.cli.show import op_text, printable, size_text, token_json
from foldlog.follow import Follower, follow
from foldlog.protocol.errors import FoldlogError
from foldlog.protocol.frames import FILE_HEADER, FRAME_HEADER, KIND_BASE_END, parse_frame_header
from foldlog.protocol.options import PICTURE_INTERVAL_S
from foldlog.storage.fold.diff import diff
from foldlog.storage.formats.registry import read_own_header
from foldlog.storage.log.files import OS_FILES, ReadHandle, resolve
from foldlog.storage.log.sidecars.lock import writer_of

if TYPE_CHECKING:
    from rich.table import Table

RATE_WINDOW_S = 10.0
"""Rates are averages over this many seconds."""


class Picture(NamedTuple):
    """What `top` shows at one moment; as JSON, these are the fields."""

    path: str
    state: str
    reason: str
    sequence: int
    cursor: int | str | None
    entries: int
    batches_per_s: float | None
    """Average over the last `RATE_WINDOW_S`; None until there are two moments to compare."""
    size_bytes: int | None
    """None, like the next three, if there is no file or it cannot be read."""
    base_bytes: int | None
    """The part written by the last compaction."""
    appended_bytes: int | None
    """The part appended since, some of which a compaction may free."""
    written_unix_s: float | None
    """When the file was last written."""
    last_change: str | None
    """A key that changed between the last two refreshes that differ, and how; None if nothing has
    changed yet."""
    snapshot_age_s: float
    """Seconds since a batch was last seen, or since `top` started."""
    locked: bool | None
    """True if a writer has it open; None if unknown."""
    writer_pid: int | None


def base_end(handle: ReadHandle) -> int | None:
    """The offset of the end of a log's base; None if the frames do not lead there. Cost: a read of
    48 bytes per leaf."""
    seed, offset = read_own_header(handle).seed, FILE_HEADER.size
    while True:
        header = parse_frame_header(OS_FILES.read(handle.fd, FRAME_HEADER.size, offset), 0, seed)
        if header is None:
            return None
        offset += header.size
        if header.kind == KIND_BASE_END:
            return offset


class Watcher:
    """Takes pictures of a log through a follower."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        # (moment, sequence), the oldest about RATE_WINDOW_S ago
        self._seen: deque[tuple[float, int]] = deque()
        self._snapshot = follower.snapshot()
        self._last_change: str | None = None
        # (inode of the file, end of its base)
        self._base: tuple[int, int | None] | None = None

    def look(self, now: float) -> Picture:
        """The log at `now`, in seconds of a monotonic clock. Cost: the difference from the last
        picture."""
        stats, path = self._follower.stats(), self._follower.path
        size, base, written = self._file()
        writing = writer_of(OS_FILES, path)
        return Picture(
            path=str(path),
            state=str(stats.state),
            reason=stats.reason,
            sequence=stats.seq,
            cursor=token_json(stats.cursor),
            entries=stats.entries,
            batches_per_s=self._rate(now, stats.seq),
            size_bytes=size,
            base_bytes=base,
            appended_bytes=None if size is None or base is None else max(size - base, 0),
            written_unix_s=written,
            last_change=self._changed(),
            snapshot_age_s=round(stats.snapshot_age_s, 3),
            locked=writing.locked,
            writer_pid=writing.pid,
        )

    def _rate(self, now: float, seq: int) -> float | None:
        if self._seen and seq < self._seen[-1][1]:
            self._seen.clear()  # the log went back
        self._seen.append((now, seq))
        while len(self._seen) > 2 and self._seen[1][0] <= now - RATE_WINDOW_S:
            self._seen.popleft()
        then, before = self._seen[0]
        return round((seq - before) / (now - then), 1) if now > then else None

    def _changed(self) -> str | None:
        newest = self._follower.snapshot()
        if newest is not self._snapshot:
            change = next(diff(self._snapshot, newest), None)
            if change is not None:
                self._last_change = f"{op_text(change)} {change.key}"
            self._snapshot = newest
        return self._last_change

    def _file(self) -> tuple[int | None, int | None, float | None]:
        """The file's size, the end of its base, and when it was last written. Reads the file only
        if it is new."""
        try:
            with ReadHandle(OS_FILES, self._follower.path) as handle:
                status = OS_FILES.fstat(handle.fd)
                if self._base is None or self._base[0] != status.st_ino:
                    self._base = (status.st_ino, base_end(handle))
        except (OSError, FoldlogError):
            return None, None, None
        return status.st_size, self._base[1], status.st_mtime


def rows_of(picture: Picture, unix_s: float) -> list[tuple[str, str]]:
    """The (name, text) rows to show at `unix_s`."""
    writer = "unknown" if picture.locked is None else "none"
    if picture.locked:
        writer = "yes" if picture.writer_pid is None else f"process {picture.writer_pid}"
    then_unix_s = picture.written_unix_s
    written = "-" if then_unix_s is None else f"{_age(unix_s - then_unix_s)} ago"
    rate = "-" if picture.batches_per_s is None else f"{picture.batches_per_s:,.1f} batches/s"
    return [
        ("log", printable(picture.path)),
        ("state", picture.state + (f": {printable(picture.reason)}" if picture.reason else "")),
        ("writer", writer),
        ("sequence", f"{picture.sequence:,}"),
        ("rate", rate),
        ("cursor", "none" if picture.cursor is None else str(picture.cursor)),
        ("entries", f"{picture.entries:,}"),
        ("size", _size(picture.size_bytes)),
        ("  base", _size(picture.base_bytes)),
        ("  appended", _size(picture.appended_bytes)),
        ("last write", written),
        ("last change", printable(picture.last_change or "none seen")),
        ("snapshot", f"{_age(picture.snapshot_age_s)} old"),
    ]


def _size(size: int | None) -> str:
    return "-" if size is None else size_text(size)


def _age(seconds: float) -> str:
    """A duration for humans: 0.4 s, 12 s, 3 min, 5 h, 2 d."""
    seconds = max(seconds, 0.0)
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h" if seconds < 172_800 else f"{seconds / 86_400:.0f} d"


def _pictures(watcher: Watcher, wait: Callable[[], bool]) -> Iterator[Picture]:
    """Pictures, until `wait`, called between them, returns True."""
    while True:
        yield watcher.look(time.monotonic())
        if wait():
            return


def _text(picture: Picture) -> str:
    return "\n".join(f"{name:<12} {value}" for name, value in rows_of(picture, time.time()))


def _table(picture: Picture) -> Table:
    from rich.table import Table
    from rich.text import Text

    colours = {FollowerState.FOLLOWING: "green", FollowerState.WAITING: "yellow"}
    colour = colours.get(FollowerState(picture.state), "red")
    table = Table.grid(padding=(0, 2))
    for name, value in rows_of(picture, time.time()):
        style = colour if name == "state" else ""
        shown = Text(value, style, overflow="ellipsis", no_wrap=True)
        table.add_row(Text(name, "dim"), shown)
    return table


def _show_live(pictures: Iterator[Picture]) -> None:
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        for picture in pictures:
            live.update(_table(picture), refresh=True)


@click.command(
    epilog="Example: foldlog top routes.log (or, for scripts: foldlog top routes.log --once --json)"
)
@log_argument
@click.option(
    "--once",
    is_flag=True,
    help="Print the status once and exit. Exit code 2 if LOG does not exist.",
)
@json_option("Print each status as one line of JSON.")
@click.option(
    "--interval",
    "interval_s",
    type=float,
    callback=checked(PICTURE_INTERVAL_S.check),
    default=PICTURE_INTERVAL_S.default,
    show_default=True,
    help="Seconds between updates.",
)
def top(log: Path, once: bool, as_json: bool, interval_s: float) -> None:
    """Show LOG live until `q` or Ctrl-C: state, writer, sequence, batches per second, cursor,
    sizes, last change.

    Read only; takes no lock. Waits for a log that does not exist yet. To a pipe, a file or a dumb
    terminal, it prints one status after another, without colours.
    """
    if once:
        OS_FILES.stat(resolve(log))  # FileNotFoundError instead of an empty picture
    database.refuse_directory(log, "a database cannot be followed")
    with follow(log) as follower:
        live = not (once or as_json) and sys.stdout.isatty() and not _is_dumb()
        keyboard = Keyboard()
        with keyboard if live else nullcontext():
            pictures = _pictures(Watcher(follower), lambda: keyboard.wait_for("q", interval_s))
            if live:
                _show_live(pictures)
            else:
                _print(pictures, once, as_json)


def _is_dumb() -> bool:
    """True if the terminal cannot move its cursor."""
    return os.environ.get("TERM", "dumb").lower() in ("dumb", "unknown")


def _print(pictures: Iterator[Picture], once: bool, as_json: bool) -> None:
    for picture in pictures:
        fields: dict[str, Any] = picture._asdict()
        click.echo(json.dumps(fields) if as_json else _text(picture) + ("" if once else "\n"))
        if once:
            return


COMMANDS = (top,)
