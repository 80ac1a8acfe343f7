"""Batches and small maps from the bytes of a frame, or the verdict that no writer produces these
bytes, whatever their checksum says.

Only this verdict, `Undecodable`, is evidence of damage. Any other error during decoding (a
MemoryError, an OSError, an interrupt, an exception raised by a signal handler) is about the process
or the machine, not about the bytes. So callers of a decoder catch `Undecodable` and let everything
else through.
"""

from __future__ import annotations

from itertools import islice
from typing import Any, NoReturn

import msgpack

from foldlog.protocol.tokens import MAX_ORIGIN_BYTES, MAX_TOKEN_BYTES, WatchCursor
from foldlog.protocol.updates import (
    MAX_GROUP,
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    SAFE_KEY_CHARS,
    SLICE,
    DecodedBatch,
    DecodedPuts,
)

MAX_MAP_BYTES = 4096
"""The longest body of an OPEN or BASE_END frame, which is a map. Writers need less than 200
bytes."""
_MAX_MAP_ENTRIES = 8
_SMALL_BODY = 4096
"""The longest body unpacked by one call: nested arrays with false lengths can allocate a thousand
times the body's size."""
_READ_BYTES = 64 * 1024
"""Bytes of a longer body copied at a time."""
_new = tuple.__new__  # a NamedTuple in half the time
_token = bytes.__new__  # a token whose length was checked
_NO_BATCH = "a batch is not [cursor, keys, values, versions] with an optional origin"

MSGPACK_ERRORS: tuple[type[Exception], ...] = (ValueError, TypeError, msgpack.UnpackException)
"""What msgpack raises for bytes that it cannot unpack."""


class Undecodable(ValueError):
    """The bytes are not a valid encoding of what belongs here."""


def refuse_nested(*_inner: Any) -> NoReturn:
    """A msgpack hook for places that allow only plain values: refuses the first array, map or
    extension."""
    raise Undecodable("an array, a map or an extension where a plain value belongs")


def unpack_map(body: bytes | memoryview) -> dict[str, Any]:
    """The map of up to 8 plain values in `body`. Undecodable for anything else."""
    if len(body) > MAX_MAP_BYTES:
        raise Undecodable(f"{len(body)} bytes, over the limit of {MAX_MAP_BYTES}")
    try:
        fields = msgpack.unpackb(
            body,
            max_map_len=_MAX_MAP_ENTRIES,
            max_array_len=0,
            list_hook=refuse_nested,
            ext_hook=refuse_nested,
        )
    except Undecodable:
        raise
    except MSGPACK_ERRORS as error:
        raise Undecodable(f"{type(error).__name__}: {error}") from None
    if type(fields) is not dict:
        raise Undecodable("not a map")
    return fields


def decode_batches(body: bytes | memoryview, count: int) -> list[DecodedBatch]:
    """The batches in a BATCHES body. Undecodable unless there are `count` of them, each as
    `encode_batch` writes it.

    An array's length is checked against the rest of the body before anything is allocated, and
    arrays are allowed only where they belong. So a refused body never takes more memory than a
    valid one of the same size.
    """
    try:
        if len(body) > _SMALL_BODY:
            return _decoded_in_steps(body, count)
        # A record takes at least three bytes of body, so a longer array cannot be valid.
        items = msgpack.unpackb(
            body, max_array_len=len(body) // 3 + 5, max_map_len=0, max_ext_len=0
        )
    except Undecodable:
        raise
    except MSGPACK_ERRORS as error:
        raise Undecodable(f"undecodable: {type(error).__name__}: {error}") from None
    if type(items) is not list:
        raise Undecodable("not an array of batches")
    if len(items) != count or not count:
        _check_count(len(items), count)
    return [_usual_item(item) or _decode_item(item, len(body)) for item in items]


def _check_count(found: int, count: int) -> None:
    if not 0 < found <= MAX_GROUP:
        raise Undecodable(f"{found} batches in one frame")
    if found != count:
        raise Undecodable(f"{found} batches, but the header says {count}")


def _decoded_in_steps(body: bytes | memoryview, count: int) -> list[DecodedBatch]:
    """`decode_batches`, array by array. Cost: 60 ns an update more than a single call."""
    size = len(body)
    unpacker = msgpack.Unpacker(
        _Reader(body),
        read_size=min(size, _READ_BYTES),
        max_buffer_size=MAX_VALUE_BYTES + _READ_BYTES,
        max_array_len=0,
        list_hook=refuse_nested,
        object_hook=refuse_nested,
        ext_hook=refuse_nested,
    )
    found = unpacker.read_array_header()
    _check_count(found, count)
    batches = []
    for _ in range(found):
        length = unpacker.read_array_header()
        if length not in (4, 5):
            raise Undecodable(_NO_BATCH)
        cursor = unpacker.unpack()
        columns = [_column(unpacker, size) for _ in range(3)]
        origin = [unpacker.unpack()] if length == 5 else []
        batches.append(_decode_item([cursor, *columns, *origin], size))
    if unpacker.tell() != size:
        raise Undecodable("bytes follow the last batch")
    return batches


class _Reader:
    """A body as a file object, so that it is not copied all at once."""

    def __init__(self, body: bytes | memoryview) -> None:
        self._body, self._at = memoryview(body), 0

    def read(self, size: int) -> bytes:
        start, self._at = self._at, self._at + size
        return bytes(self._body[start : self._at])


def _column(unpacker: msgpack.Unpacker, size: int) -> list[Any]:
    count = unpacker.read_array_header()
    if count > size - unpacker.tell():
        raise Undecodable(f"an array of {count} values is longer than the body")
    column: list[Any] = []
    while len(column) < count:
        piece = list(islice(unpacker, min(count - len(column), SLICE)))
        if not piece:
            raise Undecodable("the body ends within an array")
        if column:
            column += piece
        else:
            column = piece
    return column


def _usual_item(item: object) -> DecodedBatch | None:
    """The batch in `item`, of a small body, if it only puts and has no origin: most do. None if it
    is another, or not valid. Costs half of `_decode_item`."""
    if type(item) is not list or len(item) != 4:
        return None
    cursor, keys, values, versions = item
    if not (
        type(keys) is type(values) is type(versions) is list
        and len(keys) == len(values) == len(versions)
        and type(cursor) is bytes
        and len(cursor) <= MAX_TOKEN_BYTES
    ):
        return None
    try:  # joining fails at once if an element is of another type
        "".join(keys)
        b"".join(values)
        short = len(b"".join(versions)) <= MAX_TOKEN_BYTES
    except TypeError:
        return None
    if not short and max(map(len, versions)) > MAX_TOKEN_BYTES:
        return None
    return _new(DecodedPuts, (_token(WatchCursor, cursor), keys, values, versions, b""))


def _decode_item(item: object, size: int) -> DecodedBatch:
    """The batch in `item`, unpacked from a body of `size` bytes. Nothing in it is longer than
    that."""
    if type(item) is not list or len(item) not in (4, 5):
        raise Undecodable(_NO_BATCH)
    cursor, keys, values, versions = item[:4]
    origin = item[4] if len(item) == 5 else b""
    if len(item) == 5 and not (type(origin) is bytes and 0 < len(origin) <= MAX_ORIGIN_BYTES):
        raise Undecodable("an origin is not 1 to 32 bytes")
    if type(cursor) is not bytes or len(cursor) > MAX_TOKEN_BYTES:
        raise Undecodable("a cursor is not a token")
    if not (type(keys) is list and type(values) is list and type(versions) is list):
        raise Undecodable("a column is not an array")
    if not len(keys) == len(values) == len(versions):
        raise Undecodable("columns of different lengths")
    if keys:
        if set(map(type, keys)) != {str}:
            raise Undecodable("a key is not text")
        long_keys = size > MAX_KEY_BYTES and max(map(len, keys)) > SAFE_KEY_CHARS
        if long_keys and any(len(key.encode()) > MAX_KEY_BYTES for key in keys):
            raise Undecodable("a key over the limit")
        if set(map(type, versions)) != {bytes} or max(map(len, versions)) > MAX_TOKEN_BYTES:
            raise Undecodable("a version is not a token")
        kinds = set(map(type, values))
        if not kinds <= {bytes, bool, type(None)} or (
            bool in kinds and any(value is True for value in values)
        ):
            raise Undecodable("a value is neither bytes, nil nor false")
        if size > MAX_VALUE_BYTES and max(map(len, filter(None, values)), default=0) > (
            MAX_VALUE_BYTES
        ):
            raise Undecodable("a value over the limit")
    return DecodedBatch(WatchCursor(cursor), keys, values, versions, origin)
