"""Commands that follow a log while another process writes it: `tail` and `get --follow`. Read only;
they take no lock."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from foldlog.actors.feeds.subscription import Since
from foldlog.actors.following.follower import FollowerState
from foldlog.cli import database
from foldlog.cli.args import checked, json_option, log_argument, utf8
from foldlog.cli.show import (
    counted,
    entry_json,
    op_text,
    printable,
    terminal_text,
    token_json,
    token_text,
    value_text,
)
from foldlog.follow import Follower, follow
from foldlog.protocol.events import Changed, Event, Lagged, Rewound, Synced
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import KvEntry, Put
from foldlog.storage.log.files import OS_FILES, resolve

CHECK_S = 0.5
"""How often to check the follower's state while no event arrives."""


@click.command(
    epilog="""\b
Examples:
  foldlog tail routes.log --prefix tenants/
  foldlog tail routes.log --since 4711 --no-follow --json"""
)
@log_argument
@click.option("--prefix", default="", callback=utf8, help="Only keys that start with this.")
@click.option(
    "--since",
    metavar="CURSOR",
    callback=checked(WatchCursor.parse),
    help="Start with the changes after this cursor instead of the state: a number, or hex (0x...).",
)
@json_option(
    "Print one JSON object per line: changes in the format that `foldlog apply` reads, and marks."
)
@click.option(
    "--no-follow",
    is_flag=True,
    help="Stop at the current end of the log instead of waiting for more.",
)
def tail(log: Path, prefix: str, since: WatchCursor | None, as_json: bool, no_follow: bool) -> None:
    """Print the state of LOG, a `# synced` line, then changes as they arrive, until Ctrl-C.

    A line is `put`, the key and the value, or `delete` (or `purge`) and the key, separated by tabs.
    Marks start with `#`. With --since, exit code 1 if the log no longer has the changes after that
    cursor. Waits for a log that does not exist yet, and keeps following through compactions and
    restarts of the writer. Problems are reported on stderr.
    """
    if no_follow:
        OS_FILES.stat(resolve(log))  # FileNotFoundError instead of an empty state
    database.refuse_directory(log, "a database cannot be followed")
    with follow(log) as follower:
        for event in _events(follower, prefix, since):
            sys.stdout.write((_json_line(event) if as_json else _text_line(event)) + "\n")
            if no_follow and isinstance(event, Synced):
                return


def follow_key(log: Path, key: str, as_json: bool) -> None:
    """Print the value of a key, then again at each change, until Ctrl-C."""
    database.refuse_directory(log, "a database cannot be followed")
    with follow(log) as follower:
        last: KvEntry | None = None
        for event in _events(follower, key, None):
            if isinstance(event, Synced):
                if last is None:
                    _note(f"{printable(str(log))}: no entry with key {printable(key)}; waiting")
            elif isinstance(event, Changed) and event.update.key == key:
                entry = KvEntry(*event.update) if isinstance(event.update, Put) else None
                if entry != last:
                    _print_entry(log, key, entry, as_json)
                last = entry


def _print_entry(log: Path, key: str, entry: KvEntry | None, as_json: bool) -> None:
    if as_json:
        fields = {"key": key, "deleted": True} if entry is None else entry_json(entry)
        sys.stdout.write(json.dumps(fields) + "\n")
    elif entry is None:
        _note(f"{printable(str(log))}: {printable(key)} was deleted")
    else:
        sys.stdout.flush()
        value = terminal_text(entry.value).encode() if sys.stdout.isatty() else entry.value + b"\n"
        sys.stdout.buffer.write(value)


def _events(follower: Follower, prefix: str, since: Since) -> Iterator[Event]:
    """The events of a watch, until it ends. When idle, flushes the output and reports changes of
    the follower's state on stderr."""
    reported = FollowerState.FOLLOWING
    with follower.watch(prefix, since) as watch:
        while True:
            event = watch.next(0.0)
            if event is None:
                sys.stdout.flush()
                reported = _report_state(follower, reported)
                event = watch.next(CHECK_S)
            if event is not None:
                yield event
            elif watch.ended is not None:
                return


def _report_state(follower: Follower, reported: FollowerState) -> FollowerState:
    stats = follower.stats()
    if stats.state is not reported and stats.state is not FollowerState.REPLACED:
        reason = f": {stats.reason}" if stats.reason else ""
        _note(f"{printable(str(follower.path))}: {stats.state}{printable(reason)}")
    return stats.state


def _note(text: str) -> None:
    sys.stdout.flush()
    click.echo(f"foldlog: {text}", err=True)


def _text_line(event: Event) -> str:
    if isinstance(event, Changed):
        update = event.update
        line = f"{op_text(update)}\t{printable(update.key)}"
        return f"{line}\t{value_text(update.value)}" if isinstance(update, Put) else line
    if isinstance(event, Synced):
        return f"# synced at cursor {token_text(event.cursor)}, batch {event.seq}"
    if isinstance(event, Lagged):
        what = f"{counted(event.batches, 'batch')} after cursor {token_text(event.cursor)}"
        return f"# lagged: {what} reported as their difference"
    return f"# rewound: {printable(event.reason)}"


def _json_line(event: Event) -> str:
    if isinstance(event, Changed):
        update = event.update
        fields: dict[str, Any] = {"op": op_text(update)}
        if isinstance(update, Put):
            fields |= entry_json(KvEntry(*update))
        else:
            fields |= {"key": update.key, "version": token_json(update.version)}
        return json.dumps(fields | {"cursor": token_json(event.cursor)})
    if isinstance(event, Synced):
        fields = {"mark": "synced", "cursor": token_json(event.cursor), "sequence": event.seq}
    elif isinstance(event, Lagged):
        fields = {"mark": "lagged", "cursor": token_json(event.cursor), "batches": event.batches}
    else:
        assert isinstance(event, Rewound)
        fields = {"mark": "rewound", "reason": event.reason}
    return json.dumps(fields)


COMMANDS = (tail,)
