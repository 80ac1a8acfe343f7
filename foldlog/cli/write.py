"""Commands that write a log: `apply`, `compact` and `import`. They hold the writer's lock while
they run."""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import click

from foldlog.cli import database
from foldlog.cli.args import format_option, json_option, log_argument, on_damage_option
from foldlog.cli.read import manifest_json, payload_bytes
from foldlog.cli.show import (
    counted,
    printable,
    progress_bar,
    report,
    size_text,
    token_json,
    token_text,
)
from foldlog.cli.stream import (
    BadLineError,
    Batcher,
    Change,
    Resume,
    lines_of,
    lines_with_pauses,
    read_changes,
)
from foldlog.protocol.engine import OpenReport
from foldlog.protocol.options import OnDamage
from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import WatchCursor
from foldlog.storage.artifacts.artifact import import_artifact, read_manifest
from foldlog.storage.engines.append_log import AppendLogSnapshot
from foldlog.storage.engines.rocksdb import RocksDbSnapshot
from foldlog.storage.engines.rocksdb.exchange.artifact import BACKEND
from foldlog.storage.formats.format import Progress
from foldlog.storage.log.files import resolve

DEFAULT_BATCH = 1000
PAUSE_S = 0.1
"""How long the input may pause before pending changes are applied."""


def report_missing_batches(report: OpenReport) -> None:
    """Report on stderr what is missing from a copy of a log that was taken during writes."""
    if report.missing_batches:
        lacks = f"the last {counted(report.missing_batches, 'batch')}"
        click.echo(
            f"{printable(str(report.path))} is a copy, taken while the log was being written:"
            f" it lacks {lacks}; its cursor is {token_text(report.cursor)}",
            err=True,
        )


@dataclass(slots=True)
class Tally:
    """The outcome of applying a change stream."""

    applied: int = 0
    """Changes applied."""
    skipped: int = 0
    """Changes that the log already held."""
    batches: int = 0
    interrupted: bool = False
    """Ended by Ctrl-C."""


class BadStreamError(ValueError):
    """A stream with an invalid line, or one that cannot be resumed. `tally` says what was applied
    before."""

    def __init__(self, reason: str, tally: Tally, cursor: str) -> None:
        super().__init__(reason, tally, cursor)
        self.reason, self.tally, self.cursor = reason, tally, cursor

    def __str__(self) -> str:
        if not self.tally.batches:
            return f"{self.reason}; nothing was applied"
        done = f"{counted(self.tally.applied, 'change')} in {counted(self.tally.batches, 'batch')}"
        return f"{self.reason}; already applied: {done}, up to cursor {self.cursor}"


def fold_stream(
    snap: AppendLogSnapshot | RocksDbSnapshot,
    changes: Iterable[Change | None],
    name: str,
    batch_size: int = DEFAULT_BATCH,
) -> Tally:
    """Apply those of `changes`, read from `name`, that are after the cursor of `snap`. Cost: about
    8 us a change, including parsing.

    None among the changes means a pause: pending changes are applied. The last position may still
    be incomplete, so the cursor stays before it until another position or the end follows.

    Ctrl-C applies pending changes except those of the last position, whose lines may not all have
    arrived, and sets `interrupted`. An invalid line raises BadStreamError: batches before it stay
    applied, pending changes are dropped.
    """
    tally, resume, batcher = Tally(), Resume(snap.cursor()), Batcher(batch_size)

    def apply(batch: list[Change], cursor: WatchCursor | None = None) -> None:
        if batch:
            snap.apply(
                [change.update for change in batch], batch[-1].cursor if cursor is None else cursor
            )
            tally.applied += len(batch)
            tally.batches += 1

    try:
        for change in changes:
            if change is None:
                complete, begun = batcher.pause()
                apply(complete)
                apply(begun, snap.cursor())
            elif not resume.is_held(change):
                apply(batcher.push(change))
        if resume.lost:
            cursor = token_text(snap.cursor())
            raise BadStreamError(
                f"{name}: cannot resume: no line has cursor {cursor}, which the log is at",
                tally,
                cursor,
            )
        apply(batcher.rest())
        if batcher.begun is not None:
            snap.apply((), batcher.begun)
    except KeyboardInterrupt:
        tally.interrupted = True
        complete, _ = batcher.pause()
        apply(complete)
    except BadLineError as error:
        raise BadStreamError(str(error), tally, token_text(snap.cursor())) from None
    tally.skipped = resume.skipped
    return tally


@click.command(
    epilog="""Example: echo '{"op": "put", "key": "a", "value": "1", "cursor": 1}' | """
    "foldlog apply routes.log"
)
@log_argument
@click.argument("file", type=click.File("rb"), default="-")
@click.option(
    "--batch",
    "batch_size",
    type=click.IntRange(min=1),
    default=DEFAULT_BATCH,
    show_default=True,
    help="Changes per batch.",
)
@json_option("Print the summary as one JSON object.")
@on_damage_option
@format_option(
    "The format of a new LOG; an existing LOG must have it. By default: foldlog's own, or "
    "that of LOG."
)
def apply(
    log: Path,
    file: BinaryIO,
    batch_size: int,
    as_json: bool,
    on_damage: OnDamage,
    format_name: FormatName | None,
) -> None:
    """Apply the change stream in FILE (or stdin) to LOG, resuming from LOG's cursor. Creates LOG if
    it does not exist.

    Each line is a JSON object: op (put, delete or purge), key, value or value_base64 (for a put),
    cursor, and optionally version. A cursor or version is a number, or the hex of up to 10 bytes.
    Lines with the same cursor are never split into two batches.

    Lines that LOG already holds are skipped: those numbered up to its cursor or, if cursors are not
    numbers, all up to the last line with its cursor. An invalid line ends the run with exit code 2;
    what was applied before stays. Ctrl-C applies what has arrived; exit code 130.

    When a pipe pauses for 100 ms, what has arrived is applied. As more lines with the last cursor
    may follow, LOG's cursor advances to it only at a line with another cursor, or at the end.
    """
    name = "stdin" if getattr(file, "name", "-") in ("-", "<stdin>") else printable(str(file.name))
    with progress_bar("applying", "bytes") as progress:
        snap: AppendLogSnapshot | RocksDbSnapshot
        if database.is_database(log):
            snap = database.open_database(log, on_damage, format_name)
        else:
            _, snap = AppendLogSnapshot.open(
                log, format=format_name, on_damage=on_damage, progress=progress
            )
        report_missing_batches(snap.report)
        with snap:
            start = time.perf_counter()
            tally = fold_stream(snap, read_changes(_lines(file, progress), name), name, batch_size)
            elapsed_s = time.perf_counter() - start
            cursor = snap.cursor()
    rate = tally.applied / elapsed_s if elapsed_s else 0.0
    facts = {
        **asdict(tally),
        "cursor": token_json(cursor),
        "elapsed_s": round(elapsed_s, 6),
        "changes_per_s": round(rate),
    }
    text = (
        f"applied {counted(tally.applied, 'change')} in {counted(tally.batches, 'batch')}, "
        f"skipped {tally.skipped:,}; cursor {token_text(cursor)}; {rate:,.0f} changes/s"
    )
    report(facts, text, as_json)
    if tally.interrupted:
        raise click.exceptions.Exit(130)


def _lines(file: BinaryIO, progress: Progress | None) -> Iterator[bytes | None]:
    """The lines of a file. For a pipe or terminal, also None once per pause of at least
    `PAUSE_S`."""
    try:
        status = os.fstat(file.fileno())
    except (OSError, ValueError):  # not a file of the operating system
        return lines_of(file, progress)
    if stat.S_ISREG(status.st_mode):
        return lines_of(file, progress, status.st_size)
    return lines_with_pauses(file.fileno(), PAUSE_S, progress)


@click.command(epilog="Example: foldlog compact routes.log")
@log_argument
@on_damage_option
@json_option()
def compact(log: Path, on_damage: OnDamage, as_json: bool) -> None:
    """Compact LOG: rewrite it as one entry per live key, without history. Needs disk space for both
    files meanwhile."""
    path = resolve(log)
    before = database.size_of(path)  # fails if LOG is missing; opening would create it
    with progress_bar("compacting", "entries", before) as progress:
        if database.is_database(path):
            with database.open_database(path, on_damage, None) as opened:
                opened.compact()
                entries, compacted = len(opened), True
        else:
            _, snap = AppendLogSnapshot.open(path, on_damage=on_damage, progress=progress)
            report_missing_batches(snap.report)
            with snap:
                entries, compacted = len(snap), snap.report.compacted
    after = database.size_of(path)
    facts = {
        "path": str(path),
        "compacted": compacted,
        "size_before_bytes": before,
        "size_bytes": after,
        "entries": entries,
    }
    done = "compacted" if compacted else "already compact"
    sizes = f"{size_text(before)} before, {size_text(after)} after"
    report(facts, f"{done}: {sizes}, {counted(entries, 'entry')}", as_json)


@click.command("import", epilog="Example: foldlog import backup-1 routes.log")
@click.argument("artifact_dir", type=click.Path(path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
@json_option()
@format_option("The format of DEST. By default, foldlog's own.")
def import_(artifact_dir: Path, dest: Path, as_json: bool, format_name: FormatName | None) -> None:
    """Verify the artifact at ARTIFACT_DIR in full, and write it as a log at DEST, which must not
    exist.

    The artifact is from foldlog or from the append log of the Rust crate beyond-slipstream; its
    manifest says which. One of a RocksDB database becomes a database again.
    """
    if not artifact_dir.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "no such directory", str(artifact_dir))
    with progress_bar("importing", "bytes") as progress:
        if read_manifest(artifact_dir).backend == BACKEND:
            database.refuse_format(artifact_dir, format_name)
            manifest = database.import_(artifact_dir, dest, progress)
        else:
            manifest = import_artifact(artifact_dir, dest, format=format_name, progress=progress)
    text = (
        f"imported {size_text(payload_bytes(manifest))} at cursor {token_text(manifest.cursor)} "
        f"to {printable(str(dest))}"
    )
    report({"dest": os.fspath(dest), **manifest_json(manifest)}, text, as_json)


COMMANDS = (apply, compact, import_)
