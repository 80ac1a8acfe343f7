"""`verify` reports every fault in a log, agrees with opening on what is damage, changes nothing."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import msgpack
import pytest
from blake3 import blake3
from faultkit import batch, rebooted
from logfiles import (
    State,
    commit_all,
    damage,
    forge,
    forge_log,
    frames_of,
    outcome,
    some_batches,
    write_log,
)
from sampling import every, sample

import foldlog
from foldlog import AppendLogSnapshot, InvalidFormatError, Put, StoreClosed, WatchCursor
from foldlog.protocol.frames import (
    FILE_HEADER,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    KIND_SEAL,
)
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.fold.leaf import encode_leaf
from foldlog.storage.formats.foldlog.codec import open_body
from foldlog.storage.formats.format import VerifyReport
from foldlog.storage.repair.verify import verify_live, verify_log
from foldlog.testing import sampled_flips, truncations


def many_puts(count: int) -> list[Put]:
    return [Put(f"key{number:05}", b"value %d" % number * 3) for number in range(count)]


def reasons(report: VerifyReport) -> list[str]:
    return [problem.reason for problem in report.problems]


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("sync_each", [False, True])
@pytest.mark.parametrize("entries", [0, 1, 1500])
def test_a_sound_log_verifies_and_is_counted(path, entries, sync_each, sealed):
    write_log(
        path,
        some_batches(3),
        base=[many_puts(entries)] if entries else (),
        sync_each=sync_each,
        sealed=sealed,
    )
    report = verify_log(path)
    assert report.ok
    assert (report.entries, report.batches, report.seq) == (entries, 3, 4 if entries else 3)
    assert report.cursor == WatchCursor.from_u64(report.seq)
    assert (report.sealed, report.torn_bytes, report.size) == (sealed, 0, path.stat().st_size)
    assert report.frames == len(frames_of(path.read_bytes()))


def test_all_that_is_wrong_is_told_and_not_only_the_first(path):
    raw = write_log(path, some_batches(9), base=some_batches(2))
    hit = [frame for frame in frames_of(raw) if frame.header.batches][1:8:3]
    damaged = bytearray(raw)
    for frame in hit:
        damaged[frame.start + 60] ^= 4
    path.write_bytes(damaged)
    report = verify_log(path)
    at = {problem.offset: problem for problem in report.problems}
    for frame in hit:
        assert at[frame.start].size == frame.end - frame.start
        assert "does not verify" in at[frame.start].reason
        assert at[frame.end].reason == f"batch {frame.header.seq} is missing before this frame"
    assert len(report.problems) == 6
    assert report.batches == 6
    assert path.read_bytes() == damaged


@pytest.mark.parametrize("after_a_reboot", [False, True])
@every(31)
def test_verify_and_opening_agree_on_flips_and_cuts(path, after_a_reboot, every):
    raw = write_log(path, some_batches(3, 600), base=some_batches(2))
    cases = [*sampled_flips(raw, 150, seed=5), *sample(list(truncations(raw)), every)]
    zeroed = range(FILE_HEADER.size, len(raw), 97)
    cases += [(at, raw[:at] + bytes(min(512, len(raw) - at)) + raw[at + 512 :]) for at in zeroed]
    told = torn = 0
    for where, image in cases:
        path.write_bytes(image)
        with rebooted() if after_a_reboot else pytest.MonkeyPatch.context():
            try:
                report = verify_log(path)
            except InvalidFormatError:
                report = None
            opened = outcome(path, image)
        assert (report is not None and report.ok) == isinstance(opened, State), (
            where,
            report,
            opened,
        )
        if report is None or not report.ok:
            told += 1
            offset = getattr(opened, "offset", None)
            if report is not None and where >= FILE_HEADER.size * 8:
                assert report.problems[0].offset == offset, (where, report, opened)
        else:
            torn += bool(report.torn_bytes)
            assert isinstance(opened, State)
            assert (report.seq, bytes(report.cursor)) == opened[:2]
    assert told > 100
    assert torn > 10


def leaf_of(*entries: tuple[str, bytes]) -> bytes:
    return encode_leaf(
        [key for key, _ in entries], [value for _, value in entries], [b""] * len(entries)
    )


def base_end(bodies: list[bytes], count: int, **lies: object) -> tuple[int, bytes]:
    digest = blake3(b"".join(bodies)).digest()
    fields = {"cursor": b"", "leaves": len(bodies), "entries": count, "digest": digest} | lies
    return KIND_BASE_END, msgpack.packb(fields)


ONE, TWO = leaf_of(("a", b"1"), ("b", b"2")), leaf_of(("c", b"3"))
BOTH = leaf_of(("a", b"1"), ("b", b"2"), ("c", b"3"))
BAD_BASES = [
    ("digest of the leaves is not", [(KIND_LEAF, BOTH), base_end([BOTH], 3, digest=bytes(32))]),
    ("1 leaves and 3 entries", [(KIND_LEAF, BOTH), base_end([BOTH], 4)]),
    ("1 leaves and 3 entries", [(KIND_LEAF, BOTH), base_end([BOTH], 3, leaves=2)]),
    ("an invalid field", [(KIND_LEAF, BOTH), base_end([BOTH], 3, cursor=bytes(11))]),
    ("ends too early", [(KIND_LEAF, ONE), (KIND_LEAF, TWO), base_end([ONE, TWO], 3)]),
    ("not in key order", [(KIND_LEAF, TWO), (KIND_LEAF, ONE), base_end([TWO, ONE], 3)]),
    (
        "a leaf's value does not verify",
        [(KIND_LEAF, BOTH[:-1] + b"4"), base_end([BOTH[:-1] + b"4"], 3)],
    ),
    ("before the end of the base", [(KIND_OPEN, open_body()), base_end([], 0)]),
    ("the file ends before the base does", [(KIND_LEAF, BOTH)]),
    ("before the session's OPEN frame", [base_end([], 0), (KIND_SEAL, b"")]),
    ("a SEAL frame with a body", [base_end([], 0), (KIND_OPEN, open_body()), (KIND_SEAL, b"x")]),
    ("after its end", [base_end([], 0), (KIND_LEAF, BOTH)]),
]


@pytest.mark.parametrize(("reason", "frames"), BAD_BASES, ids=range(len(BAD_BASES)))
def test_every_rule_has_a_log_that_breaks_it_with_all_checksums_right(path, reason, frames):
    path.write_bytes(forge_log(frames))
    report = verify_log(path)
    assert any(reason in told for told in reasons(report)), report.problems


def test_a_forged_base_that_breaks_no_rule_verifies(path):
    path.write_bytes(
        forge_log(
            [(KIND_LEAF, BOTH), base_end([BOTH], 3), (KIND_OPEN, open_body()), (KIND_SEAL, b"")]
        )
    )
    assert verify_log(path).problems == ()


def test_a_batch_that_does_not_decode_and_a_seal_that_lies_are_told(path):
    raw = write_log(path, some_batches(2))
    raw += forge(raw, KIND_BATCHES, b"\xc0", batches=1)
    raw += forge(raw, KIND_SEAL, b"")
    path.write_bytes(raw)
    report = verify_log(path)
    assert len(report.problems) == 2
    assert "undecodable" in report.problems[0].reason or "not an array" in report.problems[0].reason
    assert "a SEAL frame at batch" in report.problems[1].reason


@pytest.mark.parametrize("content", [b"", b"hello", b"x" * 5000])
def test_what_is_no_log_is_no_damaged_log_either(path, content):
    path.write_bytes(content)
    with pytest.raises(InvalidFormatError):
        verify_log(path)


def test_a_header_that_does_not_verify_hides_nothing_behind_it(path):
    raw = write_log(path, some_batches(4), base=some_batches(2))
    for header in (
        bytes(FILE_HEADER.size),
        raw[:20] + b"\xff" * 12 + raw[32 : FILE_HEADER.size],
        b"\x88" + raw[1 : FILE_HEADER.size],
    ):
        path.write_bytes(header + raw[FILE_HEADER.size :])
        report = verify_log(path)
        assert (report.problems[0].offset, len(report.problems)) == (0, 1)
        assert (report.batches, report.seq) == (4, 6)


def test_an_open_engine_verifies_between_any_two_changes(path):
    _, snap = AppendLogSnapshot.open(path)
    for number in range(1, 30):
        snap.apply(batch(number), WatchCursor.from_u64(number))
        if number % 7 == 0:
            snap.compact()
        report = snap.verify()
        assert (report.problems, report.seq, report.torn_bytes) == ((), number, 0)
    snap.close()
    with pytest.raises(StoreClosed):
        snap.verify()


def test_an_open_store_verifies_while_it_is_written_and_compacted(path):
    with foldlog.open(path, sync="never") as store:
        stop = threading.Event()

        def write() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                store.apply(batch(number), WatchCursor.from_u64(number))
                if number % 20 == 0:
                    store.compact()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(60):
                published = store.snapshot().seq
                report = store.verify()
                assert report.ok, report.problems
                assert report.seq >= published
        finally:
            stop.set()
            writer.join()
    with pytest.raises(StoreClosed):
        store.verify()


def test_damage_under_an_open_store_is_told(path: Path):
    with foldlog.open(path, sync="never") as store:
        for number in range(1, 9):
            store.apply(batch(number), WatchCursor.from_u64(number))
        good = store.verify()
        target = random.Random(3).randrange(200, good.size)
        damage(path, target)
        report = store.verify()
        assert report.problems
        assert report.problems[0].offset <= target
        damage(path, target)
        assert store.verify() == good


def test_an_engine_whose_log_lost_a_published_batch_is_told(path):
    engine = Engine(path)
    commit_all(engine, some_batches(2))
    assert verify_live(engine.log, engine.fold.seq).ok
    assert "batch 9 was published" in verify_live(engine.log, 9).problems[0].reason
    engine.log.abandon()
