"""The value of a key of the database: an entry, or the record of the fold's state.

    entry    key              the key in UTF-8, whose byte order is the order of code points
             value            version length u8 | version | value
    state    key              FF "foldlog"
             value            generation u16 | store id 16 | seq u64 | cursor length u8 | cursor |
                              origin length u8 | origin | CRC-32C u32 of all before it

UTF-8 never holds the byte FF, so no entry can have the key of the state, and all entries come
before it. The state is written in one batch with the entries that it covers. RocksDB checksums
both; this module checks their form.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from crc32c import crc32c

from foldlog.protocol.tokens import MAX_TOKEN_BYTES, WatchCursor

GENERATION = 1
"""The generation of this encoding. A database of a newer one is refused."""
STATE_KEY = b"\xfffoldlog"
ENTRIES_END = b"\xff"
"""The least key above all entries."""
MAX_ORIGIN_BYTES = 32

VERSION_PREFIXES = tuple(bytes((length,)) for length in range(MAX_TOKEN_BYTES + 1))
_HEAD = struct.Struct("<H16sQ")
_CRC = struct.Struct("<I")


def encode_entry(value: bytes, version: bytes) -> bytes:
    """The encoded entry. The caller has checked both against their limits."""
    return VERSION_PREFIXES[len(version)] + version + value if version else b"\0" + value


def decode_entry(raw: bytes) -> tuple[bytes, bytes]:
    """(value, version) of what `encode_entry` made. ValueError for anything else."""
    if not raw:
        raise ValueError("an entry without a version length")
    end = raw[0] + 1
    if end > MAX_TOKEN_BYTES + 1 or end > len(raw):
        raise ValueError(f"an entry of {len(raw)} bytes says that its version takes {raw[0]}")
    return raw[end:], raw[1:end]


class NewerGeneration(ValueError):
    """The database was written by a foldlog whose encoding is newer than this one's."""


class State(NamedTuple):
    """The sequence, cursor and origin of the fold in a database."""

    store_id: bytes
    """16 random bytes, made when the database was created; a copy keeps them."""
    seq: int
    """The number of the last batch."""
    cursor: WatchCursor
    origin: bytes = b""
    """The stream that the cursor is a position in, at most 32 bytes; empty if never named."""

    def pack(self) -> bytes:
        """The value of the key `STATE_KEY`."""
        body = b"".join(
            (
                _HEAD.pack(GENERATION, self.store_id, self.seq),
                bytes((len(self.cursor),)),
                self.cursor,
                bytes((len(self.origin),)),
                self.origin,
            )
        )
        return body + _CRC.pack(crc32c(body))


NO_STATE = State(b"", 0, WatchCursor.none())
"""That of an empty database."""


def parse_state(raw: bytes) -> State:
    """The state that `pack` encoded. NewerGeneration, or ValueError if it is not valid."""
    if len(raw) < _HEAD.size + 2 + _CRC.size:
        raise ValueError(f"the state record has {len(raw)} bytes")
    body = raw[: -_CRC.size]
    if crc32c(body) != _CRC.unpack_from(raw, len(body))[0]:
        raise ValueError("the checksum of the state record is wrong")
    generation, store_id, seq = _HEAD.unpack_from(body)
    if generation > GENERATION:
        raise NewerGeneration(
            f"the database is of generation {generation}, this foldlog reads {GENERATION}"
        )
    cursor, at = _short(body, _HEAD.size, MAX_TOKEN_BYTES)
    origin, at = _short(body, at, MAX_ORIGIN_BYTES)
    if generation != GENERATION or at != len(body):
        raise ValueError("the state record is malformed")
    return State(store_id, seq, WatchCursor(cursor), origin)


def _short(body: bytes, at: int, limit: int) -> tuple[bytes, int]:
    """The bytes that a length byte at `at` announces, and where they end."""
    end = at + 1 + (body[at] if at < len(body) else 0)
    if at >= len(body) or end > len(body) or end - at - 1 > limit:
        raise ValueError("the state record is malformed")
    return body[at + 1 : end], end
