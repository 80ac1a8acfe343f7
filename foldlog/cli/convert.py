"""The command `convert`: writes a log in the other file format."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import click

from foldlog.cli.args import format_option, log_argument
from foldlog.cli.read import read_log, report_torn
from foldlog.cli.show import counted, printable, progress_bar, size_text, token_json, token_text
from foldlog.protocol.store import FormatName
from foldlog.storage.formats.registry import format_named
from foldlog.storage.formats.rewrite import write_new
from foldlog.storage.log.files import OS_FILES, resolve
from foldlog.storage.log.lock import WriterLock


@click.command(epilog="Example: foldlog convert state.snap routes.log --to foldlog")
@log_argument
@click.argument("dest", type=click.Path(path_type=Path))
@format_option(
    "The format of DEST: foldlog's own, or that of the Rust crate beyond-slipstream.",
    "--to",
    required=True,
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(log: Path, dest: Path, format_name: FormatName, as_json: bool) -> None:
    """Write the state of LOG, in either format, as a new log at DEST, which must not exist.

    LOG is only read. It may be open for writing; DEST then holds the state from the start of the
    conversion. DEST appears complete or not at all. The entries and the cursor are copied exactly;
    the history is not, nor, with --to slipstream-v2, are the log id and the sequence.
    """
    given = Path(os.path.abspath(dest))
    if OS_FILES.exists(given):
        raise FileExistsError(errno.EEXIST, "convert never overwrites", str(given))
    with progress_bar("converting", "entries", os.stat(log).st_size) as progress:
        handle, loaded = read_log(log, progress)
        fold, source = loaded.fold, OS_FILES.access(handle.fd)
        lock = WriterLock(OS_FILES, resolve(given))
        try:
            # A note left by an earlier log at this path does not apply to the new one.
            lock.write(None)
            dest_path = resolve(given)
            write_new(OS_FILES, dest_path, fold, format_named(format_name), progress, source=source)
            lock.keep(handle.fd)
        finally:
            lock.release()
    report_torn(loaded)
    if as_json:
        facts: dict[str, Any] = {
            "path": os.fspath(log),
            "dest": os.fspath(dest),
            "from": loaded.format.name,
            "to": format_name,
        }
        facts |= {
            "entries": len(fold),
            "cursor": token_json(fold.cursor()),
            "size_bytes": os.stat(given).st_size,
        }
        click.echo(json.dumps(facts))
        return
    what = f"{counted(len(fold), 'entry')} at cursor {token_text(fold.cursor())}"
    shown = f"{printable(os.fspath(dest))}, {size_text(os.stat(given).st_size)}"
    click.echo(f"converted {what} from {loaded.format.name} to {format_name}: {shown}")


COMMANDS = (convert,)
