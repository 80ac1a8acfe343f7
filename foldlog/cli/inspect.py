"""Commands for a log that may be damaged: `verify` and `salvage`; `dump` is in `dump.py`. They only
read LOG, create nothing next to it and take no lock, so they work while another process has it open
for writing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import click

from foldlog.cli import database
from foldlog.cli.args import json_option, log_argument
from foldlog.cli.show import counted, printable, progress_bar, size_text, token_json, token_text
from foldlog.storage.formats.format import Problem, VerifyReport
from foldlog.storage.repair.salvage import Loss, salvage_log
from foldlog.storage.repair.verify import verify_log

_DAMAGED = 1
_SHOWN_KEYS = 5


@click.command(epilog="Example: foldlog verify routes.log --json")
@log_argument
@json_option()
def verify(log: Path, as_json: bool) -> None:
    """Check every invariant of LOG, and print each violation with its offset.

    Exit code 0 if nothing is wrong, 1 if LOG is damaged. A torn tail, as a killed writer leaves it,
    is reported but is not damage.
    """
    if database.is_database(log):
        if not database.verify(log, as_json):
            raise click.exceptions.Exit(_DAMAGED)
        return
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
            f"torn tail of {size_text(report.torn_bytes)}, left by a writer that stopped: "
            f"{report.torn_reason}"
        )
    counts = ((report.frames, "frame"), (report.leaves, "leaf"), (report.batches, "batch"))
    held = ", ".join(counted(count, noun) for count, noun in counts)
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
    help="The cursor of the new log. `safe`: from before the first loss, so that upstream replays "
    "what was lost. `last`: that of the last batch kept.",
)
@json_option()
def salvage(log: Path, output: Path, cursor: Literal["safe", "last"], as_json: bool) -> None:
    """Write what can still be read of LOG to a new log, and list what was lost.

    Exit code 0 if nothing was lost, 1 if something was. LOG is not changed.
    """
    database.refuse_directory(log, "RocksDB repairs its own databases")
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
        sources = f"{counted(report.leaves, 'leaf')} and {counted(report.batches, 'batch')}"
        kept = f"{counted(report.entries, 'entry')} from {sources}"
        where = f"up to batch {report.seq:,}, cursor {token_text(report.cursor)}"
        if report.cursor != report.last_cursor:
            where += f" (the last batch kept has {token_text(report.last_cursor)})"
        click.echo(
            f"{printable(str(report.output))}: {kept}, {where}; "
            f"{counted(len(report.losses), 'loss')}"
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
            text += f", after cursor {token_text(loss.after_cursor)}"
        if loss.before_cursor is not None:
            text += f", before cursor {token_text(loss.before_cursor)}"
    if loss.entries:
        text += f"; {counted(loss.entries, 'entry')} of the base lost"
    if loss.keys:
        more = ", ..." if len(loss.keys) > _SHOWN_KEYS else ""
        text += f": {', '.join(map(printable, loss.keys[:_SHOWN_KEYS]))}{more}"
    return text


COMMANDS = (verify, salvage)
