"""What commands do with a directory, which is a RocksDB database. `rocksdict` is imported only
then."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click

from foldlog.cli.show import (
    counted,
    print_rows,
    printable,
    progress_bar,
    size_text,
    token_json,
    token_text,
)
from foldlog.protocol.errors import FoldlogError, InvalidFormatError
from foldlog.protocol.options import OnDamage
from foldlog.protocol.store import FormatName
from foldlog.storage.artifacts.artifact import ExportManifest, export_fold
from foldlog.storage.engines.rocksdb import RocksDbFold, RocksDbSnapshot
from foldlog.storage.engines.rocksdb.database.opening import look_at
from foldlog.storage.engines.rocksdb.database.state import directory_bytes
from foldlog.storage.engines.rocksdb.exchange.convert import (
    Streamed,
    log_from_rocksdb,
    rocksdb_from_log,
)
from foldlog.storage.engines.rocksdb.exchange.reading import access_of, stored_fold
from foldlog.storage.engines.rocksdb.exchange.verify import RocksDbReport, describe, verify_database
from foldlog.storage.formats.format import Loaded, Progress

ROCKSDB = "rocksdb"
"""The value of --to that is no file format."""


@contextlib.contextmanager
def needs_extra() -> Iterator[None]:
    """A missing extra is reported like any other error: with what to install."""
    try:
        yield
    except ImportError as error:
        if error.name != "rocksdict":
            raise
        raise FoldlogError(str(error)) from error


def refuse_directory(log: Path, why: str) -> None:
    """For a command that only works on logs: InvalidFormatError for a database, IsADirectoryError
    for another directory."""
    if not log.is_dir():
        return
    if not _holds_database(log):
        raise IsADirectoryError(errno.EISDIR, "is a directory, not a log", str(log))
    raise InvalidFormatError(log, 0, f"is a RocksDB database, not a log: {why}")


def _holds_database(directory: Path) -> bool:
    """True if it looks like RocksDB's, whatever its state."""
    return "CURRENT" in os.listdir(directory)


def refuse_format(log: Path, format_name: FormatName | None) -> None:
    """ValueError if a file format is asked for, where there are no files of one format."""
    if format_name is not None:
        raise ValueError(f"{log}: --format is for logs; a RocksDB database has only one format")


def is_database(path: Path) -> bool:
    """True for a database, False if `path` is no directory. IsADirectoryError for another
    directory; CorruptLogError or InvalidFormatError for a database that must not be opened."""
    if not path.is_dir():
        return False
    try:
        with needs_extra():
            return look_at(path, create=False)
    except InvalidFormatError:
        if _holds_database(path):
            raise
        reason = "is a directory, but not a RocksDB database"
        raise IsADirectoryError(errno.EISDIR, reason, str(path)) from None


@contextlib.contextmanager
def read_database(path: Path) -> Iterator[RocksDbFold]:
    """The state of a database, which may be open elsewhere. Changes nothing."""
    with needs_extra(), stored_fold(path) as fold:
        yield fold


def open_database(
    path: Path, on_damage: OnDamage, format_name: FormatName | None
) -> RocksDbSnapshot:
    """The store in a database, for writing."""
    refuse_format(path, format_name)
    with needs_extra():
        return RocksDbSnapshot.open(path, on_damage=on_damage)[1]


def print_facts(path: Path, as_json: bool) -> None:
    """What `info` prints of a database."""
    with needs_extra():
        facts = describe(path)
    if as_json:
        fields = {
            "path": str(facts.path),
            "format": ROCKSDB,
            "size_bytes": facts.size,
            "tables": facts.tables,
            "store_id": facts.store_id.hex(),
            "sequence": facts.seq,
            "cursor": token_json(facts.cursor),
            "entries_estimate": facts.entries,
        }
        click.echo(json.dumps(fields))
        return
    rows = [
        ("path", printable(str(facts.path))),
        ("size", f"{size_text(facts.size)} in {counted(facts.tables, 'table')} and logs"),
        ("format", "a RocksDB database"),
        ("store id", facts.store_id.hex()),
        ("sequence", f"{facts.seq:,}"),
        ("cursor", token_text(facts.cursor)),
        ("entries", f"about {facts.entries:,}"),
    ]
    print_rows(rows)


def verify(path: Path, as_json: bool) -> bool:
    """Check a database, and print what is wrong. True if nothing is."""
    with needs_extra(), progress_bar("verifying", "entries") as progress:
        report = verify_database(path, progress)
    if as_json:
        click.echo(json.dumps(_report_json(report)))
        return report.ok
    for problem in report.problems:
        click.echo(printable(problem))
    verdict = "ok" if report.ok else f"damaged, {counted(len(report.problems), 'problem')}"
    held = f"{counted(report.entries, 'entry')} in {counted(report.tables, 'table')}"
    where = f"up to batch {report.seq:,} at cursor {token_text(report.cursor)}"
    click.echo(
        f"{printable(str(report.path))}: {verdict}: {size_text(report.size)}, {held} {where}"
    )
    return report.ok


def _report_json(report: RocksDbReport) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "ok": report.ok,
        "size_bytes": report.size,
        "tables": report.tables,
        "entries": report.entries,
        "sequence": report.seq,
        "cursor": token_json(report.cursor),
        "problems": list(report.problems),
    }


def export(
    path: Path, dest_dir: Path, format_name: FormatName | None, progress: Progress | None
) -> ExportManifest:
    """Export a database: by a checkpoint, for which it must not be open elsewhere; or, in the
    format of a log, from what can be read of it."""
    with needs_extra():
        if format_name is None:
            with open_database(path, "refuse", None) as snap:
                return snap.export_to(dest_dir, progress)
        with stored_fold(path) as fold:
            return export_fold(
                Streamed(fold),
                dest_dir,
                format=format_name,
                source=access_of(path),
                progress=progress,
            )


def import_(artifact_dir: Path, dest: Path, progress: Progress | None) -> ExportManifest:
    """Import the artifact of a database."""
    from foldlog.storage.engines.rocksdb.exchange.artifact import import_artifact

    with needs_extra():
        return import_artifact(artifact_dir, dest, progress=progress)


def convert(
    source: Path, dest: Path, to: str, progress: Progress | None
) -> tuple[int, Loaded | None]:
    """Convert from a database, or to one. Returns the number of entries, and what was read of a
    log."""
    with needs_extra():
        if to == ROCKSDB:
            refuse_directory(source, "a database can be converted to a log only")
            return rocksdb_from_log(source, dest, progress)
        return log_from_rocksdb(source, dest, cast(FormatName, to), progress), None


def size_of(path: Path) -> int:
    """Bytes of a log, or of all files of a database."""
    return directory_bytes(path) if is_database(path) else os.stat(path).st_size
