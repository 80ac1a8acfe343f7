"""Decodes what a large read from the socket brought: many messages in a few calls into C.

A message in a loop takes twice the time. Only two common forms are decoded here: messages without
headers, and messages that are all headers. Whatever has another form, or is not as it should be,
is left to the loop of `nats_wire`, from there on.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from itertools import compress, count
from operator import ne
from typing import Any, NamedTuple

from foldlog.protocol.tokens import U64_BYTES
from foldlog.protocol.updates import Delete, Purge, UpdateColumns

MIN_BYTES = 4096
"""Less is decoded as fast by the loop."""
_LINE = rb"([^ ]++) (\d++) \$JS\.ACK(?:\.[^. ]++){%d}\.(\d++)\.(\d++)\.(\d++\.[^ ]++) "
"""Key, subscription, sequence, consumer sequence, time and what follows. The same for all consumers
of a bucket, since compiling it takes milliseconds."""
_CRLF = b"\r\n"


class Bulk(NamedTuple):
    """Messages that were decoded."""

    updates: UpdateColumns
    end: int
    """Where the next message begins."""
    last: int
    """The stream sequence of the last one."""
    rest: bytes
    """What follows the sequences in its reply."""
    size: int
    """Bytes of values."""


class BulkDecoder:
    """Decodes the messages of one consumer."""

    def __init__(
        self,
        subjects: bytes,
        sid: bytes,
        tokens: int,
        removal: Callable[[bytes], type[Delete] | type[Purge] | None],
        removing: tuple[bytes, ...],
    ) -> None:
        """`subjects`: what all subjects start with; `tokens`: of a reply, between $JS.ACK and the
        sequence; `removal`: what headers make of a message, if not a Put; `removing`: the names of
        headers, one of which it then has."""
        line = _LINE % tokens
        subjects = re.escape(subjects)
        self._plain = re.compile(rb"^(MSG %s%s(\d++))$" % (subjects, line), re.MULTILINE)
        self._headed = re.compile(
            rb"(HMSG %s%s\d++ (\d++)\r\n(NATS/1\.0\r\n(?:[^\r\n]++\r\n)*+\r\n)\r\n)"
            % (subjects, line)
        )
        self._sid, self._removal, self._removing = sid, removal, removing

    def take(self, data: bytes, at: int, before: int) -> Bulk | None:
        """Decode the complete messages in `data` from `at` on, up to the first one that is of
        neither form. None if that is the first. They come after the consumer sequence `before`.

        UnicodeDecodeError for a key.
        """
        if data.startswith(b"MSG ", at):
            return self._take_plain(data, at, before)
        return self._take_headed(data, at, before)

    def _take_plain(self, data: bytes, at: int, before: int) -> Bulk | None:
        """Messages without headers: a line, and a line that is the value. A value that contains the
        end of a line is shorter than it was told, and ends the run."""
        lines = data[at:].split(_CRLF)
        values: list[Any] = lines[1:-1:2]
        heads = lines[: 2 * len(values) : 2]
        found = self._plain.findall(b"\n".join(heads))
        if not found:
            return None
        told, keys, sids, sequences, numbers, rests, sizes = map(list, zip(*found, strict=True))
        sizes = list(map(int, sizes))
        length = min(
            _alike(told, heads),
            _alike(sids, [self._sid] * len(sids)),
            _alike(list(map(len, values)), sizes),
            _alike(list(map(int, numbers)), range(before + 1, before + 1 + len(numbers))),
        )
        if not length:
            return None
        size = sum(sizes[:length])
        end = at + sum(map(len, heads[:length])) + size + 2 * len(_CRLF) * length
        updates = _updates(keys[:length], values[:length], sequences[:length])
        return Bulk(updates, end, int(sequences[length - 1]), rests[length - 1], size)

    def _take_headed(self, data: bytes, at: int, before: int) -> Bulk | None:
        """Messages that are all headers, as in a pass that asks for no values."""
        found = self._headed.findall(data, at)
        if not found:
            return None
        told, keys, sids, sequences, numbers, rests, sizes, headers = zip(*found, strict=True)
        all_told, lengths = b"".join(told), list(map(len, headers))
        if (
            not data.startswith(all_told, at)
            or set(sids) != {self._sid}
            or lengths != list(map(int, sizes))
            or list(map(int, numbers)) != list(range(before + 1, before + 1 + len(numbers)))
        ):
            return None
        values: list[bytes | bool | None] = [b""] * len(keys)
        if any(name in all_told for name in self._removing):
            for index, kind in enumerate(map(self._removal, headers)):
                if kind is not None:
                    values[index] = None if kind is Delete else False
        updates = _updates(keys, values, sequences)
        return Bulk(updates, at + len(all_told), int(sequences[-1]), rests[-1], 0)


def _updates(
    keys: Sequence[bytes], values: list[bytes | bool | None], sequences: Sequence[bytes]
) -> UpdateColumns:
    raw = struct.pack(f">{len(sequences)}Q", *map(int, sequences))
    versions = [raw[at : at + U64_BYTES] for at in range(0, len(raw), U64_BYTES)]
    return UpdateColumns(list(map(bytes.decode, keys)), values, versions)


def _alike(found: Sequence[object], wanted: Sequence[object]) -> int:
    """How many of them are the same, from the first on."""
    return next(compress(count(), map(ne, found, wanted)), min(len(found), len(wanted)))
