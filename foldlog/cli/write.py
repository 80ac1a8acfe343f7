"""Commands that write a log: `apply`, `compact`, `import`. They hold the writer's lock while they run."""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import click

from foldlog.cli.args import format_option, log_argument, on_damage_option
from foldlog.cli.read import manifest_json, payload_bytes
from foldlog.cli.show import counted, printable, progress_bar, size_text, token_json, token_text
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
from foldlog.storage.artifacts.artifact import import_artifact
from foldlog.storage.engines.append_log import AppendLogSnapshot
from foldlog.storage.formats.format import Progress
from foldlog.storage.log.files import resolve

DEFAULT_BATCH = 1000
PAUSE_S = 0.1
"""How long the input may be silent before what is pending is applied."""


def tell_of_a_copy(report: OpenReport) -> None:
    """Say on standard error what a copy of a log lacks that was taken while the log was written to."""
    if report.missing_batches:
        lacks = f"the last {counted(report.missing_batches, 'batch')}"
        click.echo(
            f"{printable(str(report.path))} is a copy, taken while the log was written to:"
            f" it lacks {lacks}; its cursor is {token_text(report.cursor)}",
            err=True,
        )


@dataclass(slots=True)
class Tally:
    """What became of a change stream."""

    applied: int = 0
    """Changes."""
    skipped: int = 0
    """Changes that the log held already."""
    batches: int = 0
    interrupted: bool = False
    """Ctrl-C ended it."""


class BadStreamError(ValueError):
    """A stream that ended in a line that is not a change, or that cannot be resumed. `tally` was applied before."""

    def __init__(self, reason: str, tally: Tally, cursor: str) -> None:
        super().__init__(reason, tally, cursor)
        self.reason, self.tally, self.cursor = reason, tally, cursor

    def __str__(self) -> str:
        if not self.tally.batches:
            return f"{self.reason}; nothing was applied"
        done = f"{counted(self.tally.applied, 'change')} in {counted(self.tally.batches, 'batch')}"
        return f"{self.reason}; applied before it, and kept: {done}, up to cursor {self.cursor}"


def fold_stream(
    snap: AppendLogSnapshot,
    changes: Iterable[Change | None],
    name: str,
    batch_size: int = DEFAULT_BATCH,
) -> Tally:
    """Apply `changes`, which come from `name`, after the cursor of `snap`. Cost: about 8 us a change, parsing included.

    None among the changes is a pause: what is pending is applied. The last position may not be complete then, so the cursor
    stays before it until another one, or the end, follows.

    Ctrl-C applies what is pending, except for the last position, whose lines may not all have come, and is told in the tally.
    BadStreamError for a line that is no change: the batches before it stay applied, what is pending is not.
    """
    tally, resume, batcher = Tally(), Resume(snap.cursor()), Batcher(batch_size)

    def apply(batch: list[Change], cursor: WatchCursor | None = None) -> None:
        if batch:
            snap.apply(
                [change.update for change in batch],
                batch[-1].cursor if cursor is None else cursor,
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
                f"{name}: cannot resume: the log stands at cursor {cursor}, which no line has",
                tally,
                cursor,
            )
        apply(batcher.rest())
        if batcher.begun is not None:
            snap.apply((), batcher.begun)
    except KeyboardInterrupt:
        tally.interrupted = True
        apply(batcher.settled())
    except BadLineError as error:
        raise BadStreamError(str(error), tally, token_text(snap.cursor())) from None
    tally.skipped = resume.skipped
    return tally


@click.command(
    epilog="""Example: echo '{"op": "put", "key": "a", "value": "1", "cursor": 1}' | foldlog apply routes.log""",
)
@log_argument
@click.argument("file", type=click.File("rb"), default="-")
@click.option(
    "--batch",
    "batch_size",
    type=click.IntRange(min=1),
    default=DEFAULT_BATCH,
    show_default=True,
    help="Changes a batch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@on_damage_option
@format_option(
    "The format of a new LOG; one that exists must be of it. Without it: foldlog's own, or that of LOG."
)
def apply(
    log: Path,
    file: BinaryIO,
    batch_size: int,
    as_json: bool,
    on_damage: OnDamage,
    format_name: FormatName | None,
) -> None:
    """Apply the change stream in FILE (or stdin) to LOG, from the cursor on that LOG stands at. Creates LOG if there is none.

    A line is a JSON object: op (put, delete or purge), key, value or value_base64 (of a put), cursor, and maybe version. A cursor
    or a version is a number or the hex of up to 10 bytes. Lines with the same cursor are never split into two batches.

    Lines that LOG holds already are skipped: numbers up to its cursor, or all lines up to the one with its cursor. A bad
    line ends it with exit code 2, and what was applied before stays. Ctrl-C applies what has come, and ends with 130.

    When a pipe pauses for 100 ms, what has come is applied. More lines with the last cursor may follow, so LOG's cursor moves to
    it once a line with another one comes, or the end.
    """
    name = "stdin" if getattr(file, "name", "-") in ("-", "<stdin>") else printable(str(file.name))
    with progress_bar("applying", "bytes") as progress:
        _, snap = AppendLogSnapshot.open(
            log, format=format_name, on_damage=on_damage, progress=progress
        )
        tell_of_a_copy(snap.report)
        with snap:
            start = time.perf_counter()
            tally = fold_stream(snap, read_changes(_lines(file, progress), name), name, batch_size)
            elapsed_s = time.perf_counter() - start
            cursor = snap.cursor()
    rate = tally.applied / elapsed_s if elapsed_s else 0.0
    if as_json:
        facts = {
            **asdict(tally),
            "cursor": token_json(cursor),
            "elapsed_s": round(elapsed_s, 6),
            "changes_per_s": round(rate),
        }
        click.echo(json.dumps(facts))
    else:
        click.echo(
            f"applied {counted(tally.applied, 'change')} in {counted(tally.batches, 'batch')}, skipped {tally.skipped:,}; "
            f"cursor {token_text(cursor)}; {rate:,.0f} changes/s"
        )
    if tally.interrupted:
        raise click.exceptions.Exit(130)


def _lines(file: BinaryIO, progress: Progress | None) -> Iterator[bytes | None]:
    """The lines of a file; of a pipe or terminal also None, whenever nothing came for `PAUSE_S`."""
    size = _size(file)
    try:
        waits = not stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (OSError, ValueError):
        waits = False
    return (
        lines_with_pauses(file.fileno(), PAUSE_S, progress)
        if waits
        else lines_of(file, progress, size)
    )


def _size(file: BinaryIO) -> int:
    """The size of a regular file; 0, for unknown, of anything else."""
    try:
        status = os.fstat(file.fileno())
    except (OSError, ValueError):
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


@click.command(epilog="Example: foldlog compact routes.log")
@log_argument
@on_damage_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def compact(log: Path, on_damage: OnDamage, as_json: bool) -> None:
    """Rewrite LOG as its state: one entry for each live key, and no history. Takes the space of both files meanwhile."""
    path = resolve(log)
    before = os.stat(
        path
    ).st_size  # also refuses a log that is not there, which opening would create
    with progress_bar("compacting", "entries", before) as progress:
        _, snap = AppendLogSnapshot.open(path, on_damage=on_damage, progress=progress)
        tell_of_a_copy(snap.report)
        with snap:
            entries, compacted = len(snap), snap.report.compacted
    after = os.stat(path).st_size
    if as_json:
        facts = {
            "compacted": compacted,
            "size_before_bytes": before,
            "size_bytes": after,
            "entries": entries,
        }
        click.echo(json.dumps({"path": str(path), **facts}))
        return
    done = "compacted" if compacted else "was compact already"
    click.echo(
        f"{done}: {size_text(before)} before, {size_text(after)} after, {counted(entries, 'entry')}"
    )


@click.command("import", epilog="Example: foldlog import backup-1 routes.log")
@click.argument("artifact_dir", type=click.Path(path_type=Path))
@click.argument("dest", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@format_option("The format of DEST; without it, foldlog's own.")
def import_(artifact_dir: Path, dest: Path, as_json: bool, format_name: FormatName | None) -> None:
    """Verify the artifact at ARTIFACT_DIR in full, and make a log of it at DEST, which must not exist.

    The artifact is one of foldlog, or one of the append log of the Rust crate beyond-slipstream; its manifest tells.
    """
    if not artifact_dir.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "no such folder", str(artifact_dir))
    with progress_bar("importing", "bytes") as progress:
        manifest = import_artifact(artifact_dir, dest, format=format_name, progress=progress)
    if as_json:
        click.echo(json.dumps({"dest": os.fspath(dest), **manifest_json(manifest)}))
        return
    click.echo(
        f"imported {size_text(payload_bytes(manifest))} at cursor {token_text(manifest.cursor)} to {printable(str(dest))}"
    )


COMMANDS = (apply, compact, import_)
