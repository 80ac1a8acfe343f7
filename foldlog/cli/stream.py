"""The change stream that `foldlog apply` reads: JSON Lines, one change per line. Pure: bytes in,
values out.

    {"op": "put", "key": "a", "value": "text", "version": 7, "cursor": 7}
    {"op": "put", "key": "b", "value_base64": "AP8=", "cursor": 8}
    {"op": "delete" | "purge", "key": "a", "version": "00c0ffee", "cursor": 9}

A version or a cursor is a number (a u64) or the hex of up to 10 bytes; a version may be omitted or
null. Lines with the same cursor belong to one position of the upstream. They are never split into
two batches, because a restart between the two would lose the second. Numeric cursors must not
decrease: resuming skips all lines whose number is not above the stored one.
"""

from __future__ import annotations

import base64
import json
import os
import re
import select
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple, TypeVar

from foldlog.protocol.tokens import MAX_TOKEN_BYTES, U64_MAX, VersionToken, WatchCursor
from foldlog.protocol.updates import MAX_KEY_BYTES, MAX_VALUE_BYTES, Delete, Purge, Put, Update
from foldlog.storage.artifacts.strict_json import parse_object

MAX_LINE_BYTES = 128 * 1024 * 1024
"""The longest line. The largest value takes 96 MiB with every byte escaped as \\u00XX."""
READ_BYTES = 256 * 1024
MAX_BATCH_BYTES = 32 * 1024 * 1024
"""Bytes of keys and values that end a batch before its count is reached, to bound memory. A
guess."""

_FIELDS = frozenset(("op", "key", "value", "value_base64", "version", "cursor"))
_OPS = ("put", "delete", "purge")
_HEX = re.compile("([0-9a-fA-F]{2})*")
_Token = TypeVar("_Token", VersionToken, WatchCursor)


class BadLineError(ValueError):
    """A line that is not a valid change."""

    def __init__(self, name: str, line: int, reason: str) -> None:
        super().__init__(name, line, reason)
        self.name, self.line, self.reason = name, line, reason

    def __str__(self) -> str:
        return f"{self.name}: line {self.line}: {self.reason}"


class Change(NamedTuple):
    """One line of the stream."""

    line: int
    """The line number, from 1."""
    update: Update
    cursor: WatchCursor
    number: int | None
    """The cursor, if the line gives it as a number."""
    size: int
    """Bytes of the key and the value."""


def lines_of(
    file: BinaryIO, progress: Callable[[int, int], object] | None = None, total: int = 0
) -> Iterator[bytes]:
    """The lines of a file or pipe, each as soon as it is complete. `progress` is called with (bytes
    read, `total`)."""
    done = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        done += len(line)
        if progress is not None:
            progress(done, total)
        yield line


def lines_with_pauses(
    fd: int, pause_s: float, progress: Callable[[int, int], object] | None = None
) -> Iterator[bytes | None]:
    """The lines of a pipe or terminal, each as soon as it is complete; None once per pause of at
    least `pause_s`.

    Ends with the input. Memory: one line, plus what was read with it.
    """
    waiting = bytearray()
    done = 0
    paused = True
    while True:
        if not paused and not select.select((fd,), (), (), pause_s)[0]:
            paused = True
            yield None
            continue
        data = os.read(fd, READ_BYTES)
        paused = False
        if not data:
            break
        done += len(data)
        if progress is not None:
            progress(done, 0)
        searched = len(waiting)
        waiting += data
        start = 0
        while (end := waiting.find(b"\n", max(start, searched))) >= 0:
            yield bytes(waiting[start : end + 1])
            start = end + 1
        del waiting[:start]
        if len(waiting) > MAX_LINE_BYTES:
            break
    if waiting:
        yield bytes(waiting)


def read_changes(lines: Iterable[bytes | None], name: str) -> Iterator[Change | None]:
    """The changes in `lines`, without blank ones, and None for each pause. BadLineError names
    `name` and the line.

    Cost: about 5 us a line.
    """
    previous: int | None = None
    number = 0
    for line in lines:
        if line is None:
            yield None
            continue
        number += 1
        if not line.strip():
            continue
        try:
            change = parse_change(line, number)
            if change.number is not None and previous is not None and change.number < previous:
                raise ValueError(
                    f"cursor {change.number} is before {previous}, the cursor of an earlier line"
                )
        except ValueError as error:
            raise BadLineError(name, number, str(error)) from None
        previous = change.number
        yield change


def parse_change(line: bytes, number: int = 1) -> Change:
    """The change in one line. ValueError says what is wrong with it. Cost: about 5 us."""
    fields = _object(line)
    if unknown := sorted(fields.keys() - _FIELDS):
        raise ValueError(f"{unknown[0][:40]!a} is not a field of a change")
    for name in ("op", "key", "cursor"):
        if name not in fields:
            raise ValueError(f"{name} is missing")
    op = fields["op"]
    if op not in _OPS:
        raise ValueError(f"op is put, delete or purge, not {_shown(op)}")
    key, key_bytes = _key(fields["key"])
    version = (
        _token("version", VersionToken, fields["version"])
        if fields.get("version") is not None
        else VersionToken.unknown()
    )
    cursor = _token("cursor", WatchCursor, fields["cursor"])
    if cursor.is_none:
        raise ValueError("cursor is empty")
    size = key_bytes
    update: Update
    if op == "put":
        value = _value(fields)
        size += len(value)
        update = Put(key, value, version)
    elif "value" in fields or "value_base64" in fields:
        raise ValueError(f"a {op} has no value")
    else:
        update = Delete(key, version) if op == "delete" else Purge(key, version)
    return Change(
        number, update, cursor, fields["cursor"] if type(fields["cursor"]) is int else None, size
    )


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"is longer than {MAX_LINE_BYTES} bytes")
    return parse_object(line, _reason)


def _reason(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"is not UTF-8 at byte {error.start}"
    if isinstance(error, json.JSONDecodeError):
        return f"is not JSON: {error.msg} at character {error.pos}"
    return str(error)


def _key(key: object) -> tuple[str, int]:
    if type(key) is not str:
        raise ValueError(f"key is text, not {_shown(key)}")
    size = len(_utf8("key", key))
    if size > MAX_KEY_BYTES:
        raise ValueError(f"key takes {size} bytes of UTF-8, over the limit of {MAX_KEY_BYTES}")
    return key, size


def _value(fields: dict[str, Any]) -> bytes:
    if ("value" in fields) == ("value_base64" in fields):
        raise ValueError("a put has either value or value_base64")
    name = "value" if "value" in fields else "value_base64"
    text = fields[name]
    if type(text) is not str:
        raise ValueError(f"{name} is text, not {_shown(text)}")
    if name == "value":
        value = _utf8(name, text)
    else:
        try:
            value = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise ValueError(f"value_base64 is not base64: {error}") from None
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(f"{name} takes {len(value)} bytes, over the limit of {MAX_VALUE_BYTES}")
    return value


def _utf8(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} has a lone surrogate at character {error.start}") from None


def _token(name: str, kind: type[_Token], given: object) -> _Token:
    if type(given) is int:
        if not 0 <= given <= U64_MAX:
            raise ValueError(f"{name} is 0 to 2**64 - 1, not {_shown(given)}")
        return kind.from_u64(given)
    if type(given) is not str or not _HEX.fullmatch(given) or len(given) > 2 * MAX_TOKEN_BYTES:
        raise ValueError(
            f"{name} is a number, or the hex of up to {MAX_TOKEN_BYTES} bytes, not {_shown(given)}"
        )
    return kind(bytes.fromhex(given))


def _shown(given: object) -> str:
    return ascii(given)[:40]


class Resume:
    """Decides which lines a log at cursor `stored` already holds.

    If both cursors are numbers, a line not above the stored one is held. Other cursors have no
    order: everything is held up to the end of the run of lines with the stored cursor, and a stream
    without that cursor cannot be resumed.
    """

    def __init__(self, stored: WatchCursor) -> None:
        self.skipped = 0
        self._stored, self._number = stored, stored.as_u64()
        self._found = False
        self._by_order = self._number is not None
        self._past = stored.is_none

    def is_held(self, change: Change) -> bool:
        """True if the log already holds this line, the next of the stream."""
        if self._past:
            return False
        self._found = self._found or change.cursor == self._stored
        if self._number is not None and change.number is not None:
            held = change.number <= self._number
        else:
            self._by_order = False
            held = not self._found or change.cursor == self._stored
        self.skipped += held
        self._past = not held
        return held

    @property
    def lost(self) -> bool:
        """At the end of the stream: True if nothing in it shows where to resume."""
        return not (self._past or self._found or self._by_order)


class Batcher:
    """Collects changes into batches of at least `size`: a batch ends only where the cursor
    changes."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._pending: list[Change] = []
        self._bytes = 0
        self.begun: WatchCursor | None = None
        """The position of the last changes returned by `pause`, while more lines may still belong
        to it."""

    def push(self, change: Change) -> list[Change]:
        """Add the next change. Returns the batch that ends before it, usually an empty list."""
        full = len(self._pending) >= self._size or self._bytes >= MAX_BATCH_BYTES
        ended = self.rest() if full and change.cursor != self._pending[-1].cursor else []
        if change.cursor != self.begun:
            self.begun = None
        self._pending.append(change)
        self._bytes += change.size
        return ended

    def rest(self) -> list[Change]:
        """All pending changes."""
        pending, self._pending, self._bytes = self._pending, [], 0
        return pending

    def pause(self) -> tuple[list[Change], list[Change]]:
        """All pending changes in two parts: the complete positions, and the last one, whose lines
        may not all have been read."""
        pending = self.rest()
        complete = [change for change in pending if change.cursor != pending[-1].cursor]
        if pending:
            self.begun = pending[-1].cursor
        return complete, pending[len(complete) :]
