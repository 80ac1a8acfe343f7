"""Finds whole records of the format "slipstream-v2" in damaged bytes: evidence that a bad record is
damaged, not torn.

The search tries every offset. Its time is linear in the bytes searched, and its memory is bounded.
Checking a record costs the same whatever its length: the checksum of a long one is computed from
the checksums of two prefixes, since CRC-32 is linear.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple
from zlib import crc32

from foldlog.protocol.tokens import MAX_TOKEN_BYTES
from foldlog.protocol.updates import MAX_VALUE_BYTES
from foldlog.storage.formats.slipstream.records import (
    CURSOR,
    DELETE,
    MAX_CURSOR_BYTES,
    MAX_RECORD_BYTES,
    MIN_RECORD_BYTES,
    PUT,
    read_part,
    record_end,
)
from foldlog.storage.log.files import ReadHandle

BLOCK_BYTES = 64 * 1024
"""Bytes searched at a time, at first; the blocks grow to `MAX_BLOCK_BYTES`."""
MAX_BLOCK_BYTES = 4 * 1024 * 1024
_SHORT_BYTES = 4096
"""Up to this size a record is checked directly, which costs no more than two prefixes."""
_BEFORE_TYPE = 4
"""Bytes of a record before its type."""
_STRIDE = 256
"""Bytes between two prefixes whose checksums are kept."""
_RUN_BYTES = 1024
"""Longer than any record that lies within a run of bytes of value 1 or 2: 264 or 524 bytes."""

_CURSORS = re.compile(
    rb"(?s)(?=(.{4}\x03(?:%s)))"
    % b"|".join(b"\\x%02x.{%d}" % (length, length) for length in range(MAX_TOKEN_BYTES + 1))
)
_CURSOR_RUN = re.compile(rb"\x03{33,}")
_TYPES = re.compile(rb"\x01{%d,}|\x02{%d,}|[\x01\x02]" % (_RUN_BYTES, _RUN_BYTES))


def one_bit_fixes(data: bytes) -> bool:
    """True if flipping one bit in the type or lengths of the record at `data[0:]` makes it whole.

    Or any bit of a cursor record, which may itself end in zeros. Cost: at most 128 checksums. Other
    bytes pass by chance once in 30 million times.
    """
    fields = [4, 5, 6]
    if len(data) > 4 and data[4] == CURSOR:
        fields = list(range(MAX_CURSOR_BYTES))
    elif len(data) > 6:
        version_at = 7 + int.from_bytes(data[5:7], "little")
        if data[4] == PUT and version_at + 4 <= len(data):
            fields += range(version_at, version_at + 4)
            version_at += 4 + int.from_bytes(data[version_at : version_at + 4], "little")
        fields.append(version_at)
    changed = bytearray(data)
    for field in fields:
        for bit in range(8 if field < len(data) else 0):
            changed[field] ^= 1 << bit
            if _is_whole(changed):
                return True
            changed[field] ^= 1 << bit
    return False


def _is_whole(data: bytearray) -> bool:
    try:
        end = record_end(data, 0)
    except ValueError:
        return False
    if end > len(data):
        return False
    with memoryview(data) as view:
        return crc32(view[4:end]) == int.from_bytes(view[:4], "little")


def find_cursor_record(data: bytes, start: int = 0, stop: int | None = None) -> int | None:
    """The offset of the first whole cursor record in `data` that begins from `start` to `stop`.

    None if there is none. Cost: 20 ns a byte; up to 0.5 us a byte that could be its type.
    """
    stop = len(data) if stop is None else stop
    for low in range(start, stop, BLOCK_BYTES):
        high = min(low + BLOCK_BYTES, stop)
        # Check equal candidates once: a value of few distinct bytes is full of them.
        block = data[low : high + MAX_CURSOR_BYTES - 1]
        found = [
            data.find(record, low)
            for record in set(_CURSORS.findall(_CURSOR_RUN.sub(b"\x03" * 32, block)))
            if crc32(record[4:]) == int.from_bytes(record[:4], "little")
        ]
        if found and min(found) < stop:
            return min(found)
    return None


def find_record(handle: ReadHandle, start: int, size: int) -> int | None:
    """The offset of the first whole record, of any type, that begins from `start` to `size`.

    None if there is none. LogChangedError if the file ends before `size`. Memory: about 24 MiB at
    most. Cost: 30 ns a byte, holes left out; up to 5 us a byte in crafted bytes.
    """
    block = BLOCK_BYTES
    while start + MIN_RECORD_BYTES <= size:
        data = handle.files.data_after(handle.fd, start)
        if data is None:
            return None
        start = max(start, data - _BEFORE_TYPE)  # the type of a record is never zero
        stop = min(start + block, size)
        window = _Window(handle, start, stop, size)
        places = [find_cursor_record(window.data, 0, stop - start), next(window.updates(), None)]
        found = [place for place in places if place is not None]
        if found:
            return start + min(found)
        start, block = stop, min(2 * block, MAX_BLOCK_BYTES)
    return None


class _Window:
    """The bytes of a file from `start` on, to search for records that begin before `stop`."""

    def __init__(self, handle: ReadHandle, start: int, stop: int, size: int) -> None:
        self._handle, self._start, self._size = handle, start, size
        self._count = stop - start
        end = min(stop + 2 * BLOCK_BYTES, size)  # the longest delete, and more
        self.data = read_part(handle, start, end)
        self._prefixes: _Prefixes | None = None

    def updates(self) -> Iterator[int]:
        """Where whole puts and deletes begin."""
        for match in _TYPES.finditer(self.data, 4, self._count + 4):
            places: Sequence[int] = range(*match.span())
            if len(places) > _RUN_BYTES:  # all candidates in the middle of a run are equal
                places = (*places[:8], *places[-_RUN_BYTES:])
            for place in places:
                if self._is_whole(place - 4):
                    yield place - 4

    def _is_whole(self, at: int) -> bool:
        data = self.data
        kind = data[at + 4]
        version_at = at + 7 + int.from_bytes(data[at + 5 : at + 7], "little")
        if kind == PUT:
            length = int.from_bytes(data[version_at : version_at + 4], "little")
            if length > MAX_VALUE_BYTES:
                return False
            version_at += 4 + length
        elif kind != DELETE:
            return False
        if self._start + version_at >= self._size:
            return False
        if version_at >= len(data):
            data = self._long()
        end = version_at + 1 + data[version_at]
        if data[version_at] > MAX_TOKEN_BYTES or self._start + end > self._size:
            return False
        if end > len(data):
            data = self._long()
        crc = int.from_bytes(data[at : at + 4], "little")
        if end - at <= _SHORT_BYTES:
            return crc32(data[at + 4 : end]) == crc
        if self._prefixes is None:
            self._prefixes = _Prefixes(self._long())
        return self._prefixes.crc(at + 4, end) == crc

    def _long(self) -> bytes:
        """The data, extended to the longest record that begins in this window."""
        need = min(self._start + self._count + MAX_RECORD_BYTES, self._size)
        if len(self.data) < need - self._start:
            self.data = read_part(self._handle, self._start, need)
        return self.data


class _Prefixes:
    """The CRC-32 of any part of `data`, at the cost of two short ones."""

    def __init__(self, data: bytes) -> None:
        self._view = memoryview(data)
        self._crcs = [0]
        for start in range(0, len(data), _STRIDE):
            self._crcs.append(crc32(self._view[start : start + _STRIDE], self._crcs[-1]))

    def crc(self, start: int, end: int) -> int:
        """CRC-32 of `data[start:end]`. Cost: 2 to 5 us."""
        return self._prefix(end) ^ _append_zeros(self._prefix(start), end - start)

    def _prefix(self, end: int) -> int:
        kept = end // _STRIDE
        return crc32(self._view[kept * _STRIDE : end], self._crcs[kept])


_Table = list[int]


class _ZeroBytes(NamedTuple):
    """What a number of zero bytes does to a CRC-32 register: a linear map, as a table for each byte
    of the register.
    """

    tables: tuple[_Table, _Table, _Table, _Table]

    def apply(self, register: int) -> int:
        a, b, c, d = self.tables
        return (
            a[register & 255] ^ b[register >> 8 & 255] ^ c[register >> 16 & 255] ^ d[register >> 24]
        )


@functools.cache
def _powers() -> tuple[_ZeroBytes, ...]:
    """The maps for 1, 2, 4, ... zero bytes, enough for any record. Cost: 20 ms, once."""
    columns = [_one_zero_byte(1 << bit) for bit in range(32)]
    powers = []
    for _ in range(MAX_RECORD_BYTES.bit_length()):
        tables = tuple(_table(columns[8 * n : 8 * n + 8]) for n in range(4))
        power = _ZeroBytes(tables)  # type: ignore[arg-type]
        powers.append(power)
        columns = [power.apply(column) for column in columns]
    return tuple(powers)


def _table(columns: list[int]) -> _Table:
    table = [0]
    for column in columns:
        table += [entry ^ column for entry in table]
    return table


def _one_zero_byte(register: int) -> int:
    return crc32(b"\0", register ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def _append_zeros(register: int, count: int) -> int:
    for power in _powers():
        if not count:
            break
        if count & 1:
            register = power.apply(register)
        count >>= 1
    return register
