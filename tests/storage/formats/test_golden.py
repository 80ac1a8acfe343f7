"""Golden files: released files stay readable, and written files stay the same, byte for byte.

Each file exists three times: as bytes in `golden/`, as `refencoder.py` encodes it, and as the
product writes it under fixed ids. A change of the format shows here first. Running this file as a
script rewrites the files.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from logfiles import State, read_state
from refencoder import LogWriter, crc

from foldlog import AppendLogSnapshot, Delete, Purge, Put, VersionToken, WatchCursor
from foldlog.protocol.frames import FLAG_SYNC_EACH
from foldlog.protocol.updates import encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine as Engine

GOLDEN = Path(__file__).parent / "golden"
BOOT = "b007b007-b007-b007-b007-b007b007b007"
LOG_ID, NONCE, GENERATION = b"\x1d" * 16, b"\x1d" * 8, 0x0123456789ABCDEF

NUMBER, STAMP = VersionToken.from_u64(7), VersionToken(b"versionst!")
FIRST = [
    Put("a", b"1", NUMBER),
    Put("", b""),
    Put("é\U0001f600", b"wide", STAMP),
    Put("gone", b"soon"),
]
SECOND = [Delete("gone", NUMBER), Purge("never"), Put("a", b"2", STAMP)]
ENTRIES = {"": (b"", b""), "a": (b"2", bytes(STAMP)), "é\U0001f600": (b"wide", bytes(STAMP))}
CURSORS = [bytes(WatchCursor.from_u64(1)), b"versionst!"]

ITEMS = [
    [
        CURSORS[0],
        ["a", "", "é\U0001f600", "gone"],
        [b"1", b"", b"wide", b"soon"],
        [bytes(NUMBER), b"", bytes(STAMP), b""],
    ],
    [CURSORS[1], ["gone", "never", "a"], [None, False, b"2"], [bytes(NUMBER), b"", bytes(STAMP)]],
]
BIG = [(f"key{n:04}", b"value %d" % n * (n % 3), n.to_bytes(8, "big")) for n in range(900)]


def ref_log(cursor: bytes = b"", *leaves: list, base_seq: int = 0) -> LogWriter:
    log = LogWriter(LOG_ID, GENERATION, base_seq=base_seq)
    log.base(cursor, *leaves)
    return log


def ref_batches() -> bytes:
    log = ref_log()
    log.open(BOOT, NONCE)
    log.batches(ITEMS[0])
    log.batches(ITEMS[1])
    log.seal()
    return log.raw


def ref_group_synced() -> bytes:
    log = ref_log()
    log.open(BOOT, NONCE, flags=1)
    log.batches(*ITEMS, flags=1)
    return log.raw


def ref_compacted() -> bytes:
    return ref_log(CURSORS[1], [(key, *ENTRIES[key]) for key in sorted(ENTRIES)], base_seq=2).raw


def ref_leaves() -> bytes:
    leaves, current = [], []
    for entry in BIG:
        current.append(entry)
        if len(current) >= 128 and (not crc(entry[0].encode()) % 128 or len(current) == 512):
            leaves.append(current)
            current = []
    if current:
        leaves.append(current)
    return ref_log(CURSORS[0], *leaves, base_seq=1).raw


REFERENCE = {
    "empty": (lambda: ref_log().raw, State(0, b"", {})),
    "batches": (ref_batches, State(2, CURSORS[1], ENTRIES)),
    "group_synced": (ref_group_synced, State(2, CURSORS[1], ENTRIES)),
    "compacted": (ref_compacted, State(2, CURSORS[1], ENTRIES)),
    "leaves": (
        ref_leaves,
        State(1, CURSORS[0], {key: (value, version) for key, value, version in BIG}),
    ),
}


@pytest.fixture
def ids_fixed(monkeypatch):
    monkeypatch.setattr("secrets.token_bytes", lambda size: b"\x1d" * size)
    monkeypatch.setattr("secrets.randbits", lambda bits: GENERATION)
    monkeypatch.setattr("foldlog.storage.formats.foldlog.codec.boot_id", lambda: BOOT)


def golden(name: str) -> bytes:
    return bytes.fromhex((GOLDEN / f"{name}.hex").read_text())


@pytest.mark.parametrize("name", REFERENCE)
def test_a_golden_file_is_what_the_description_says(name):
    assert REFERENCE[name][0]() == golden(name)


@pytest.mark.parametrize("name", REFERENCE)
def test_a_golden_file_reads_as_it_should(path, name):
    path.write_bytes(golden(name))
    assert read_state(path) == REFERENCE[name][1]
    assert path.read_bytes() == golden(name)
    _, cursor, entries = REFERENCE[name][1]
    opened_at, snap = AppendLogSnapshot.open(path)
    with snap:
        assert bytes(opened_at) == cursor
        assert {key: (value, bytes(version)) for key, value, version in snap.range("")} == entries
        for key, (value, version) in entries.items():
            assert snap.get(key) == (key, value, VersionToken(version))


def write(name: str, path: Path) -> None:
    if name == "leaves":
        engine = Engine(path)
        puts = [Put(key, value, VersionToken(version)) for key, value, version in BIG]
        engine.commit([encode_batch(puts, WatchCursor(CURSORS[0]))])
        engine.compact()
        return engine.log.abandon()
    engine = Engine(path, sync_each=name == "group_synced")
    batches = [
        encode_batch(updates, WatchCursor(at))
        for updates, at in zip([FIRST, SECOND], CURSORS, strict=True)
    ]
    if name == "group_synced":
        engine.commit(batches)
        return engine.log.abandon()
    if name != "empty":
        for batch in batches:
            engine.commit([batch])
    if name == "compacted":
        engine.compact()
    return engine.close()


@pytest.mark.usefixtures("ids_fixed")
@pytest.mark.parametrize("name", REFERENCE)
def test_the_product_writes_a_golden_file_to_the_byte(path, name):
    write(name, path)
    assert path.read_bytes() == golden(name)


def test_the_reference_checksum_is_crc_32c():
    assert crc(b"123456789") == 0xE3069283
    assert crc(b"56789", crc(b"1234")) == crc(b"123456789")
    assert FLAG_SYNC_EACH == 1


if __name__ == "__main__":
    for name, (make, _) in REFERENCE.items():
        raw = make().hex()
        lines = (raw[at : at + 64] for at in range(0, len(raw), 64))
        (GOLDEN / f"{name}.hex").write_text("\n".join(lines) + "\n")
