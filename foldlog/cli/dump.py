"""`foldlog dump` prints every part of a log, valid or damaged. Each format walks its own file; how
to print the parts is registered here by type. Read only, like the commands in `inspect.py`."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from foldlog.cli import database
from foldlog.cli.args import json_option, log_argument
from foldlog.cli.show import (
    counted,
    entry_json,
    op_text,
    printable,
    token_json,
    token_text,
    value_text,
)
from foldlog.protocol.decoding import Undecodable, decode_batches
from foldlog.protocol.frames import (
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    KIND_SEAL,
    FrameHeader,
    parse_open,
)
from foldlog.protocol.tokens import VersionToken
from foldlog.protocol.updates import DecodedBatch, KvEntry, Put
from foldlog.storage.fold import leaf
from foldlog.storage.formats.foldlog.check import base_end_of
from foldlog.storage.formats.foldlog.walk import HeaderPiece, Piece
from foldlog.storage.formats.registry import format_of
from foldlog.storage.formats.slipstream.records import CURSOR, DELETE, PUT, Record
from foldlog.storage.formats.slipstream.walk import RecordPiece
from foldlog.storage.log.files import OS_FILES, ReadHandle, resolve

KIND_NAMES = {
    KIND_OPEN: "OPEN",
    KIND_BATCHES: "BATCHES",
    KIND_LEAF: "LEAF",
    KIND_BASE_END: "BASE_END",
    KIND_SEAL: "SEAL",
}
RECORD_NAMES = {PUT: "PUT", DELETE: "DELETE", CURSOR: "CURSOR"}
"""Names of the records of "slipstream-v2"."""
_DAMAGED = 1


@click.command(epilog="Example: foldlog dump routes.log --bodies")
@log_argument
@json_option("Print one JSON object per line.")
@click.option(
    "--bodies", is_flag=True, help="Also print the contents of frames: batches with their updates."
)
def dump(log: Path, as_json: bool, bodies: bool) -> None:
    """Print every frame of LOG: offset, size, kind, sequences and checksums. Bytes that belong to
    no frame are listed too.

    Exit code 1 if anything does not verify, or a batch that was synced is missing.
    """
    database.refuse_directory(log, "a database has no frames")
    damaged = False
    with ReadHandle(OS_FILES, resolve(log)) as handle:
        size = OS_FILES.fstat(handle.fd).st_size
        for stretch in format_of(handle).walk(handle, size):
            damaged |= stretch.is_damage
            if as_json:
                click.echo(json.dumps(as_fields(stretch, bodies)))
            else:
                for line in as_lines(stretch, bodies):
                    click.echo(line)
    if damaged:
        raise click.exceptions.Exit(_DAMAGED)


@functools.singledispatch
def as_fields(stretch: object, bodies: bool) -> dict[str, Any]:
    """A part of a log as one JSON object. Each format registers its types."""
    raise TypeError(f"{type(stretch).__name__} cannot be shown")


@functools.singledispatch
def as_lines(stretch: object, bodies: bool) -> Iterator[str]:
    """A part of a log as lines of text. Each format registers its types."""
    raise TypeError(f"{type(stretch).__name__} cannot be shown")


@as_fields.register
def _(piece: HeaderPiece, bodies: bool) -> dict[str, Any]:
    header = piece.header
    fields: dict[str, Any] = {"offset": piece.offset, "kind": "HEADER"}
    if header is not None:
        fields |= {
            "log_id": header.log_id.hex(),
            "generation": f"{header.generation:016x}",
            "base_seq": header.base_seq,
        }
    return {**fields, "ok": not piece.reason, "reason": piece.reason}


@as_lines.register
def _(piece: HeaderPiece, bodies: bool) -> Iterator[str]:
    header, shown = piece.header, ""
    if header is not None:
        ids = f"log {header.log_id.hex()} generation {header.generation:016x}"
        shown = f"{ids} base batch {header.base_seq}  "
    yield f"{piece.offset:>12}  {shown}{piece.reason or 'ok'}"


def _place(piece: Piece | RecordPiece) -> dict[str, Any]:
    """What is told of every part of a log, whatever it is."""
    what = {"offset": piece.offset, "size": piece.size}
    return what | {"ok": not piece.reason, "reason": piece.reason}


@as_fields.register
def _(piece: RecordPiece, bodies: bool) -> dict[str, Any]:
    record = piece.record
    if record is None:
        return _place(piece) | {"kind": None}
    fields = _place(piece) | {"kind": RECORD_NAMES[record.kind]}
    return fields | _record_json(record) if bodies else fields


@as_lines.register
def _(piece: RecordPiece, bodies: bool) -> Iterator[str]:
    record = piece.record
    text = counted(piece.size, "byte")
    if record is None:
        yield f"{piece.offset:>12}  {text}: {piece.reason}"
        return
    token = token_text(VersionToken(record.token))
    what = f"cursor {token}" if record.kind == CURSOR else f"{printable(record.key)} @ {token}"
    value = f" = {value_text(record.value)}" if bodies and record.value is not None else ""
    yield f"{piece.offset:>12}  {RECORD_NAMES[record.kind]:<8} {text}  {what}{value}"


def _record_json(record: Record) -> dict[str, Any]:
    token = VersionToken(record.token)
    if record.kind == CURSOR:
        return {"cursor": token_json(token)}
    if record.value is None:
        return {"key": record.key, "version": token_json(token)}
    return entry_json(KvEntry(record.key, record.value, token))


@as_lines.register
def _(piece: Piece, bodies: bool) -> Iterator[str]:
    yield _piece_text(piece)
    if bodies and not piece.reason and piece.header is not None:
        for line in _body_lines(piece.header, piece.body):
            yield f"{'':>12}    {line}"


def _kind(header: FrameHeader) -> str:
    return KIND_NAMES.get(header.kind, f"kind {header.kind}")


def _piece_text(piece: Piece) -> str:
    header = piece.header
    if header is None:
        return f"{piece.offset:>12}  {counted(piece.size, 'byte')}: {piece.reason}"
    batches = f" {counted(header.batches, 'batch')}" if header.batches else ""
    sequences = f"seq {header.seq} synced {header.synced_seq}  flags {header.flags}"
    checksums = f"header {header.crc:08x} link {header.link:08x} body {header.body_crc:08x}"
    moved = "" if header.offset == piece.offset else f"  written for byte {header.offset}"
    verdict = f"{piece.reason or 'ok'}{moved}"
    what = f"{_kind(header):<8} {header.size} bytes{batches}"
    return f"{piece.offset:>12}  {what}  {sequences}  {checksums}  {verdict}"


@as_fields.register
def _(piece: Piece, bodies: bool) -> dict[str, Any]:
    header = piece.header
    if header is None:
        return _place(piece) | {"kind": None}
    fields = _place(piece) | {
        "kind": _kind(header),
        "seq": header.seq,
        "synced_seq": header.synced_seq,
        "batches": header.batches,
        "flags": header.flags,
        "written_for": header.offset,
        "body_len": header.body_len,
        "header_crc": f"{header.crc:08x}",
        "link": f"{header.link:08x}",
        "body_crc": f"{header.body_crc:08x}",
    }
    if bodies and not piece.reason:
        fields["body"] = list(_body_lines(header, piece.body))
    return fields


def _body_lines(header: FrameHeader, body: bytes) -> Iterator[str]:
    try:
        if header.kind == KIND_BATCHES:
            first = header.seq - header.batches + 1
            for number, batch in enumerate(decode_batches(body, header.batches), first):
                updates = counted(len(batch.keys), "update")
                yield f"batch {number} at cursor {token_text(batch.cursor)}, {updates}"
                yield from map("  ".__add__, _update_lines(batch))
        elif header.kind == KIND_LEAF:
            keys = leaf.check_order(body)
            yield f"{counted(len(keys), 'entry')}, {printable(keys[0])} to {printable(keys[-1])}"
        elif header.kind == KIND_BASE_END:
            cursor, leaves, entries, digest = base_end_of(body)
            where = f"cursor {token_text(cursor)}"
            what = f"{counted(leaves, 'leaf')}, {counted(entries, 'entry')}"
            yield f"{where}, {what}, digest {digest.hex()}"
        elif header.kind == KIND_OPEN:
            yield f"boot {printable(parse_open(body)) or 'unknown'}"
    except Undecodable as error:
        yield f"undecodable: {printable(str(error))}"


def _update_lines(batch: DecodedBatch) -> Iterator[str]:
    for update in batch.updates():
        line = f"{op_text(update)} {printable(update.key)} @ {token_text(update.version)}"
        yield f"{line} = {value_text(update.value)}" if isinstance(update, Put) else line


COMMANDS = (dump,)
