"""The bytes of the Rust crate's log, version 2: the format "slipstream-v2".

    file   := header record*               little-endian throughout
    header := magic 4s "PGSS" | version u16 = 2
    record := crc u32 | type u8 | payload  CRC-32 as in zlib (not CRC-32C), over type and payload
    put    := 01 | key length u16 | key | value length u32 | value | version length u8 | version
    delete := 02 | key length u16 | key | version length u8 | version
    cursor := 03 | cursor length u8 | cursor

A batch is its records in order, then one cursor record, whose cursor may be empty. A purge is
written as a delete. A compacted file holds one put for each live key, in key order, then one cursor
record, or none if there is no cursor. `docs/interchange.md` has more.

Lengths have no checksum of their own. A length that damage has increased looks like a record that
the end of the file cuts short; `search.py` finds the evidence that tells the two apart.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple
from zlib import crc32

import msgpack

from foldlog.protocol.errors import InvalidFormatError, LogChangedError
from foldlog.protocol.tokens import MAX_TOKEN_BYTES
from foldlog.protocol.updates import MAX_VALUE_BYTES
from foldlog.storage.formats.format import BadBytes
from foldlog.storage.log.files import ReadHandle

MAGIC = b"PGSS"
VERSION = 2
HEADER = struct.Struct("<4sH")
HEADER_BYTES = HEADER.pack(MAGIC, VERSION)

PUT, DELETE, CURSOR = 1, 2, 3
MIN_RECORD_BYTES = 6  # a cursor record with an empty cursor
MAX_CURSOR_BYTES = MIN_RECORD_BYTES + MAX_TOKEN_BYTES
_MIN_PUT_BYTES, _MIN_DELETE_BYTES = 12, 8
_KEY = struct.Struct("<H")
_VALUE = struct.Struct("<I")
_PUT_BYTE, _DELETE_BYTE, _CURSOR_BYTE = b"\x01", b"\x02", b"\x03"
_TOKEN_LENGTHS = [bytes((length,)) for length in range(MAX_TOKEN_BYTES + 1)]

MAX_RECORD_BYTES = _MIN_PUT_BYTES + 0xFFFF + MAX_VALUE_BYTES + MAX_TOKEN_BYTES

WINDOW_BYTES = 4 * 1024 * 1024


def check_header(handle: ReadHandle) -> None:
    """InvalidFormatError unless the file is of this format and version."""
    raw = handle.files.read(handle.fd, HEADER.size, 0)
    if raw[: len(MAGIC)] != MAGIC:
        reason = "not a slipstream log: wrong magic"
    elif len(raw) < HEADER.size:
        reason = "not a slipstream log: shorter than its header"
    elif (version := HEADER.unpack(raw)[1]) != VERSION:
        reason = f"a slipstream log of version {version}: this foldlog reads version {VERSION}"
    else:
        return
    raise InvalidFormatError(handle.path, 0, reason)


def _sealed(body: bytes) -> bytes:
    return crc32(body).to_bytes(4, "little") + body


def encode_put(key: bytes, value: bytes, version: bytes) -> bytes:
    """A put record. Cost: about 0.7 us."""
    return _sealed(
        b"".join(
            (
                _PUT_BYTE,
                _KEY.pack(len(key)),
                key,
                _VALUE.pack(len(value)),
                value,
                _TOKEN_LENGTHS[len(version)],
                version,
            )
        )
    )


def encode_delete(key: bytes, version: bytes) -> bytes:
    """A delete record, for a delete or a purge."""
    return _sealed(
        b"".join((_DELETE_BYTE, _KEY.pack(len(key)), key, _TOKEN_LENGTHS[len(version)], version))
    )


def encode_cursor(cursor: bytes) -> bytes:
    """A cursor record, also for the none-cursor."""
    return _sealed(_CURSOR_BYTE + _TOKEN_LENGTHS[len(cursor)] + cursor)


def encode_item(item: bytes) -> bytes:
    """The records of a batch, given as an item of a BATCHES body (`protocol/updates.py`).

    Cost: about 1 us a record.
    """
    # The format has no field for the origin.
    cursor, keys, values, versions = msgpack.unpackb(item, raw=True)[:4]
    records = [
        encode_put(key, value, version) if type(value) is bytes else encode_delete(key, version)
        for key, value, version in zip(keys, values, versions, strict=True)
    ]
    records.append(encode_cursor(cursor))
    return b"".join(records)


class Record(NamedTuple):
    """A record whose checksum is valid."""

    kind: int
    """PUT, DELETE or CURSOR."""
    key: str
    value: bytes | None
    token: bytes
    """The version, or the cursor."""
    end: int
    """The offset after it."""


class BadRecord(BadBytes):
    """The bytes at `offset` are not a record."""

    def __init__(
        self, offset: int, reason: str, *, end: int, final: bool = False, cut_short: bool = False
    ) -> None:
        super().__init__(offset, reason, final=final)
        self.end = end
        """Where it ends, as far as its lengths could be read."""
        self.cut_short = cut_short
        """True if it is a valid beginning of a record, which the end of the file cuts short."""
        self.in_base = False
        """True if it may be inside the base. Set by the caller of `read_records`: see `Count`."""


def record_end(data: bytes | bytearray, at: int) -> int:
    """Where the record at `data[at:]` ends; if that is beyond `data`, the earliest possible end.

    ValueError if there is no record.
    """
    have = len(data)
    if at + 4 >= have:
        return at + MIN_RECORD_BYTES
    kind = data[at + 4]
    if kind == CURSOR:
        if at + 5 >= have:
            return at + MIN_RECORD_BYTES
        return at + MIN_RECORD_BYTES + _token_length(data[at + 5], "cursor")
    if kind != PUT and kind != DELETE:
        raise ValueError(f"unknown record type {kind}")
    if at + 7 > have:
        return at + (_MIN_PUT_BYTES if kind == PUT else _MIN_DELETE_BYTES)
    version_at = at + 7 + _KEY.unpack_from(data, at + 5)[0]
    if kind == PUT:
        if version_at + 4 > have:
            return int(version_at + 5)
        length = _VALUE.unpack_from(data, version_at)[0]
        if length > MAX_VALUE_BYTES:
            raise ValueError(f"a value of {length} bytes, over the limit of {MAX_VALUE_BYTES}")
        version_at += 4 + length
    if version_at >= have:
        return int(version_at + 1)
    return int(version_at + 1 + _token_length(data[version_at], "version"))


def _token_length(length: int, what: str) -> int:
    if length > MAX_TOKEN_BYTES:
        raise ValueError(f"a {what} of {length} bytes, over the limit of {MAX_TOKEN_BYTES}")
    return length


def read_records(
    handle: ReadHandle, start: int, size: int, *, window_bytes: int = WINDOW_BYTES
) -> Iterator[Record]:
    """The records from `start` to `size`.

    BadRecord at the first bytes that are not a record; LogChangedError if the file ends before
    `size`; OSError. Memory: one window, or the largest record. Cost: about 1.3 us a record.
    """
    data = b""
    base, at = start, 0  # the offset of data[0]; the next record is data[at:]
    while base + at < size:
        offset = base + at
        try:
            end = record_end(data, at)
        except ValueError as error:
            raise BadRecord(offset, str(error), end=offset + 5) from None
        if end > len(data):
            if base + end > size:
                if base + len(data) == size:
                    reason = (
                        f"the record needs {end - at} bytes or more,"
                        f" the file ends after {size - offset}"
                    )
                    raise BadRecord(offset, reason, end=base + end, cut_short=True)
                end = at + size - offset  # first read all there is: it may hold a bad length
            stop = offset + min(max(window_bytes, end - at), size - offset)
            data = read_part(handle, offset, stop)
            view = memoryview(data)
            base, at = offset, 0
            continue
        if crc32(view[at + 4 : end]) != int.from_bytes(view[at : at + 4], "little"):
            raise BadRecord(offset, "the record does not verify", end=base + end)
        kind = data[at + 4]
        if kind == CURSOR:
            yield Record(kind, "", None, data[at + 6 : end], base + end)
        else:
            key_end = at + 7 + _KEY.unpack_from(data, at + 5)[0]
            try:
                key = data[at + 7 : key_end].decode()
            except UnicodeDecodeError:
                raise BadRecord(
                    offset, "a key that is not UTF-8", end=base + end, final=True
                ) from None
            if kind == PUT:
                value_end = key_end + 4 + _VALUE.unpack_from(data, key_end)[0]
                yield Record(
                    kind, key, data[key_end + 4 : value_end], data[value_end + 1 : end], base + end
                )
            else:
                yield Record(kind, key, None, data[key_end + 1 : end], base + end)
        at = end


def read_part(handle: ReadHandle, start: int, stop: int) -> bytes:
    """The bytes from `start` to `stop`. LogChangedError if the file is shorter."""
    try:
        return handle.read(stop - start, start)
    except EOFError as error:
        raise LogChangedError(handle.path, str(error)) from None
