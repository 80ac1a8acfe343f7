"""A second encoder and decoder of the Rust crate's file format, version 2, and of its artifacts.

Written from the facts of the format alone, sharing no code with the product. Slow, strict, and for
tests only.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path

from blake3 import blake3

HEADER = b"PGSS" + struct.pack("<H", 2)


def _record(type_byte: int, payload: bytes) -> bytes:
    checked = struct.pack("<B", type_byte) + payload
    return struct.pack("<I", zlib.crc32(checked)) + checked


def put(key: str, value: bytes, version: bytes = b"") -> bytes:
    raw = key.encode("utf-8")
    payload = (
        struct.pack("<H", len(raw))
        + raw
        + struct.pack("<I", len(value))
        + value
        + struct.pack("<B", len(version))
        + version
    )
    return _record(1, payload)


def delete(key: str, version: bytes = b"") -> bytes:
    raw = key.encode("utf-8")
    return _record(2, struct.pack("<H", len(raw)) + raw + struct.pack("<B", len(version)) + version)


def cursor(raw: bytes) -> bytes:
    return _record(3, struct.pack("<B", len(raw)) + raw)


def u64(number: int) -> bytes:
    return struct.pack(">Q", number)


def compacted(entries: Mapping[str, tuple[bytes, bytes]], at: bytes) -> bytes:
    """The file that a compaction writes."""
    body = b"".join(put(key, *entries[key]) for key in sorted(entries, key=str.encode))
    return HEADER + body + (cursor(at) if at else b"")


def replay(raw: bytes) -> tuple[dict[str, tuple[bytes, bytes]], bytes]:
    """What an intact file folds to. AssertionError for one that is not."""
    assert raw[:6] == HEADER
    entries: dict[str, tuple[bytes, bytes]] = {}
    at, where = b"", 6
    while where < len(raw):
        (crc, kind) = struct.unpack_from("<IB", raw, where)
        start = where + 4
        where += 5
        if kind == 3:
            length = raw[where]
            at = raw[where + 1 : where + 1 + length]
            assert len(at) == length
            where += 1 + length
        else:
            (key_len,) = struct.unpack_from("<H", raw, where)
            key = raw[where + 2 : where + 2 + key_len].decode()
            where += 2 + key_len
            value = None
            if kind == 1:
                (value_len,) = struct.unpack_from("<I", raw, where)
                value = raw[where + 4 : where + 4 + value_len]
                where += 4 + value_len
            else:
                assert kind == 2
            version_len = raw[where]
            version = raw[where + 1 : where + 1 + version_len]
            where += 1 + version_len
            if value is None:
                entries.pop(key, None)
            else:
                entries[key] = value, version
        assert where <= len(raw)
        assert zlib.crc32(raw[start:where]) == crc
    return entries, at


def write_artifact(folder: Path, payload: bytes, at: bytes, **changes: object) -> Path:
    """An artifact as the origin writes it: compact JSON, its fields in its order."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "fold.snap").write_bytes(payload)
    fields: dict[str, object] = {
        "schema_version": 1,
        "backend": "append-log",
        "backend_version": "2",
        "cursor_hex": at.hex(),
        "created_at_unix": 1_765_400_000,
        "files": [
            {"path": "data/fold.snap", "size": len(payload), "blake3": blake3(payload).hexdigest()}
        ],
    }
    (folder / "MANIFEST.json").write_text(json.dumps(fields | changes))
    return folder
