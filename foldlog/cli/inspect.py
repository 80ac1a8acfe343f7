"""Commands for a log that may be damaged: `verify`, `salvage`, `dump`. They only read LOG: no byte of it changes, nothing is
created beside it, and no lock is taken, so that they work while another process has it open for writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click

from foldlog.cli.args import log_argument
from foldlog.cli.show import (
    counted,
    entry_json,
    op_text,
    printable,
    progress_bar,
    size_text,
    token_json,
    token_text,
    value_text,
)
from foldlog.protocol.frames import (
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    KIND_SEAL,
    FrameHead,
    parse_open,
)
from foldlog.protocol.tokens import VersionToken
from foldlog.protocol.undecodable import Undecodable
from foldlog.protocol.updates import DecodedBatch, KvEntry, Put, decode_batches
from foldlog.storage.fold import leaf
from foldlog.storage.formats.replay import format_of, resolve
from foldlog.storage.formats.slipstream import CURSOR, DELETE, PUT, Record
from foldlog.storage.formats.slipstream_log import SLIPSTREAM
from foldlog.storage.formats.slipstream_walk import walk_records
from foldlog.storage.log.files import OS_FILES, ReadHandle
from foldlog.storage.repair.salvage import Loss, salvage_log
from foldlog.storage.repair.verify import (
    Problem,
    VerifyReport,
    base_end_of,
    head_and_seed,
    verify_log,
)
from foldlog.storage.repair.walk import Piece, Walker

KIND_NAMES = {
    KIND_OPEN: "OPEN",
    KIND_BATCHES: "BATCHES",
    KIND_LEAF: "LEAF",
    KIND_BASE_END: "BASE_END",
    KIND_SEAL: "SEAL",
}
RECORD_NAMES = {PUT: "PUT", DELETE: "DELETE", CURSOR: "CURSOR"}
"""Of the records of the format "slipstream-v2"."""
_DAMAGED = 1
_SHOWN_KEYS = 5


@click.command(epilog="Example: foldlog verify routes.log --json")
@log_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(log: Path, as_json: bool) -> None:
    """Check everything that must hold in LOG, and print all that does not, with offsets.

    Exit code 0 if nothing is wrong, 1 for damage. A torn tail, as a stopped writer leaves it, is told and is no damage.
    """
    with progress_bar("verifying", "bytes") as progress:
        report = verify_log(log, progress=progress)
    if as_json:
        click.echo(json.dumps(_report_json(report)))
    else:
        _print_report(report)
    if not report.ok:
        raise click.exceptions.Exit(_DAMAGED)


def _report_json(report: VerifyReport) -> dict[str, Any]:
    return {
        "path": str(report.path),
        "ok": report.ok,
        "size_bytes": report.size,
        "frames": report.frames,
        "leaves": report.leaves,
        "base_entries": report.entries,
        "batches_since_base": report.batches,
        "sequence": report.seq,
        "cursor": token_json(report.cursor),
        "sealed": report.sealed,
        "torn_bytes": report.torn_bytes,
        "torn_reason": report.torn_reason,
        "problems": [problem._asdict() for problem in report.problems],
    }


def _print_report(report: VerifyReport) -> None:
    for problem in report.problems:
        click.echo(f"{_span(problem)}: {printable(problem.reason)}")
    if report.torn_bytes:
        click.echo(
            f"torn tail of {size_text(report.torn_bytes)}, left by a stopped writer: {report.torn_reason}"
        )
    held = f"{counted(report.frames, 'frame')}, {counted(report.leaves, 'leaf')}, {counted(report.batches, 'batch')}"
    where = f"up to batch {report.seq:,} at cursor {token_text(report.cursor)}"
    verdict = "ok" if report.ok else f"damaged, {counted(len(report.problems), 'problem')}"
    click.echo(
        f"{printable(str(report.path))}: {verdict}: {size_text(report.size)}, {held} {where}"
    )


def _span(where: Problem | Loss) -> str:
    return f"byte {where.offset}" + (f", {size_text(where.size)}" if where.size else "")


@click.command(epilog="Example: foldlog salvage damaged.log --output saved.log")
@log_argument
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="The new log, which must not exist.",
)
@click.option(
    "--cursor",
    type=click.Choice(["safe", "last"]),
    default="safe",
    help="Of the new log: `safe`, before the first loss, so that upstream replays what was lost; `last`, of the last batch kept.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def salvage(log: Path, output: Path, cursor: Literal["safe", "last"], as_json: bool) -> None:
    """Write what can still be read of LOG as a new log, and list what was lost.

    Exit code 0 if nothing was lost, 1 if something was. LOG is not changed.
    """
    with progress_bar("salvaging", "entries", os.stat(log).st_size) as progress:
        report = salvage_log(log, output, cursor=cursor, progress=progress)
    if as_json:
        facts = {
            "path": str(report.path),
            "output": str(report.output),
            "sequence": report.seq,
            "cursor": token_json(report.cursor),
            "last_cursor": token_json(report.last_cursor),
            "entries": report.entries,
            "leaves": report.leaves,
            "batches": report.batches,
            "losses": list(map(_loss_json, report.losses)),
        }
        click.echo(json.dumps(facts))
    else:
        for loss in report.losses:
            click.echo(_loss_text(loss))
        kept = f"{counted(report.entries, 'entry')} from {counted(report.leaves, 'leaf')} and {counted(report.batches, 'batch')}"
        where = f"up to batch {report.seq:,}, cursor {token_text(report.cursor)}"
        if report.cursor != report.last_cursor:
            where += f" (the last batch kept has {token_text(report.last_cursor)})"
        click.echo(
            f"{printable(str(report.output))}: {kept}, {where}; {counted(len(report.losses), 'loss')}"
        )
    if report.losses:
        raise click.exceptions.Exit(_DAMAGED)


def _loss_json(loss: Loss) -> dict[str, Any]:
    fields = loss._asdict()
    for name in ("after_cursor", "before_cursor"):
        fields[name] = None if fields[name] is None else token_json(fields[name])
    return fields


def _loss_text(loss: Loss) -> str:
    text = f"{_span(loss)}: {printable(loss.reason)}"
    if loss.first_seq is not None:
        until = "and up" if loss.last_seq is None else f"to {loss.last_seq}"
        text += f"; batches {loss.first_seq} {until} are lost"
        if loss.after_cursor is not None:
            text += f", behind cursor {token_text(loss.after_cursor)}"
        if loss.before_cursor is not None:
            text += f", before cursor {token_text(loss.before_cursor)}"
    if loss.entries:
        text += f"; {counted(loss.entries, 'entry')} of the base lost"
    if loss.keys:
        more = ", ..." if len(loss.keys) > _SHOWN_KEYS else ""
        text += f": {', '.join(map(printable, loss.keys[:_SHOWN_KEYS]))}{more}"
    return text


@click.command(epilog="Example: foldlog dump routes.log --bodies")
@log_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")
@click.option(
    "--bodies", is_flag=True, help="Print what the frames hold, too: batches with their updates."
)
def dump(log: Path, as_json: bool, bodies: bool) -> None:
    """Print every frame of LOG: offset, size, kind, sequences and checksums; and where there is none, the bytes that are not.

    Exit code 1 if a frame does not verify.
    """
    handle = ReadHandle(OS_FILES, resolve(log))
    size = OS_FILES.fstat(handle.fd).st_size
    if format_of(handle) is SLIPSTREAM:
        _dump_records(handle, size, as_json, bodies)
        return
    head, seed, reason = head_and_seed(handle, size)
    assert seed is not None
    if as_json:
        fields = (
            {}
            if head is None
            else {
                "log_id": head.log_id.hex(),
                "generation": f"{head.generation:016x}",
                "base_seq": head.base_seq,
            }
        )
        click.echo(
            json.dumps({"offset": 0, "kind": "HEAD", **fields, "ok": not reason, "reason": reason})
        )
    else:
        shown = (
            ""
            if head is None
            else f"log {head.log_id.hex()} generation {head.generation:016x} base batch {head.base_seq}  "
        )
        click.echo(f"{0:>12}  {shown}{reason or 'ok'}")
    damaged = bool(reason)
    for piece in Walker(handle, seed, size).pieces():
        damaged |= bool(piece.reason)
        if as_json:
            click.echo(json.dumps(_piece_json(piece, bodies)))
            continue
        click.echo(_piece_text(piece))
        if bodies and not piece.reason and piece.head is not None:
            for line in _body_lines(piece.head, piece.body):
                click.echo(f"{'':>12}    {line}")
    if damaged:
        raise click.exceptions.Exit(_DAMAGED)


def _dump_records(handle: ReadHandle, size: int, as_json: bool, bodies: bool) -> None:
    damaged = False
    for piece in walk_records(handle, size):
        damaged |= bool(piece.reason) and not piece.torn
        record = piece.record
        fields: dict[str, Any] = {
            "offset": piece.offset,
            "size": piece.size,
            "ok": not piece.reason,
            "reason": piece.reason,
        }
        kind = None if record is None else RECORD_NAMES[record.kind]
        if as_json:
            click.echo(
                json.dumps(
                    fields
                    | {"kind": kind}
                    | (_record_json(record) if record is not None and bodies else {})
                )
            )
            continue
        text = counted(piece.size, "byte")
        if record is None:
            click.echo(f"{piece.offset:>12}  {text}: {piece.reason}")
            continue
        token = token_text(VersionToken(record.token))
        what = f"cursor {token}" if record.kind == CURSOR else f"{printable(record.key)} @ {token}"
        value = f" = {value_text(record.value)}" if bodies and record.value is not None else ""
        click.echo(f"{piece.offset:>12}  {kind:<8} {text}  {what}{value}")
    if damaged:
        raise click.exceptions.Exit(_DAMAGED)


def _record_json(record: Record) -> dict[str, Any]:
    token = VersionToken(record.token)
    if record.kind == CURSOR:
        return {"cursor": token_json(token)}
    if record.value is None:
        return {"key": record.key, "version": token_json(token)}
    return entry_json(KvEntry(record.key, record.value, token))


def _kind(head: FrameHead) -> str:
    return KIND_NAMES.get(head.kind, f"kind {head.kind}")


def _piece_text(piece: Piece) -> str:
    head = piece.head
    if head is None:
        return f"{piece.offset:>12}  {counted(piece.size, 'byte')}: {piece.reason}"
    batches = f" {counted(head.batches, 'batch')}" if head.batches else ""
    sequences = f"seq {head.seq} synced {head.synced_seq}  flags {head.flags}"
    checksums = f"head {head.crc:08x} link {head.link:08x} body {head.body_crc:08x}"
    moved = "" if head.offset == piece.offset else f"  written for byte {head.offset}"
    verdict = f"{piece.reason or 'ok'}{moved}"
    return f"{piece.offset:>12}  {_kind(head):<8} {head.size} bytes{batches}  {sequences}  {checksums}  {verdict}"


def _piece_json(piece: Piece, bodies: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "offset": piece.offset,
        "size": piece.size,
        "ok": not piece.reason,
        "reason": piece.reason,
    }
    head = piece.head
    if head is None:
        return {**fields, "kind": None}
    fields |= {
        "kind": _kind(head),
        "seq": head.seq,
        "synced_seq": head.synced_seq,
        "batches": head.batches,
        "flags": head.flags,
    }
    fields |= {"written_for": head.offset, "body_len": head.body_len}
    fields |= {
        "head_crc": f"{head.crc:08x}",
        "link": f"{head.link:08x}",
        "body_crc": f"{head.body_crc:08x}",
    }
    if bodies and not piece.reason:
        fields["body"] = list(_body_lines(head, piece.body))
    return fields


def _body_lines(head: FrameHead, body: bytes) -> Iterator[str]:
    try:
        if head.kind == KIND_BATCHES:
            for number, batch in enumerate(
                decode_batches(body, head.batches), head.seq - head.batches + 1
            ):
                yield f"batch {number} at cursor {token_text(batch.cursor)}, {counted(len(batch.keys), 'update')}"
                yield from map("  ".__add__, _update_lines(batch))
        elif head.kind == KIND_LEAF:
            keys = leaf.check_order(body)
            yield f"{counted(len(keys), 'entry')}, {printable(keys[0])} to {printable(keys[-1])}"
        elif head.kind == KIND_BASE_END:
            cursor, leaves, entries, digest = base_end_of(body)
            where = f"cursor {token_text(cursor)}"
            yield f"{where}, {counted(leaves, 'leaf')}, {counted(entries, 'entry')}, digest {digest.hex()}"
        elif head.kind == KIND_OPEN:
            yield f"boot {printable(parse_open(body)) or 'unknown'}"
    except Undecodable as error:
        yield f"undecodable: {printable(str(error))}"


def _update_lines(batch: DecodedBatch) -> Iterator[str]:
    for update in batch.updates():
        line = f"{op_text(update)} {printable(update.key)} @ {token_text(update.version)}"
        yield f"{line} = {value_text(update.value)}" if isinstance(update, Put) else line


COMMANDS = (verify, salvage, dump)
