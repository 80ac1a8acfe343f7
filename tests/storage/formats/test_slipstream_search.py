"""The search for whole records behind a bad one: complete, in linear time, in bounded memory."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path
from zlib import crc32

import pytest
import slipref
from logfiles import State, opened, outcome, refused

from foldlog import CorruptLogError
from foldlog.storage.formats.slipstream import search as slipstream_search
from foldlog.storage.formats.slipstream.records import record_end
from foldlog.storage.formats.slipstream.search import find_cursor_record, find_record, one_bit_fixes
from foldlog.storage.log.files import OS_FILES, Files, ReadHandle
from foldlog.storage.repair.verify import verify_log

MIB = 1024 * 1024
FIRST = slipref.HEADER + slipref.put("first", b"1") + slipref.cursor(slipref.u64(1))
LATER = slipref.put("later", b"2", slipref.u64(3)) + slipref.cursor(slipref.u64(3))


def by_hand(data: bytes, start: int = 0) -> list[tuple[int, int]]:
    """(offset, type) of each whole record in `data`, found by trying every offset."""
    found = []
    for at in range(start, len(data) - 5):
        if data[at + 4] not in (1, 2, 3):
            continue
        try:
            end = record_end(data, at)
        except ValueError:
            continue
        if end <= len(data) and crc32(data[at + 4 : end]) == int.from_bytes(
            data[at : at + 4], "little"
        ):
            found.append((at, data[at + 4]))
    return found


def searched(path: Path, data: bytes, start: int = 0) -> int | None:
    path.write_bytes(data)
    return find_record(ReadHandle(OS_FILES, path), start, len(data))


def noise(rng: random.Random, size: int) -> bytes:
    """Bytes that look like beginnings of records, more or less often."""
    letters = rng.choice(
        [bytes(range(256)), b"\0\1\2\3", b"\1\2", b"\2", b"\3", b"\1", b"\0\3\n", b"\0\1\0\0\2"]
    )
    return bytes(rng.choices(letters, k=size))


def some_record(rng: random.Random) -> bytes:
    version = bytes(rng.choices(range(256), k=rng.randrange(11)))
    key = "k" * rng.choice([0, 1, 5, 300, 65_535])
    kind = rng.randrange(3)
    if kind == 0:
        return slipref.cursor(version)
    if kind == 1:
        return slipref.delete(key, version)
    return slipref.put(key, noise(rng, rng.choice([0, 1, 300, 4000, 5000, 70_000])), version)


@pytest.mark.parametrize(
    "seed", [*range(15), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(15, 100))]
)
def test_the_search_finds_what_a_look_at_every_offset_finds(
    path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(slipstream_search, "BLOCK_BYTES", rng.choice([65_536, 131_072]))
    parts = []
    for _ in range(rng.randrange(4)):
        parts.append(noise(rng, rng.choice([0, 1, 3, 17, 600, 3000, 66_000])))
        parts.append(some_record(rng)[: None if rng.random() < 0.7 else -1])
    data = b"".join(parts)
    wanted = by_hand(data)
    assert searched(path, data) == (wanted[0][0] if wanted else None)
    cursors = [at for at, kind in wanted if kind == 3]
    assert find_cursor_record(data) == (cursors[0] if cursors else None)
    if wanted:
        after = [at for at, _ in wanted if at > wanted[0][0]]
        assert searched(path, data, wanted[0][0] + 1) == (after[0] if after else None)


@pytest.mark.parametrize("size", [0, 5, 6, 16, 4095, 65_536, 1_000_000])
def test_a_long_record_is_found_at_any_place_and_checked_as_a_short_one_is(
    path: Path, size: int
) -> None:
    record = slipref.put("long", b"\7" * size, b"v")
    for before in (0, 1, 65_530, 65_535, 65_536, 200_001):
        data = b"\x09" * before + record + b"\x09" * 5
        assert searched(path, data) == before
        wrong = bytearray(data)
        wrong[-6] ^= 1  # in the version
        assert searched(path, bytes(wrong)) is None


CONTENTS = {
    "ones": b"\1" * (16 * MIB),
    "twos": b"\2" * (16 * MIB),
    "threes": b"\3" * (16 * MIB),
    "zeros": bytes(16 * MIB),
    "small ints": b"\1\0\0\0" * (4 * MIB),
    "a mask": struct.pack("<I", 2) * (4 * MIB),
    "cursors": b"\0\0\0\0\3\0" * (16 * MIB // 6),
    "noise": random.Random(1).randbytes(16 * MIB),
}


@pytest.mark.slow
@pytest.mark.parametrize("before", [FIRST, slipref.HEADER], ids=["second batch", "first batch"])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_torn_value_of_16_mib_opens_in_seconds_whatever_it_holds(
    path: Path, content: str, before: bytes
) -> None:
    """A value of ones took 14 to 71 s: each of its bytes could begin a record and was tried."""
    value = CONTENTS[content]
    value += b"\x09" * (16 * MIB - len(value))
    started = time.process_time()
    state = opened(path, before + slipref.put("big", value)[:-9])
    assert len(state.entries) == (before is FIRST)
    assert time.process_time() - started < 20


@pytest.mark.parametrize("letter", [1, 2, 3])
def test_a_torn_value_of_one_byte_repeated_is_searched_at_once(path: Path, letter: int) -> None:
    """The same, small enough for every run: the cost is counted in checksums, not in seconds."""
    for before in (FIRST, slipref.HEADER):
        checked = 0

        def counted(*args: object, real: object = crc32) -> int:
            nonlocal checked
            checked += 1
            return real(*args)  # type: ignore[operator, no-any-return]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(slipstream_search, "crc32", counted)
            state = outcome(path, before + slipref.put("big", bytes([letter]) * MIB)[:-9])
        assert isinstance(state, State)
        assert checked < MIB // slipstream_search._STRIDE + 20_000


def test_a_crafted_cost_is_linear_however_long_the_records_seem(path: Path) -> None:
    """Record starts of 64 KiB at every 12 bytes: each took a checksum over 64 KiB.

    The search gave up on them.
    """
    cruel = b"\0\0\0\0\x01\x01\x00k\xff\xff\x00\x00" * 20_000
    started = time.process_time()
    assert searched(path, cruel) is None
    assert time.process_time() - started < 10
    assert searched(path, cruel + LATER) == len(cruel)


def test_the_search_needs_bounded_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slipstream_search, "MAX_BLOCK_BYTES", 256 * 1024)
    with path.open("wb") as file:
        file.truncate(6 * MIB)
        file.seek(6 * MIB - 5)
        file.write(b"\1\1\1\1\1")
    handle = ReadHandle(OS_FILES, path)
    tracemalloc.start()
    assert find_record(handle, 0, 6 * MIB) is None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * MIB


# What it decides.


def damaged(value: bytes, bits: list[int], rest: bytes) -> bytes:
    """A file whose second put has wrong bits in the length of its value."""
    raw = bytearray(
        FIRST + slipref.put("mask", value, slipref.u64(2)) + slipref.cursor(slipref.u64(2)) + rest
    )
    for bit in bits:
        raw[len(FIRST) + 7 + 4 + bit // 8] ^= 1 << bit % 8
    return bytes(raw)


@pytest.mark.parametrize("bits", [[23], [22], [22, 23], [18, 21, 23]], ids=str)
@pytest.mark.parametrize("rest", [LATER, b"", LATER + b"\1\2", LATER[:-1]], ids=str)
def test_no_value_hides_a_damaged_length_from_the_search(
    path: Path, bits: list[int], rest: bytes
) -> None:
    """A value holding a million record starts made the search give up.

    The batch and all batches after it were dropped.
    """
    value = struct.pack("<I", 2) * 1_050
    error = refused(path, damaged(value, bits, rest))
    assert error.offset == len(FIRST)
    assert "damaged length" in str(error)


def test_slack_after_a_damaged_length_is_no_missing_sector(path: Path) -> None:
    """A length damaged upwards ran into the zeros at the end.

    They were taken for a sector that a power loss had left out.
    """
    raw = damaged(b"v" * 40, [13], LATER)
    for zeros in (20_000, 1 << 20):
        refused(path, raw + bytes(zeros))


def straddling(after: int) -> bytes:
    """A log whose last cursor record ends in seven zeros, with `after` bytes after 512."""
    cursor = slipref.cursor(b"\3" + bytes(7))
    rest = 512 + after - len(FIRST) - len(cursor)
    return FIRST + slipref.put("f", b"v" * (rest - len(slipref.put("f", b"")))) + cursor


@pytest.mark.parametrize("after", range(1, 17))
def test_a_last_sector_that_was_lost_is_torn_however_little_it_held(path: Path, after: int) -> None:
    """If it held less than 16 bytes, the log was refused after a power loss."""
    raw = straddling(after)
    assert len(raw) == 512 + after
    state = opened(path, raw[:512] + bytes(after))
    assert set(state.entries) == ({"first", "f"} if after <= 15 else {"first"})


@pytest.mark.parametrize("after", [1, 4, 7, 8])
@pytest.mark.parametrize("zeros", [0, 7, 600])
def test_a_flip_in_a_cursor_record_that_ends_in_zeros_is_refused(
    path: Path, after: int, zeros: int
) -> None:
    """With slack after it, each flip in its checksum or its cursor read as a lost sector."""
    raw = straddling(after)
    for at in range(len(raw) - 14, len(raw)):
        flipped = raw[:at] + bytes((raw[at] ^ 1 << at % 8,)) + raw[at + 1 :]
        refused(path, flipped + bytes(zeros))


def test_a_torn_batch_with_no_cursor_record_after_it_was_never_answered(path: Path) -> None:
    """Its whole records behind a damaged one are no loss: the batch itself was not complete."""
    half = bytearray(slipref.put("a", b"x" * 500) + slipref.put("b", b"y"))
    half[9] ^= 3  # two bits of a length
    half[10] ^= 3
    raw = FIRST + bytes(half)
    state = opened(path, raw)
    assert list(state.entries) == ["first"]
    refused(path, raw + LATER)


BASE = slipref.compacted(
    {f"{number:05}": (b"v" * 20, slipref.u64(number)) for number in range(100)}, slipref.u64(9)
)
NO_CURSOR = slipref.compacted({f"{number:05}": (b"v" * 20, b"v") for number in range(100)}, b"")


@pytest.mark.parametrize("base", [BASE, NO_CURSOR], ids=["with a cursor", "without"])
def test_zeros_to_the_end_of_a_compacted_base_are_corruption(path: Path, base: bytes) -> None:
    """Read as torn, they lost synced entries. Both writers sync a base before they rename it."""
    for start in (*range(7, 300, 5), 512, 1024, 2048, len(base) - 600, len(base) - 20):
        refused(path, base[:start] + bytes(len(base) - start))


def test_zeros_after_a_base_and_after_the_header_are_a_lost_append(path: Path) -> None:
    for base in (BASE, slipref.HEADER):
        state = opened(path, base + bytes(5000))
        assert len(state.entries) == (100 if base is BASE else 0)


@pytest.mark.parametrize("bits", [[20], [20, 21, 22]], ids=str)
def test_a_damaged_length_in_a_base_without_a_cursor_is_corruption(
    path: Path, bits: list[int]
) -> None:
    raw = bytearray(NO_CURSOR)
    for bit in bits:
        raw[6 + 7 + 5 + bit // 8] ^= 1 << bit % 8
    refused(path, bytes(raw))


def test_a_torn_value_that_holds_a_log_is_refused_as_the_page_says(path: Path) -> None:
    """Whole batches stand in it: it looks the same as a damaged length before them."""
    raw = FIRST + slipref.put("backup", FIRST, slipref.u64(2))
    for cut in range(len(FIRST) + 1, len(raw)):
        result = outcome(path, raw[:cut])
        holds_a_cursor = raw[len(FIRST) : cut].find(FIRST[-14:]) >= 0
        assert isinstance(result, CorruptLogError if holds_a_cursor else State), cut


def test_one_bit_is_recognised_wherever_the_record_then_ends() -> None:
    record = slipref.put("k", b"value", b"v")
    for rest in (b"", bytes(9), b"more", LATER):
        for at in (4, 5, 6, 8, 9, 10, 11):
            for bit in range(8):
                flipped = bytearray(record + rest)
                flipped[at] ^= 1 << bit
                assert one_bit_fixes(bytes(flipped)), (at, bit)


@pytest.mark.parametrize("junk", [b"", b"\xff" * 100], ids=["nothing", "junk"])
@pytest.mark.parametrize("after", [b"", b"\1\1\1", LATER], ids=["no data", "junk", "records"])
def test_a_hole_as_long_as_a_disk_is_not_read(path: Path, junk: bytes, after: bytes) -> None:
    """Its zeros were read, and searched: hours for a terabyte."""
    hole = 1 << 40
    path.write_bytes(FIRST + junk)
    with open(path, "r+b") as file:
        file.seek(hole)
        file.write(after)
        file.truncate(2 * hole)

    class Counted(Files):
        taken = 0

        def read(self, fd: int, size: int, offset: int) -> bytes:
            Counted.taken += size
            assert Counted.taken < 256 * MIB
            return super().read(fd, size, offset)

    report = verify_log(path, files=Counted())
    assert report.ok is not bool(after or junk)
    with ReadHandle(Counted(), path) as handle:
        found = find_record(handle, len(FIRST), 2 * hole)
    assert found == (hole if after == LATER else None)
