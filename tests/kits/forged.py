"""Logs that say what no writer would, with every checksum right: values, leaf indexes, leaves,
frames, chain, header, digest.

A log is made from its parts, one of them is changed, and then all that vouches for it is worked out
again. So what refuses it is a check of what it says, never a checksum.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgpack
from blake3 import blake3
from crc32c import crc32c

from foldlog.protocol.frames import (
    FRAME_MAGIC,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    KIND_SEAL,
    TRAILER,
    FileHeader,
)
from foldlog.storage.fold.leaf import HEADER, encode_leaf

KEYS = ["", "a", "a\n", "b", "b/1", "c", "d", "e", "é", "\U00010000"]
NUMBERS = [
    0,
    1,
    2,
    3,
    127,
    128,
    255,
    511,
    512,
    513,
    65_535,
    2**16,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
]
ODD_VALUES: list[Any] = [
    None,
    True,
    False,
    -1,
    7,
    2**63,
    1.5,
    "",
    "x",
    b"",
    b"x" * 11,
    [],
    [[]],
    {},
    [None] * 40,
]


@dataclass
class Frame:
    """A frame that is to be written. `lies`: fields of its header that are not what they should
    be."""

    kind: int
    body: bytes
    batches: int = 0
    lies: dict[str, int] = field(default_factory=dict)


def sample(chance: random.Random) -> list[Frame]:
    """The frames of a log that is right: two or three leaves, the end of the base, a session with
    batches."""
    keys = sorted(chance.sample(KEYS, chance.randint(4, len(KEYS))))
    cut = chance.randint(1, len(keys) - 1)
    leaves = []
    for part in (keys[:cut], keys[cut:]):
        values = [bytes(chance.choice([0, 1, 8, 8, 600])) for _ in part]
        leaves.append(Frame(KIND_LEAF, encode_leaf(part, values, [b"v" * 8] * len(part))))
    items = [
        [b"c", [chance.choice(KEYS)], [chance.choice([b"new", None, False])], [b"12345678"]]
        for _ in range(chance.randint(1, 3))
    ]
    base = [*leaves, Frame(KIND_BASE_END, b"")]
    if chance.random() < 0.3:
        return base  # as an artifact's payload
    return [
        *base,
        Frame(KIND_OPEN, msgpack.packb({"boot": "a boot", "nonce": b"12345678", "writer": "x"})),
        Frame(KIND_BATCHES, msgpack.packb(items), len(items)),
        Frame(KIND_BATCHES, msgpack.packb([[b"d", [], [], []]]), 1),
        Frame(KIND_SEAL, b""),
    ]


def written(frames: list[Frame], header: FileHeader | None = None) -> bytes:
    """The log of these frames, with everything that vouches for them worked out."""
    header = header or FileHeader(b"forged log id 16", 7, 3)
    raw, link, seq = header.pack(), header.link, header.base_seq
    leaves = [frame.body for frame in frames if frame.kind == KIND_LEAF]
    end = {
        "cursor": b"c",
        "leaves": len(leaves),
        "entries": sum(HEADER.unpack_from(body.ljust(16, b"\0"))[0] for body in leaves),
        "digest": blake3(b"".join(leaves)).digest(),
    }
    for frame in frames:
        body = frame.body or (msgpack.packb(end) if frame.kind == KIND_BASE_END else b"")
        seq += frame.batches
        fields = {
            "body_len": len(body),
            "body_crc": crc32c(body),
            "seq": seq,
            "synced_seq": seq if frame.kind == KIND_SEAL else header.base_seq,
            "offset": len(raw),
            "link": link,
            "kind": frame.kind,
            "flags": 0,
            "batches": frame.batches,
        } | frame.lies
        checked = struct.pack("<IIQQQIBBH", *fields.values())
        link = crc32c(checked, header.seed)
        raw += FRAME_MAGIC + link.to_bytes(4, "little") + checked + body + TRAILER
    return raw


def with_the_checksum_of(value: bytes, other: bytes) -> bytes:
    """`value` with its last 4 bytes chosen so that it has the CRC-32C of `other`, which is as
    long."""
    stem = value[:-4]
    basis: list[tuple[int, int]] = []
    zero = crc32c(stem + bytes(4))
    for bit in range(32):
        effect, mask = crc32c(stem + (1 << bit).to_bytes(4, "little")) ^ zero, 1 << bit
        for known, known_mask in basis:
            if effect ^ known < effect:
                effect, mask = effect ^ known, mask ^ known_mask
        basis.append((effect, mask))
        basis.sort(reverse=True)
    wanted, chosen = crc32c(other) ^ zero, 0
    for known, known_mask in basis:
        if wanted ^ known < wanted:
            wanted, chosen = wanted ^ known, chosen ^ known_mask
    return stem + chosen.to_bytes(4, "little")


def with_checksums(body: bytes) -> bytes:
    """A leaf whose index, and where they can be found whose values, have right checksums."""
    raw = bytearray(body)
    if len(raw) < HEADER.size:
        return body
    count, index_len, keys_len, _ = HEADER.unpack_from(raw)
    ends_at = HEADER.size + keys_len
    if count <= 512 and ends_at + 10 * count <= index_len <= len(raw):
        start = 0
        for number in range(count):
            (end,) = struct.unpack_from("<I", raw, ends_at + 4 * number)
            value = bytes(raw[index_len + start : index_len + end])
            struct.pack_into("<I", raw, ends_at + 4 * (count + number), crc32c(value))
            start = end
    if index_len <= len(raw):
        crc = crc32c(bytes(raw[HEADER.size : index_len]), crc32c(bytes(raw[:12])))
        struct.pack_into("<I", raw, 12, crc)
    return bytes(raw)


def _edited(chance: random.Random, body: bytes) -> bytes:
    """Bytes overwritten, removed, inserted or repeated."""
    raw = bytearray(body)
    for _ in range(chance.choice([1, 1, 2, 5])):
        at = chance.randrange(len(raw) + 1)
        how = chance.randrange(5)
        if how == 0:
            raw[at : at + 4] = chance.choice(NUMBERS).to_bytes(4, chance.choice(["little", "big"]))
        elif how == 1:
            raw[at : at + 1] = bytes((chance.randrange(256),))
        elif how == 2:
            del raw[at : at + chance.randint(1, 9)]
        elif how == 3:
            raw[at:at] = chance.randbytes(chance.randint(1, 9))
        else:
            raw[at:at] = raw[at : at + chance.randint(1, 40)] * chance.choice([1, 3])
    return bytes(raw)


def _forge_leaf(chance: random.Random, frames: list[Frame]) -> None:
    frame = chance.choice([frame for frame in frames if frame.kind == KIND_LEAF])
    raw = bytearray(frame.body)
    count, index_len, keys_len, _ = HEADER.unpack_from(raw)
    ends_at = HEADER.size + keys_len
    how = chance.randrange(6)
    number = chance.choice([*NUMBERS, len(raw), len(raw) + 1, index_len, count + 1, count - 1])
    if how == 0:
        struct.pack_into("<I", raw, 4 * chance.randrange(3), number)
    elif how == 1:
        struct.pack_into("<I", raw, ends_at + 4 * chance.randrange(count), number)
    elif how == 2:
        struct.pack_into(
            "<H", raw, ends_at + 8 * count + 2 * chance.randrange(count), number & 0xFFFF
        )
    elif how == 3:
        raw[HEADER.size + chance.randrange(keys_len)] = chance.randrange(256)
    elif how == 4:
        raw[:] = _edited(chance, bytes(raw))
    else:
        keys = [chance.choice(KEYS) for _ in range(count)]
        raw[:] = encode_leaf(keys, [b"v"] * count, [b"12345678"] * count)
    frame.body = with_checksums(bytes(raw)) if chance.random() < 0.9 else bytes(raw)


def _odd(chance: random.Random, depth: int = 0) -> Any:
    if depth < 3 and chance.random() < 0.4:
        return [_odd(chance, depth + 1) for _ in range(chance.randrange(4))]
    return chance.choice(ODD_VALUES)


def _forge_batches(chance: random.Random, frames: list[Frame]) -> None:
    frame = chance.choice([frame for frame in frames if frame.kind == KIND_BATCHES])
    how = chance.randrange(5)
    if how == 0:
        frame.body = _edited(chance, frame.body)
    elif how == 1:
        items = msgpack.unpackb(frame.body)
        item = chance.choice(items)
        item[chance.randrange(len(item))] = _odd(chance)
        frame.body = msgpack.packb(items)
    elif how == 2:
        frame.body = msgpack.packb(_odd(chance))
    elif how == 3:  # arrays in arrays, of lengths that lie or of nothing
        header = chance.choice(
            [b"\xdc\x7f\xff", b"\xdd\x00\x0f\xff\xff", b"\x90", b"\x91", b"\x9f", b"\x80"]
        )
        frame.body = chance.choice([b"", b"\x91\x94\xc4\x00\x91", b"\xdc\xff\xff"])
        frame.body += header * chance.choice([10, 2000, 20_000])
    else:
        frame.batches = chance.choice([0, 1, 2, 3, 65_535])


def _forge_map(chance: random.Random, frames: list[Frame]) -> None:
    frame = chance.choice([frame for frame in frames if frame.kind in (KIND_OPEN, KIND_BASE_END)])
    body = frame.body or msgpack.packb(
        {"cursor": b"", "leaves": 2, "entries": 4, "digest": b"d" * 32}
    )
    fields = msgpack.unpackb(body)
    if chance.random() < 0.5:
        fields[chance.choice([*fields, "other"])] = _odd(chance)
        frame.body = msgpack.packb(fields)
    else:
        frame.body = _edited(chance, body)


def _forge_header(chance: random.Random, frames: list[Frame]) -> None:
    frame = chance.choice(frames)
    widths = {
        "body_len": 4,
        "seq": 8,
        "synced_seq": 8,
        "offset": 8,
        "link": 4,
        "kind": 1,
        "flags": 1,
        "batches": 2,
    }
    name = chance.choice(list(widths))
    number = chance.choice([*NUMBERS, 2**63, 2**64 - 1])
    frame.lies[name] = number & 2 ** (8 * widths[name]) - 1


def _reorder(chance: random.Random, frames: list[Frame]) -> None:
    at = chance.randrange(len(frames))
    how = chance.randrange(3)
    if how == 0:
        frames.insert(chance.randrange(len(frames)), frames[at])
    elif how == 1:
        del frames[at]
    else:
        other = chance.randrange(len(frames))
        frames[at], frames[other] = frames[other], frames[at]


FORGERIES: list[Callable[[random.Random, list[Frame]], None]] = [
    _forge_leaf,
    _forge_leaf,
    _forge_leaf,
    _forge_batches,
    _forge_batches,
    _forge_map,
    _forge_header,
    _reorder,
]


def forged(seed: int) -> bytes:
    """Log number `seed` of the campaign."""
    chance = random.Random(seed)
    frames = sample(chance)
    for _ in range(chance.choice([1, 1, 1, 2])):
        try:
            chance.choice(FORGERIES)(chance, frames)
        except (struct.error, ValueError, IndexError, TypeError):
            continue  # an earlier forgery left nothing for this one to change
    header = FileHeader(b"forged log id 16", 7, chance.choice([3, 3, 3, 0, 2**64 - 1]))
    try:
        raw = written(frames, header)
    except struct.error:
        return written(sample(chance))
    if chance.random() < 0.1:
        raw = raw[: chance.randrange(len(raw) + 1)]
    return raw + chance.choice([b"", b"", b"", b"", bytes(600), b"\1" * 70])
