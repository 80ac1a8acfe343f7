"""What the commands print: text that is safe for a terminal, JSON, sizes, and progress bars.

Results go to stdout, always in UTF-8. Errors and progress go to stderr; progress only if that is a
terminal.
"""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from foldlog.protocol.tokens import VersionToken, WatchCursor
from foldlog.protocol.updates import KvEntry, Update
from foldlog.storage.formats.format import Progress

REFRESH_S = 0.1
"""Seconds between updates of a progress bar, which cost about 20 us each."""


def report(facts: dict[str, Any], text: str, as_json: bool) -> None:
    """Print an outcome: as one JSON object, or as text."""
    click.echo(json.dumps(facts) if as_json else text)


def print_rows(rows: Iterable[tuple[str, str | None]]) -> None:
    """Print (name, value) rows in two columns. A value of None has no row."""
    for name, value in rows:
        if value is not None:
            click.echo(f"{name:<11} {value}")


def printable(text: str) -> str:
    """`text` with unprintable characters escaped as \\xNN, \\uNNNN or \\UNNNNNNNN, like
    `backslashreplace`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(ord(char)) for char in text)


def _escaped(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def value_text(value: bytes) -> str:
    """A value as printable text, on one line."""
    return printable(value.decode("utf-8", "backslashreplace"))


def terminal_text(value: bytes) -> str:
    """A value as text that is safe for a terminal: tabs and newlines stay, other unprintable
    characters are escaped."""
    shown = printable_lines(value.decode("utf-8", "backslashreplace"))
    return shown if shown.endswith("\n") else shown + "\n"


def printable_lines(text: str) -> str:
    """Like `printable`, but tabs and newlines stay."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else _escaped(ord(char)) for char in text
    )


def token_json(token: VersionToken | WatchCursor) -> int | str | None:
    """A token as in the change stream: a u64 as a number, other bytes in hex, the empty token as
    None."""
    number = token.as_u64()
    return number if number is not None else token.hex() or None


def token_text(token: VersionToken | WatchCursor) -> str:
    """A token for humans."""
    return token.shown


def op_text(update: Update) -> str:
    """The `op` of an update in the change stream: put, delete or purge."""
    return type(update).__name__.lower()


def entry_json(entry: KvEntry) -> dict[str, Any]:
    """An entry as a put in the change stream: `value` if it is UTF-8, else `value_base64`."""
    fields: dict[str, Any] = {"key": entry.key}
    try:
        fields["value"] = entry.value.decode()
    except UnicodeDecodeError:
        fields["value_base64"] = base64.b64encode(entry.value).decode()
    fields["version"] = token_json(entry.version)
    return fields


def size_text(size: int) -> str:
    """A size in bytes for humans: exact, and from 1 MiB on also in MiB."""
    if size < 1024 * 1024:
        return f"{size:,} bytes"
    return f"{size:,} bytes ({size / 1024 / 1024:,.1f} MiB)"


_PLURALS = {"batch": "batches", "entry": "entries", "leaf": "leaves", "loss": "losses"}


def counted(count: int, noun: str) -> str:
    """A count with its noun: 1 batch, 2 batches."""
    return f"{count:,} {noun if count == 1 else _PLURALS.get(noun, noun + 's')}"


def rate_text(per_s: float | None, unit: str) -> str:
    """A rate for humans: 3.4 MB/s, 12,000 entries/s; "" if not known yet."""
    if per_s is None:
        return ""
    if unit == "bytes":
        return f"{per_s / 1e6:,.1f} MB/s"
    return f"{per_s:,.0f} {unit}/s" if unit else f"{per_s:,.0f}/s"


@contextmanager
def progress_bar(
    label: str, unit: str = "", file_size: int | None = None
) -> Iterator[Progress | None]:
    """Show a progress bar on stderr, with rate and time left, while the block runs. Yields its
    callback (done, total).

    Yields None if stderr is not a terminal. A total of 0 means unknown. The total may change: each
    step of a longer job fills the bar again. `unit`: what is counted. `file_size`: a step with this
    total counts bytes, whatever the unit.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console  # imported here: the import takes longer than a `get`
    from rich.progress import (
        BarColumn,
        ProgressColumn,
        Task,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            counted_unit = "bytes" if file_size is not None and task.total == file_size else unit
            return Text(
                rate_text(task.finished_speed or task.speed, counted_unit), "progress.data.speed"
            )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        Rate(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(label, total=None)
        due = 0.0

        def show(done: int, total: int) -> None:
            nonlocal due
            now = time.monotonic()
            if now >= due:
                due = now + REFRESH_S
                bars.update(task, completed=done, total=total or None)

        yield show
