"""The file format of the Rust crate: byte for byte, and its rules about damage."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import slipref
from logfiles import State, opened, outcome, read_state, refused, state_of
from sampling import every, sample

import foldlog
from foldlog import (
    AppendLogSnapshot,
    CorruptLogError,
    Delete,
    InvalidFormatError,
    Purge,
    Put,
    VersionToken,
    WatchCursor,
)
from foldlog.protocol.updates import encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.formats.registry import load
from foldlog.storage.formats.slipstream import records as slipstream
from foldlog.storage.formats.slipstream.walk import walk_records
from foldlog.storage.log.files import OS_FILES, ReadHandle
from foldlog.storage.repair.verify import verify_log
from foldlog.testing import flips

pytestmark = pytest.mark.exhaustive

STAMP = bytes.fromhex("0102030405060708090a")  # a FoundationDB versionstamp: 10 bytes


def u64(number: int) -> WatchCursor:
    return WatchCursor.from_u64(number)


def open_at(path: Path, **options: Any) -> AppendLogSnapshot:
    return AppendLogSnapshot.open(path, format="slipstream-v2", **options)[1]


def three_batches() -> list[bytes]:
    """The records of a file of three batches, none of them redundant to the eye of a compaction."""
    return [
        slipref.put("alpha", b"value-alpha", slipref.u64(1)),
        slipref.cursor(slipref.u64(1)),
        slipref.put("bravo", b"value-bravo", STAMP),
        slipref.delete("alpha", slipref.u64(2)),
        slipref.cursor(STAMP),
        slipref.put("charlie", b"", b""),
        slipref.cursor(slipref.u64(3)),
    ]


WHOLE = slipref.HEADER + b"".join(three_batches())


def states() -> list[tuple[dict[str, tuple[bytes, bytes]], bytes]]:
    """The state after each of the records, the first being the one before them."""
    records = three_batches()
    return [
        slipref.replay(slipref.HEADER + b"".join(records[:count]))
        for count in range(len(records) + 1)
    ]


def seen(state: State) -> tuple[dict[str, tuple[bytes, bytes]], bytes]:
    return state.entries, state.cursor


# Byte for byte.


def test_a_new_log_is_its_header(path: Path) -> None:
    open_at(path).close()
    assert path.read_bytes() == b"PGSS\x02\x00"


def test_a_batch_is_its_records_in_order_and_a_cursor_record(path: Path) -> None:
    snap = open_at(path, compact_threshold=1 << 40)
    snap.apply(
        [
            Put("k", b"one", VersionToken.from_u64(7)),
            Put("k", b"two", VersionToken(STAMP)),
            Delete("gone", VersionToken.from_u64(8)),
            Purge("é\0", VersionToken(b"\xff")),
            Put("", b"", VersionToken.unknown()),
        ],
        u64(258),
    )
    snap.apply([], WatchCursor(STAMP))
    snap.apply([Put("k", b"x")], WatchCursor.none())
    expected = (
        slipref.HEADER
        + slipref.put("k", b"one", slipref.u64(7))
        + slipref.put("k", b"two", STAMP)
        + slipref.delete("gone", slipref.u64(8))
        + slipref.delete("é\0", b"\xff")
        + slipref.put("", b"")
        + slipref.cursor(slipref.u64(258))
        + slipref.cursor(STAMP)
        + slipref.put("k", b"x")
        + slipref.cursor(b"")
    )
    assert path.read_bytes() == expected
    assert path.read_bytes()[:27].hex() == "504753530200" + expected[6:27].hex()
    snap.close()
    assert path.read_bytes() == expected, "opening, syncing and closing leave no trace"


def test_one_record_of_each_kind_spelled_out_in_hex(path: Path) -> None:
    """A put of 22 bytes, a cursor of 14, a delete of 17, as the facts of the format add up."""
    snap = open_at(path, compact_threshold=1 << 40)
    snap.apply([Put("a", b"x", VersionToken.from_u64(1))], u64(1))
    snap.apply([Delete("a", VersionToken.from_u64(2))], u64(2))
    raw = path.read_bytes()
    snap.close()
    assert len(raw) == 6 + 22 + 14 + 17 + 14
    assert raw[10:28].hex(" ") == "01 01 00 61 01 00 00 00 78 08 00 00 00 00 00 00 00 01"
    assert raw[32:42].hex(" ") == "03 08 00 00 00 00 00 00 00 01"
    assert raw[46:59].hex(" ") == "02 01 00 61 08 00 00 00 00 00 00 00 02"


def test_a_compacted_log_is_a_put_for_each_key_in_order_and_one_cursor(path: Path) -> None:
    snap = open_at(path, compact_threshold=1 << 40)
    keys = ["b", "", "a\U0010ffff", "é", "\ud7ff", "\ue000", "a", "ab", "\U00010000", "x" * 65_535]
    snap.apply([Put(key, key.encode()[:5], VersionToken(b"v")) for key in keys], u64(1))
    snap.apply([Delete("b"), Put("a", b"again")], u64(2))
    snap.compact()
    entries = {key: (key.encode()[:5], b"v") for key in keys if key != "b"} | {"a": (b"again", b"")}
    assert path.read_bytes() == slipref.compacted(entries, slipref.u64(2))
    snap.apply([Delete(key) for key in entries], WatchCursor.none())
    snap.compact()
    assert path.read_bytes() == slipref.HEADER, "no entries and no cursor: no records"
    snap.close()


def test_a_file_that_the_origin_wrote_is_worked_on_in_place(path: Path) -> None:
    path.write_bytes(WHOLE)
    cursor, snap = AppendLogSnapshot.open(path)  # the header tells the format
    assert cursor == u64(3)
    assert (snap.report.frames, snap.report.batches, snap.report.compacted) == (7, 2, True)
    assert [tuple(entry) for entry in snap.range()] == [
        ("bravo", b"value-bravo", VersionToken(STAMP)),
        ("charlie", b"", b""),
    ]
    assert path.read_bytes() == slipref.compacted(
        {"bravo": (b"value-bravo", STAMP), "charlie": (b"", b"")}, slipref.u64(3)
    )
    snap.apply([Put("delta", b"d")], u64(4))
    snap.close()
    assert slipref.replay(path.read_bytes())[1] == slipref.u64(4)


def test_a_compact_log_is_not_written_again(path: Path) -> None:
    raw = slipref.compacted({"a": (b"1", b""), "b": (b"2", b"")}, slipref.u64(9))
    path.write_bytes(raw)
    inode = path.stat().st_ino
    _, snap = AppendLogSnapshot.open(path)
    snap.close()
    assert (path.read_bytes(), path.stat().st_ino, snap.report.compacted) == (raw, inode, False)
    assert (snap.report.entries, snap.report.batches) == (2, 0)


@pytest.mark.parametrize(
    "records",
    [
        slipref.cursor(slipref.u64(5)),
        b"",
        slipref.put("a", b"1"),
        slipref.put("a", b"1") + slipref.cursor(STAMP),
    ],
    ids=["a cursor only", "nothing", "entries without a cursor", "a 10-byte cursor"],
)
def test_the_smallest_compact_files_read_back(path: Path, records: bytes) -> None:
    raw = slipref.HEADER + records
    path.write_bytes(raw)
    _, snap = AppendLogSnapshot.open(path)
    assert (
        {e.key: (e.value, bytes(e.version)) for e in snap.range()},
        bytes(snap.cursor()),
    ) == slipref.replay(raw)
    assert not snap.report.compacted
    snap.close()
    assert path.read_bytes() == raw


A, AT_1 = slipref.put("a", b"1"), slipref.cursor(slipref.u64(1))
NOT_COMPACT = {
    "out of order": slipref.put("b", b"1") + A + AT_1,
    "twice": A + A + AT_1,
    "a delete": slipref.delete("a") + AT_1,
    "the none-cursor": slipref.cursor(b""),
    "behind the cursor": AT_1 + slipref.put("a", b"half of a batch"),
    "two cursors": AT_1 + AT_1,
}


@pytest.mark.parametrize("records", NOT_COMPACT.values(), ids=NOT_COMPACT)
def test_what_is_not_compact_is_compacted_when_it_is_opened(path: Path, records: bytes) -> None:
    raw = slipref.HEADER + records
    path.write_bytes(raw)
    _, snap = AppendLogSnapshot.open(path)
    snap.close()
    assert snap.report.compacted
    assert path.read_bytes() == slipref.compacted(*slipref.replay(raw))


def test_records_behind_the_last_cursor_are_applied_and_the_cursor_stays(path: Path) -> None:
    path.write_bytes(slipref.HEADER + b"".join(three_batches()[:-1]))
    state = read_state(path)
    assert seen(state) == states()[-2]
    assert state.cursor == STAMP


# Its rules about damage.


def test_every_cut_drops_the_last_record_that_it_cuts_and_nothing_else(path: Path) -> None:
    raw = WHOLE
    ends = list(itertools.accumulate(map(len, three_batches()), initial=6))
    for size in range(6, len(raw) + 1):
        whole = sum(end <= size for end in ends) - 1
        assert seen(opened(path, raw[:size])) == states()[whole]
        assert path.read_bytes() == raw[: ends[whole]], "what was cut is cut off the file"


def test_cut_bytes_are_kept_beside_the_log(path: Path) -> None:
    raw = WHOLE
    path.write_bytes(raw[:-3])
    engine = Engine(path)
    report = engine.report
    engine.log.abandon()
    assert report.cut_bytes == 11
    assert "ends early" in report.cut_reason
    assert report.kept_at is not None
    assert report.kept_at.read_bytes() == raw[-14:-3]


def test_a_torn_first_record_goes_and_what_is_applied_then_stays(path: Path) -> None:
    path.write_bytes(slipref.HEADER + bytes.fromhex("112233440100"))
    snap = open_at(path)
    snap.apply([Put("charlie", b"stays")], u64(3))
    snap.close()
    assert path.read_bytes() == slipref.compacted({"charlie": (b"stays", b"")}, slipref.u64(3))


@pytest.mark.parametrize("zeros", [1, 3, 4, 5, 6, 7, 14, 15, 16, 17, 511, 512, 4096, 1_000_000])
def test_trailing_zeros_are_slack(path: Path, zeros: int) -> None:
    raw = WHOLE
    assert seen(opened(path, raw + bytes(zeros))) == states()[-1]
    assert path.read_bytes() == raw


@pytest.mark.parametrize("zeros", [5, 6, 14, 512, 5000])
@pytest.mark.parametrize("behind", range(7))
def test_zeros_before_more_records_are_corruption(path: Path, zeros: int, behind: int) -> None:
    records = three_batches()
    raw = slipref.HEADER + b"".join(records[:behind]) + bytes(zeros) + b"".join(records[behind:])
    error = refused(path, raw)
    assert error.offset == 6 + sum(map(len, records[:behind]))
    assert error.last_good_cursor == states()[behind][1]


@pytest.mark.parametrize("last", range(7))
@every(7)
def test_every_flipped_bit_is_refused(path: Path, last: int, every: int) -> None:
    """Also where the bit makes the last record seem to be cut short by the end of the file."""
    raw = slipref.HEADER + b"".join(three_batches()[: last + 1])
    for _, flipped in flips(raw, sample(range(8 * len(raw)), every)):
        refused(path, flipped, (CorruptLogError, InvalidFormatError))


def test_what_the_format_cannot_show_costs_no_more_than_the_last_record(path: Path) -> None:
    """Two bad bits can make the last record look torn. The cursor is then lower than the data."""
    raw = bytearray(WHOLE)
    raw[-9] ^= 3  # a cursor of 11 bytes would be refused: 8 becomes 11
    refused(path, bytes(raw))
    raw[-9] = 9
    raw[-1] ^= 1
    assert seen(opened(path, bytes(raw))) == states()[-2]


def test_a_damaged_length_in_the_middle_is_no_torn_tail(path: Path) -> None:
    """The Rust crate's reader took a length past the end for a torn write and dropped the rest."""
    ends = list(itertools.accumulate(map(len, three_batches()), initial=6))
    for start in (ends[0], ends[2]):
        for length in (0x0000_FFFF, 0x00FF_FFFF, 0x7FFF_FFFF):
            damaged = bytearray(WHOLE)
            damaged[start + 12 : start + 16] = length.to_bytes(4, "little")
            assert refused(path, bytes(damaged)).offset == start


def test_a_last_record_that_is_whole_and_wrong_is_refused_though_the_origin_drops_it(
    path: Path,
) -> None:
    raw = WHOLE
    refused(path, raw[:-1] + b"\xff")
    assert seen(opened(path, raw[:-1] + b"\xff", on_damage="cut")) == states()[-2]


def test_a_lost_sector_at_the_end_is_torn_and_the_same_zeros_elsewhere_are_not(path: Path) -> None:
    """A power loss keeps a file's size, with zeros in sectors that were not written back."""
    first = [slipref.put("first", b"1"), slipref.cursor(slipref.u64(1))]
    last = [slipref.put("last", b"x" * 2000, slipref.u64(2)), slipref.cursor(slipref.u64(2))]
    raw = slipref.HEADER + b"".join(first + last)
    for sector in range(512, len(raw), 512):
        assert seen(opened(path, raw[:sector] + bytes(len(raw) - sector))) == (
            {"first": (b"1", b"")},
            slipref.u64(1),
        )
        hole = raw[:sector] + bytes(min(512, len(raw) - sector)) + raw[sector + 512 :]
        if len(hole.rstrip(b"\0")) > sector:
            refused(path, hole)
    for inside in (600, 1000, 1023):  # not from a sector's start: no lost write
        outcome(path, raw[:inside] + b"\1" + bytes(len(raw) - inside - 1))
    refused(path, raw[:600] + bytes(100) + raw[700:])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (slipref._record(4, b"\0"), "type 4"),
        (slipref._record(0, b"\0" * 12 + b"x"), "type 0"),
        (slipref._record(3, b"\x0b" + b"c" * 11), "a cursor of 11 bytes"),
        (slipref._record(2, b"\1\0k\x0b" + b"v" * 11), "a version of 11 bytes"),
        (
            slipref._record(1, b"\1\0k" + (16 * 1024 * 1024 + 1).to_bytes(4, "little") + b"v"),
            "a value of 16777217 bytes",
        ),
        (slipref._record(1, b"\2\0\xff\xfe" + b"\0\0\0\0\0"), "not UTF-8"),
        (slipref._record(2, b"\3\0\xed\xa0\x80\0"), "not UTF-8"),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_a_record_that_no_writer_writes_is_refused(
    path: Path, record: bytes, reason: str, last: bool
) -> None:
    error = refused(
        path,
        slipref.HEADER + slipref.put("a", b"1") + record + (b"" if last else slipref.cursor(b"c")),
    )
    assert reason in str(error)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"PGSS", "shorter than its header"),
        (b"PGSS\x02", "shorter than its header"),
        (b"PGSS\x01\x00", "version 1"),
        (b"PGSS\x03\x00" + slipref.cursor(b"c"), "version 3"),
    ],
)
def test_another_version_is_refused_by_name(path: Path, raw: bytes, reason: str) -> None:
    error = refused(path, raw, InvalidFormatError)
    assert reason in str(error)


def test_a_log_within_a_value_is_not_mistaken_for_what_follows_a_damaged_length(path: Path) -> None:
    """Found in review: the search for whole records must accept valid logs, whatever they hold."""
    inner = WHOLE
    raw = slipref.HEADER + slipref.put("a", inner) + slipref.cursor(b"c")
    state = opened(path, raw)
    assert state.entries["a"][0] == inner


def test_windows_of_any_size_read_the_same(path: Path) -> None:
    records = [*three_batches(), slipref.put("big", b"b" * 3000), slipref.cursor(b"c")]
    path.write_bytes(slipref.HEADER + b"".join(records))
    handle = ReadHandle(OS_FILES, path)
    size = path.stat().st_size
    whole = list(slipstream.read_records(handle, 6, size))
    assert len(whole) == len(records)
    for window in (1, 5, 6, 7, 13, 64, 1000):
        assert list(slipstream.read_records(handle, 6, size, window_bytes=window)) == whole


def test_damage_is_told_with_all_that_stands_around_it(path: Path) -> None:
    records = three_batches()
    raw = bytearray(slipref.HEADER + b"".join(records) + b"\x01")
    raw[6 + len(records[0]) + 8] ^= 1  # in the first cursor
    path.write_bytes(raw)
    pieces = list(walk_records(ReadHandle(OS_FILES, path), len(raw)))
    assert [piece.record is None for piece in pieces] == [False, True, *[False] * 5, True]
    report = verify_log(path)
    assert not report.ok
    assert [(problem.offset, problem.size) for problem in report.problems] == [
        (6 + len(records[0]), len(records[1]))
    ]
    assert (report.torn_bytes, report.frames, report.cursor) == (1, 6, u64(3))


def test_the_file_that_the_page_dumps_is_the_one_it_describes(path: Path) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "interchange.md").read_text(
        encoding="utf-8"
    )
    (block,) = re.findall(r"^```hex\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)
    snap = open_at(path, compact_threshold=1 << 40)
    snap.apply([Put("a", b"x", VersionToken.from_u64(1))], u64(1))
    snap.apply([Delete("a", VersionToken.from_u64(2))], u64(2))
    snap.close()
    assert path.read_bytes() == b"".join(bytes.fromhex(line[10:57]) for line in block.splitlines())


# The two formats, and which one a file is.


def test_a_format_that_contradicts_the_file_is_refused_naming_both(
    path: Path, tmp_path: Path
) -> None:
    open_at(path).close()
    own = tmp_path / "own.log"
    AppendLogSnapshot.open(own)[1].close()
    for file, wrong, right in (
        (path, "foldlog", "slipstream-v2"),
        (own, "slipstream-v2", "foldlog"),
    ):
        raw = file.read_bytes()
        for opener in (AppendLogSnapshot.open, foldlog.open):
            with pytest.raises(InvalidFormatError) as caught:
                opener(file, format=wrong)
            assert right in str(caught.value)
            assert wrong in str(caught.value)
        assert file.read_bytes() == raw
        AppendLogSnapshot.open(file, format=right)[1].close()


def test_a_format_that_there_is_none_of_is_refused(path: Path, tmp_path: Path) -> None:
    for opener in (AppendLogSnapshot.open, foldlog.open):
        with pytest.raises(ValueError, match="'foldlog' or 'slipstream-v2'"):
            opener(path, format="slipstream")
        with pytest.raises(TypeError, match="format is text"):
            opener(path, format=2)
    with open_at(path) as snap, pytest.raises(TypeError):
        snap.export_to(tmp_path / "out", format=b"foldlog")
    with pytest.raises(ValueError, match="format"):
        AppendLogSnapshot.import_artifact(tmp_path, tmp_path / "x.log", format="")
    assert not (tmp_path / "out").exists()


def test_what_the_origin_cannot_read_is_refused_before_anything_is_written(path: Path) -> None:
    snap = open_at(path)
    snap.apply([Put("k", b"v")], u64(1))
    raw = path.read_bytes()
    for updates in (
        [Put("fine", b""), Put("k", bytes(16 * 1024 * 1024 + 1))],
        [Put("é" * 32_768, b"")],
        [Delete("x" * 65_536)],
    ):
        with pytest.raises(ValueError, match="over the limit"):
            snap.apply(updates, u64(2))
    with pytest.raises(ValueError, match="at most 10 bytes"):
        WatchCursor(b"x" * 11)
    assert path.read_bytes() == raw
    snap.apply([Put("x" * 65_535, bytes(16 * 1024 * 1024))], u64(2))
    assert len(slipref.replay(path.read_bytes())[0]) == 2
    snap.close()


# Sequences, which the format has not.


def commit(engine: Engine, key: str) -> int:
    return engine.commit([encode_batch([Put(key, b"v")], u64(engine.fold.seq + 1))]).seq


def test_sequences_go_on_across_compactions_and_crashes_in_one_process(path: Path) -> None:
    engine = Engine(path, format="slipstream-v2")
    assert [commit(engine, key) for key in "abc"] == [1, 2, 3]
    for round_number in range(3):
        engine.compact()
        assert engine.is_compact
        seq = commit(engine, "d")
        assert seq == 4 + round_number
        crashed = engine
        crashed.log.abandon()
        engine = Engine(path, crashed=crashed.log)
        assert engine.fold.seq == seq
        assert engine.log.file.header.log_id == crashed.log.file.header.log_id
        assert state_of(engine) == state_of(crashed)
    engine.close()
    assert read_state(path).seq == 2, "another process counts anew: the base, and a batch behind it"


def test_a_file_that_another_put_in_its_place_is_not_taken_for_the_crashed_ones(path: Path) -> None:
    engine = Engine(path, format="slipstream-v2")
    commit(engine, "a")
    engine.compact()
    commit(engine, "b")
    raw = path.read_bytes()
    engine.log.abandon()
    other = path.with_name("other")
    other.write_bytes(raw)
    for meddle in (
        lambda: other.replace(path),
        lambda: path.write_bytes(raw[:-20]),
        lambda: path.write_bytes(raw[:9]),
    ):
        meddle()
        successor = Engine(path, crashed=engine.log)
        known = successor.log.file.header.log_id == engine.log.file.header.log_id
        assert not known or successor.fold.seq < engine.fold.seq
        successor.log.abandon()


def test_a_rewrite_that_died_between_the_rename_and_the_writers_note_of_it_is_known(
    path: Path,
) -> None:
    engine = Engine(path, format="slipstream-v2")
    for key in "abc":
        commit(engine, key)
    rewrite = engine.begin_compaction()
    rewrite.write()

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    engine.log.adopt = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        engine.finish_compaction(rewrite)
    engine.log.abandon()
    successor = Engine(path, crashed=engine.log)
    assert (successor.fold.seq, successor.is_compact) == (3, True)
    assert successor.log.file.header.log_id == engine.log.file.header.log_id
    successor.close()


def test_applies_go_on_while_the_log_is_compacted(path: Path) -> None:
    engine = Engine(path, format="slipstream-v2")

    def apply(*updates: Put | Delete) -> None:
        engine.commit([encode_batch(updates, u64(engine.fold.seq + 1))])

    for number in range(50):
        apply(Put(f"k{number % 20}", b"%d" % number), Delete(f"k{number % 7}"))
    rewrite = engine.begin_compaction()
    apply(Put("during", b"write"))
    rewrite.write()
    assert rewrite.lag_bytes > 0
    rewrite.begin_carry()
    rewrite.catch_up()
    assert rewrite.lag_bytes == 0
    apply(*(Put(f"more{number}", b"x") for number in range(9000)))
    apply(Delete("more1"), Put("k3", b"last"))
    before = state_of(engine)
    engine.finish_compaction(rewrite)
    assert state_of(engine) == before
    assert engine.fold.seq == 53
    apply(Put("after", b"1"))
    entries, at = slipref.replay(path.read_bytes())
    assert (entries, at) == (state_of(engine).entries, slipref.u64(54))
    engine.log.abandon()
    assert seen(read_state(path)) == (entries, at)


def test_what_was_removed_takes_no_memory_behind_a_compaction(path: Path) -> None:
    snap = open_at(path)
    for number in range(20):
        snap.apply([Put(f"{number}-{i}", b"v") for i in range(500)], u64(2 * number))
        snap.apply([Delete(f"{number}-{i}") for i in range(500)], u64(2 * number + 1))
    snap.compact()
    fold = snap.snapshot()
    assert sum(map(len, fold.delta)) + sum(map(len, fold.runs)) == 0
    snap.close()
    loaded = load(ReadHandle(OS_FILES, path))
    assert len(loaded.fold) == 0
