"""The log format, written again from its description: no shared code, and its own CRC-32C."""

from __future__ import annotations

import struct

import msgpack
from blake3 import blake3

_POLYNOMIAL = 0x82F63B78  # Castagnoli, reflected


def _table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _table()


def crc(data: bytes, seed: int = 0) -> int:
    """CRC-32C of `data`, going on from the checksum `seed`."""
    state = seed ^ 0xFFFFFFFF
    for byte in data:
        state = state >> 8 ^ _TABLE[(state ^ byte) & 0xFF]
    return state ^ 0xFFFFFFFF


OPEN, BATCHES, LEAF, BASE_END, SEAL = 1, 2, 3, 4, 5


class LogWriter:
    """A log, built frame by frame in memory."""

    def __init__(self, log_id: bytes, generation: int, base_seq: int = 0) -> None:
        header = b"\x89FLG\r\n\x1a\n" + struct.pack(
            "<HHI16sQQ", 1, 0, 52, log_id, generation, base_seq
        )
        self.link = crc(header)
        self.raw = header + struct.pack("<I", self.link)
        self.seed = crc(log_id + struct.pack("<Q", generation))
        self.seq = self.synced = base_seq

    def frame(self, kind: int, body: bytes, *, batches: int = 0, flags: int = 0) -> None:
        self.seq += batches
        fields = struct.pack(
            "<IIQQQIBBH",
            len(body),
            crc(body),
            self.seq,
            self.synced,
            len(self.raw),
            self.link,
            kind,
            flags,
            batches,
        )
        self.link = crc(fields, self.seed)
        self.raw += (
            b"\xf5fr\xa7" + struct.pack("<I", self.link) + fields + body + b"\xa5\x5a\xc3\x3c"
        )

    def open(self, boot: str, nonce: bytes, *, flags: int = 0) -> None:
        self.frame(
            OPEN, msgpack.packb({"boot": boot, "nonce": nonce, "writer": "foldlog 1"}), flags=flags
        )

    def batches(self, *items: list, flags: int = 0) -> None:
        """Each item: [cursor, keys, values, versions]."""
        self.frame(BATCHES, msgpack.packb(list(items)), batches=len(items), flags=flags)

    def base(self, cursor: bytes, *leaves: list[tuple[str, bytes, bytes]]) -> None:
        bodies = [leaf(entries) for entries in leaves]
        for body in bodies:
            self.frame(LEAF, body)
        entries = sum(map(len, leaves))
        digest = blake3(b"".join(bodies)).digest()
        self.frame(
            BASE_END,
            msgpack.packb(
                {"cursor": cursor, "leaves": len(leaves), "entries": entries, "digest": digest}
            ),
        )

    def seal(self, *, flags: int = 0) -> None:
        self.synced = self.seq
        self.frame(SEAL, b"", flags=flags)


def leaf(entries: list[tuple[str, bytes, bytes]]) -> bytes:
    """A leaf of (key, value, version), in key order."""
    keys = b"\xff" + b"".join(key.encode() + b"\xff" for key, _, _ in entries)
    value_ends, version_ends = b"", b""
    values, versions, crcs = b"", b"", b""
    for _, value, version in entries:
        values += value
        versions += version
        value_ends += struct.pack("<I", len(values))
        version_ends += struct.pack("<H", len(versions))
        crcs += struct.pack("<I", crc(value))
    index = keys + value_ends + crcs + version_ends + versions
    sizes = struct.pack("<III", len(entries), 16 + len(index), len(keys))
    return sizes + struct.pack("<I", crc(index, crc(sizes))) + index + values
