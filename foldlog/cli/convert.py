"""The command `convert`: writes a log in another file format, or as a database, and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import click

from foldlog.cli import database
from foldlog.cli.args import json_option, log_argument
from foldlog.cli.read import read_log, read_state, report_torn
from foldlog.cli.show import (
    counted,
    printable,
    progress_bar,
    report,
    size_text,
    token_json,
    token_text,
)
from foldlog.protocol.options import FORMAT
from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import WatchCursor
from foldlog.storage.formats.registry import FORMATS, format_of
from foldlog.storage.formats.rewrite import write_new
from foldlog.storage.log.files import OS_FILES, ReadHandle, resolve, unused_path
from foldlog.storage.log.sidecars.lock import WriterLock


@click.command(epilog="Example: foldlog convert state.snap routes.log --to foldlog")
@log_argument
@click.argument("dest", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice((*FORMAT.words, database.ROCKSDB)),
    required=True,
    help="The format of DEST: foldlog's own, that of the Rust crate beyond-slipstream, or a RocksDB"
    " database.",
)
@json_option()
def convert(log: Path, dest: Path, to: str, as_json: bool) -> None:
    """Write the state of LOG, a log or a RocksDB database, in another format at DEST, which must
    not exist.

    LOG is only read. It may be open for writing; DEST then holds the state from the start of the
    conversion. DEST appears complete or not at all, with the same entries and cursor. The history
    is not copied; nor, with --to slipstream-v2, are the log id and the sequence. To or from a
    RocksDB database (a directory), the sequence is copied.
    """
    given = unused_path(OS_FILES, dest, "convert")
    if database.is_database(log) or to == database.ROCKSDB:
        with progress_bar("converting", "entries") as progress:
            entries, source_log = database.convert(log, dest, to, progress)
        if source_log is not None:
            report_torn(source_log)
        with read_state(dest) as state:
            cursor = state.cursor()
        _report(log, dest, (_format_of(log), to), entries, cursor, as_json)
        return
    with progress_bar("converting", "entries", os.stat(log).st_size) as progress:
        handle, loaded = read_log(log, progress)
        fold, source = loaded.fold, OS_FILES.access(handle.fd)
        lock = WriterLock(OS_FILES, resolve(given))
        try:
            # A note left by an earlier log at this path does not apply to the new one.
            lock.write(None)
            dest_path = resolve(given)
            write_new(
                OS_FILES, dest_path, fold, FORMATS[cast(FormatName, to)], progress, source=source
            )
            lock.keep(handle.fd)
        finally:
            lock.release()
    report_torn(loaded)
    _report(log, dest, (loaded.format.name, to), len(fold), fold.cursor(), as_json)


def _format_of(log: Path) -> str:
    if database.is_database(log):
        return database.ROCKSDB
    with ReadHandle(OS_FILES, resolve(log)) as handle:
        return format_of(handle).name


def _report(
    log: Path,
    dest: Path,
    formats: tuple[str, str],
    entries: int,
    cursor: WatchCursor,
    as_json: bool,
) -> None:
    size = database.size_of(dest)
    facts = {
        "path": os.fspath(log),
        "dest": os.fspath(dest),
        "from": formats[0],
        "to": formats[1],
        "entries": entries,
        "cursor": token_json(cursor),
        "size_bytes": size,
    }
    what = f"{counted(entries, 'entry')} at cursor {token_text(cursor)}"
    shown = f"{printable(os.fspath(dest))}, {size_text(size)}"
    report(facts, f"converted {what} from {formats[0]} to {formats[1]}: {shown}", as_json)


COMMANDS = (convert,)
