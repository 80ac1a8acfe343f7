"""Commands that only read: `get`, `range`, `info` and `export`. They do not change the log, create
nothing next to it and take no lock that a writer would wait for, so they work while another process
has the log open for writing."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click

from foldlog.cli import database
from foldlog.cli.args import format_option, json_option, log_argument, utf8
from foldlog.cli.show import (
    counted,
    entry_json,
    print_rows,
    printable,
    progress_bar,
    report,
    size_text,
    terminal_text,
    token_json,
    token_text,
    value_text,
)
from foldlog.protocol.store import FormatName
from foldlog.protocol.updates import KvEntry
from foldlog.storage.artifacts.artifact import ExportManifest, export_fold
from foldlog.storage.fold.reading import SnapshotReads
from foldlog.storage.formats.format import Loaded, Progress
from foldlog.storage.formats.registry import load_intact
from foldlog.storage.log.files import OS_FILES, ReadHandle, resolve
from foldlog.storage.log.sidecars.lock import writer_of

_WRITE_BYTES = 64 * 1024


class Opened(NamedTuple):
    """A log that was read."""

    handle: ReadHandle
    loaded: Loaded


def read_log(log: Path, progress: Progress | None = None) -> Opened:
    """Read a log without changing it. A torn tail, which a writer may just be writing, is left out.

    FileNotFoundError, CorruptLogError or InvalidFormatError. Cost: as `replay.load`.
    """
    handle = ReadHandle(OS_FILES, resolve(log))
    return Opened(handle, load_intact(handle, progress))


@contextlib.contextmanager
def read_state(log: Path) -> Iterator[SnapshotReads]:
    """The state of a log or a database, read without changing it. A torn tail is left out and
    reported on stderr."""
    if database.is_database(log):
        with database.read_database(log) as state:
            yield state
        return
    loaded = read_log(log).loaded
    report_torn(loaded)
    yield loaded.fold


def report_torn(loaded: Loaded) -> None:
    """Report on stderr how much of a log was left out, if its tail is torn."""
    if loaded.bad is not None:
        size = size_text(loaded.size - loaded.position.offset)
        click.echo(f"left out a torn tail of {size}", err=True)


def fail_without_entry(log: Path, key: str) -> NoReturn:
    """Say on stderr that there is no such key, and end with exit code 1."""
    click.echo(f"foldlog: {printable(str(log))}: no entry with key {printable(key)}", err=True)
    raise click.exceptions.Exit(1)


def shown_value(value: bytes) -> bytes:
    """A value as `get` writes it: unchanged, or escaped if stdout is a terminal."""
    return terminal_text(value).encode() if sys.stdout.isatty() else value


@click.command(
    epilog="""\b
Examples:
  foldlog get routes.log tenants/a
  foldlog get --follow routes.log tenants/a"""
)
@log_argument
@click.argument("key", callback=utf8)
@json_option("Print key, value (or value_base64) and version as JSON.")
@click.option(
    "--follow",
    is_flag=True,
    help="Then print it again at each change, each value on a line, until Ctrl-C.",
)
def get(log: Path, key: str, as_json: bool, follow: bool) -> None:
    """Print the value of KEY in LOG, byte for byte. Exit code 1 if there is none; with --follow,
    wait for it instead.

    On a terminal, control characters are escaped, and a newline is added if missing.
    """
    if follow:
        from foldlog.cli.follow import follow_key  # the import takes longer than a `get`

        follow_key(log, key, as_json)
        return
    with read_state(log) as state:
        entry = state.get(key)
    if entry is None:
        fail_without_entry(log, key)
    if as_json:
        click.echo(json.dumps(entry_json(entry)))
    else:
        sys.stdout.buffer.write(shown_value(entry.value))


@click.command("range", epilog="Example: foldlog range routes.log tenants/ --keys --limit 10")
@log_argument
@click.argument("prefix", default="", callback=utf8)
@json_option("Print one JSON object per line.")
@click.option("--keys", "keys_only", is_flag=True, help="Print only the keys.")
@click.option("--limit", type=click.IntRange(min=0), help="Print at most this many entries.")
def range_(log: Path, prefix: str, as_json: bool, keys_only: bool, limit: int | None) -> None:
    """Print the entries of LOG whose keys start with PREFIX (by default, all), in key order.

    A line is the key, a tab and the value. Anything not UTF-8 or not printable is escaped as \\xNN,
    \\uNNNN or \\UNNNNNNNN.
    """
    out = sys.stdout.buffer
    buffer = bytearray()
    with read_state(log) as state:
        for entry in state.iter_range(prefix, limit=limit):
            buffer += _line(entry, as_json, keys_only).encode() + b"\n"
            if len(buffer) >= _WRITE_BYTES:
                out.write(buffer)
                buffer.clear()
    out.write(buffer)


def _line(entry: KvEntry, as_json: bool, keys_only: bool) -> str:
    if as_json:
        return json.dumps({"key": entry.key} if keys_only else entry_json(entry))
    return (
        printable(entry.key) if keys_only else f"{printable(entry.key)}\t{value_text(entry.value)}"
    )


@click.command(epilog="Example: foldlog info routes.log --json")
@log_argument
@json_option()
def info(log: Path, as_json: bool) -> None:
    """Print facts about LOG: identity, cursor, sizes, and whether a writer has it open."""
    if database.is_database(log):
        database.print_facts(log, as_json)
        return
    with progress_bar("reading", "bytes") as progress:
        opened = read_log(log, progress)
    facts = describe(opened)
    if as_json:
        click.echo(json.dumps(facts))
        return
    fold = opened.loaded.fold
    writer = "none"
    if facts["locked"] is None:
        writer = "unknown: the note next to the log cannot be read"
    elif facts["writer_pid"] is not None:
        writer = f"process {facts['writer_pid']}"
    elif facts["locked"]:
        writer = facts["writer"] or "yes"
    own = facts["format"] == "foldlog"
    base, batches = size_text(facts["base_bytes"]), counted(facts["batches_since_base"], "batch")
    rows = [  # None: the format has no such field
        ("path", printable(facts["path"])),
        ("size", size_text(facts["size_bytes"])),
        ("format", f"version {facts['format_version']}" if own else facts["format"]),
        ("log id", facts["log_id"]),
        ("generation", facts["generation"]),
        ("sequence", f"{facts['sequence']:,}" if own else None),
        ("cursor", token_text(fold.cursor())),
        ("entries", f"{facts['entries']:,}"),
        ("base", f"{base} in {counted(facts['leaves'], 'leaf')}" if own else base),
        ("appended", f"{size_text(facts['appended_bytes'])}, {batches}"),
        ("sealed", _sealed(facts) if own else None),
        ("writer", writer),
    ]
    if facts["torn_bytes"]:
        size = size_text(facts["torn_bytes"])
        rows.append(("torn tail", f"{size}, left by a writer that stopped, or being written"))
    print_rows(rows)


def _sealed(facts: dict[str, Any]) -> str:
    if facts["sealed"]:
        return "yes: the last writer closed it cleanly"
    return "no" if facts["appended_bytes"] else "nothing to seal after the base"


def describe(opened: Opened) -> dict[str, Any]:
    """What `info` prints, as JSON values; null for fields that the format does not have. Cost:
    O(changes since the last compaction)."""
    handle, loaded = opened
    end = loaded.position.offset
    size = max(OS_FILES.fstat(handle.fd).st_size, end) if loaded.bad is not None else end
    writing = writer_of(OS_FILES, handle.path)
    facts = loaded.format.facts(loaded)
    return {
        "path": str(handle.path),
        "size_bytes": size,
        "format": loaded.format.name,
        "format_version": int(loaded.format.backend_version),
        "log_id": facts.log_id,
        "generation": facts.generation,
        "sequence": facts.seq,
        "cursor": token_json(loaded.fold.cursor()),
        "entries": len(loaded.fold),
        "leaves": facts.leaves,
        "base_bytes": loaded.base_end,
        "appended_bytes": end - loaded.base_end,
        "batches_since_base": loaded.position.seq - loaded.header.base_seq,
        "sealed": facts.sealed,
        "torn_bytes": size - end,
        "locked": writing.locked,
        "writer_pid": writing.pid,
        "writer": writing.holder or None,
    }


@click.command(epilog="Example: foldlog export routes.log backup-1")
@log_argument
@click.argument("dest_dir", type=click.Path(path_type=Path))
@json_option()
@format_option("The format of the artifact. By default, that of LOG.")
def export(log: Path, dest_dir: Path, as_json: bool, format_name: FormatName | None) -> None:
    """Write the state of LOG as an artifact to the new directory DEST_DIR; `import` verifies it.

    Takes no lock: LOG may be open for writing. The artifact holds the state from the start of the
    export. A RocksDB database must not be open elsewhere, unless --format is given.
    """
    if database.is_database(log):
        with progress_bar("exporting", "entries") as progress:
            manifest = database.export(log, dest_dir, format_name, progress)
        _report_export(dest_dir, manifest, None, as_json)
        return
    with progress_bar("reading", "bytes") as progress:
        handle, loaded = read_log(log, progress)
        fold = loaded.fold
    report_torn(loaded)
    with progress_bar("exporting", "entries") as progress:
        manifest = export_fold(
            fold,
            dest_dir,
            format=format_name or loaded.format.name,
            source=OS_FILES.access(handle.fd),
            progress=progress,
        )
    _report_export(dest_dir, manifest, len(fold), as_json)


def _report_export(
    dest_dir: Path, manifest: ExportManifest, entries: int | None, as_json: bool
) -> None:
    """`entries`: None for a database, where counting them would take a read of all."""
    facts = {"dest_dir": os.fspath(dest_dir), "entries": entries, **manifest_json(manifest)}
    shown, size = printable(os.fspath(dest_dir)), size_text(payload_bytes(manifest))
    what = "the state" if entries is None else counted(entries, "entry")
    where = f"at cursor {token_text(manifest.cursor)} to {shown}, {size}"
    report(facts, f"exported {what} {where}", as_json)


def payload_bytes(manifest: ExportManifest) -> int:
    """The size of an artifact in bytes, without its manifest."""
    return sum(file.size for file in manifest.files)


def manifest_json(manifest: ExportManifest) -> dict[str, Any]:
    """A manifest as JSON values."""
    return {
        "cursor": token_json(manifest.cursor),
        "size_bytes": payload_bytes(manifest),
        "files": [
            {"path": file.path, "size": file.size, "blake3": file.blake3} for file in manifest.files
        ],
    }


COMMANDS = (get, range_, info, export)
