"""Commands that write one key: `put` and `delete`. They hold the writer's lock while they run, and
sync what they write."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from foldlog.cli import database
from foldlog.cli.args import (
    checked,
    format_option,
    json_option,
    log_argument,
    on_damage_option,
    utf8,
)
from foldlog.cli.read import fail_without_entry
from foldlog.cli.show import printable, report, token_json, token_text
from foldlog.protocol.options import UNSET, OnDamage
from foldlog.protocol.store import FormatName
from foldlog.protocol.tokens import VersionToken
from foldlog.protocol.updates import MAX_VALUE_BYTES
from foldlog.storage.log.files import resolve
from foldlog.store import Store
from foldlog.store import open as open_store

_expected_option = click.option(
    "--expected",
    metavar="VERSION",
    callback=checked(VersionToken.parse),
    help="Only if KEY is at this version: a number, or hex (0x...). Otherwise exit code 1.",
)
_json_option = json_option("Print key and version as one JSON object.")


@click.command(
    epilog="""\b
Examples:
  foldlog put flags.log beta 5%
  foldlog put certificates.log example.org < example.org.pem"""
)
@log_argument
@click.argument("key", callback=utf8)
@click.argument("value", required=False)
@click.option("--create", is_flag=True, help="Only if KEY does not exist. Otherwise exit code 1.")
@_expected_option
@on_damage_option
@_json_option
@format_option("The format of a new LOG. An existing LOG must have it.")
def put(
    log: Path,
    key: str,
    value: str | None,
    create: bool,
    expected: VersionToken | None,
    on_damage: OnDamage,
    as_json: bool,
    format_name: FormatName | None,
) -> None:
    """Set KEY in LOG to VALUE, or to the bytes on stdin if VALUE is omitted. Creates LOG if it does
    not exist.

    The cursor does not change. On return, the value survives a power loss. Prints the version of
    the entry.
    """
    if create and expected is not None:
        raise click.UsageError("--create and --expected are mutually exclusive.")
    given = (
        sys.stdin.buffer.read(MAX_VALUE_BYTES + 1)
        if value is None
        else value.encode("utf-8", "surrogateescape")  # as the shell gave it
    )
    with _open(log, on_damage, format_name) as store:
        if create:
            version = store.create(key, given)
        elif expected is not None:
            version = store.update(key, given, expected=expected)
        else:
            version = store.put(key, given)
    _report("put", key, version, as_json)


@click.command(epilog="Example: foldlog delete flags.log beta")
@log_argument
@click.argument("key", callback=utf8)
@_expected_option
@on_damage_option
@_json_option
def delete(
    log: Path, key: str, expected: VersionToken | None, on_damage: OnDamage, as_json: bool
) -> None:
    """Remove KEY from LOG. If there is no such entry, exit code 1, and nothing is written.

    The cursor does not change. On return, the removal survives a power loss. Prints its version.
    """
    os.stat(resolve(log))  # opening would create a missing log
    with _open(log, on_damage, None) as store:
        if key not in store:
            fail_without_entry(log, key)
        version = store.delete(key, expected=UNSET if expected is None else expected)
    _report("deleted", key, version, as_json)


def _open(log: Path, on_damage: OnDamage, format_name: FormatName | None) -> Store:
    if database.is_database(log):
        database.refuse_format(log, format_name)
        with database.needs_extra():
            return open_store(log, backend="rocksdb", sync="always", readers=1, on_damage=on_damage)
    return open_store(log, sync="always", readers=1, on_damage=on_damage, format=format_name)


def _report(done: str, key: str, version: VersionToken, as_json: bool) -> None:
    text = f"{done} {printable(key)} at version {token_text(version)}"
    report({"key": key, "version": token_json(version)}, text, as_json)


COMMANDS = (put, delete)
