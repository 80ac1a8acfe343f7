"""Logs with bytes inserted, removed, moved or mixed: refused unless a stopped writer fits."""

from __future__ import annotations

import itertools
import random

import pytest
from logfiles import (
    Frame,
    State,
    commit_all,
    frames_of,
    opened,
    outcome,
    prefix_states,
    reboot,
    refused,
    some_batches,
    write_log,
)
from sampling import every, sample

from foldlog import CorruptLogError, InvalidFormatError, Put
from foldlog.protocol.frames import FRAME_MAGIC
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.testing import flips

pytestmark = pytest.mark.exhaustive

SYNCS = pytest.mark.parametrize("sync_each", [False, True], ids=["never synced", "each synced"])


def behind_the_base(raw: bytes) -> list[Frame]:
    frames = frames_of(raw)
    return frames[1 + next(index for index, frame in enumerate(frames) if frame.header.kind == 4) :]


def assert_refused(path, raw: bytes, what: object) -> None:
    found = outcome(path, raw)
    assert isinstance(found, (CorruptLogError, InvalidFormatError)), f"{what}: read as {found}"


@SYNCS
@pytest.mark.parametrize("size", [1, 4, 5, 40, 512, 4096])
def test_a_hole_of_zeros_between_frames_is_refused(path, size, sync_each, rebooted):
    # Without the offset in each frame, an un-synced log dropped everything after the hole: the gap
    # looked like lost writes.
    raw = write_log(path, some_batches(4), base=some_batches(1), sync_each=sync_each)
    for frame in frames_of(raw):
        assert_refused(
            path, raw[: frame.start] + bytes(size) + raw[frame.start :], f"hole at {frame.start}"
        )


@SYNCS
def test_a_sector_punched_out_anywhere_loses_nothing_that_was_synced(path, sync_each, rebooted):
    raw = write_log(path, some_batches(5, 700), base=some_batches(1, 700), sync_each=sync_each)
    states = prefix_states(raw, path)
    frames = frames_of(raw)
    for start in range(0, len(raw) - 1, 61):
        stop = min(start + 512, len(raw))
        found = outcome(path, raw[:start] + bytes(stop - start) + raw[stop:])
        hit = next((frame for frame in frames if frame.end > start), None)
        if isinstance(found, State):
            assert hit is not None
            assert found == states[hit.start], start
            whole_behind = [
                frame for frame in frames if frame.start >= stop and frame.header.batches
            ]
            assert not whole_behind or (rebooted and not sync_each), (
                f"hole at {start}: a later frame shows that it was lost"
            )


@SYNCS
@every(17)
def test_a_byte_removed_is_refused_unless_the_last_frame_is_short_by_it(
    path, sync_each, rebooted, every
):
    raw = write_log(path, some_batches(4), base=some_batches(1), sync_each=sync_each)
    states = prefix_states(raw, path)
    last = frames_of(raw)[-1]
    for at in sample(range(len(raw)), every):
        found = outcome(path, raw[:at] + raw[at + 1 :])
        if at >= last.start + 48 and isinstance(found, State):
            assert (
                found == states[last.start]
            )  # a killed writer leaves the same bytes up to the cut, for all that is known
        else:
            assert isinstance(found, (CorruptLogError, InvalidFormatError)), at


@SYNCS
@pytest.mark.parametrize("byte", [0, 10, 0xF5])
@every(17)
def test_a_byte_inserted_is_refused(path, byte, sync_each, rebooted, every):
    raw = write_log(path, some_batches(4), base=some_batches(1), sync_each=sync_each)
    whole = outcome(path, raw)
    for at in sample(range(len(raw) + 1), every):
        damaged = raw[:at] + bytes([byte]) + raw[at:]
        if at == len(raw) and byte in (0, 0xF5):
            assert outcome(path, damaged) == whole  # the beginning of a frame that never came
        else:
            assert_refused(path, damaged, at)


@SYNCS
def test_a_frame_repeated_removed_or_exchanged_is_refused(path, sync_each, rebooted):
    raw = write_log(
        path,
        [*some_batches(3), some_batches(1)[0], some_batches(1)[0]],
        base=some_batches(2),
        sync_each=sync_each,
    )
    frames = frames_of(raw)
    parts = [raw[: frames[0].start], *(frame.raw for frame in frames)]
    assert b"".join(parts) == raw
    for index in range(1, len(parts)):
        assert_refused(
            path, b"".join([*parts[: index + 1], *parts[index:]]), f"frame {index} twice"
        )
        assert_refused(path, b"".join([*parts, parts[index]]), f"frame {index} at the end again")
        if index < len(parts) - 1:
            assert_refused(
                path, b"".join([*parts[:index], *parts[index + 1 :]]), f"without frame {index}"
            )
    for one, other in itertools.combinations(range(1, len(parts)), 2):
        exchanged = parts[:]
        exchanged[one], exchanged[other] = parts[other], parts[one]
        assert_refused(path, b"".join(exchanged), f"frames {one} and {other} exchanged")


def test_frames_of_another_log_are_refused_wherever_they_stand(path, rebooted):
    raw = write_log(path, some_batches(3))
    other = write_log(path.with_name("other.log"), some_batches(3))
    assert [frame.start for frame in frames_of(raw)] == [frame.start for frame in frames_of(other)]
    for mine, foreign in zip(frames_of(raw), frames_of(other), strict=True):
        assert_refused(
            path,
            raw[: mine.start] + foreign.raw + raw[mine.end :],
            f"foreign frame at {mine.start}",
        )
        assert_refused(path, raw + foreign.raw, "foreign frame at the end")
    assert_refused(path, raw + other, "another log at the end")
    assert_refused(path, raw[:52] + other[52:], "the frames of another log")
    assert_refused(path, other[:52] + raw[52:], "the header of another log")


def test_frames_of_this_logs_own_past_are_refused_after_a_compaction(path, rebooted):
    engine = Engine(path)
    commit_all(engine, some_batches(3))
    engine.log.sync()
    old = path.read_bytes()
    engine.compact()
    commit_all(engine, some_batches(2))
    engine.log.abandon()
    new = path.read_bytes()
    for frame in frames_of(old):
        assert_refused(path, new + frame.raw, f"the frame that stood at {frame.start}")
    assert_refused(path, new[:52] + old[52:], "the old frames under the new header")


def test_a_stale_frame_behind_a_repaired_tail_is_never_replayed(path, rebooted):
    # The frame verifies, is where it was written and has the right sequence: only its link to the
    # previous frame betrays it.
    raw = write_log(path, some_batches(3))
    last = frames_of(raw)[-1]
    second = frames_of(raw)[-2]
    path.write_bytes(raw[: second.start + 30])
    engine = Engine(path)
    engine.log._session = True  # no OPEN frame: the new frame takes the old one's very place
    other = [
        Put(update.key, update.value.upper(), update.version) if type(update) is Put else update
        for update in some_batches(2)[1]
    ]
    commit_all(engine, [other])
    engine.log.abandon()
    repaired = path.read_bytes()
    assert len(repaired) == last.start
    assert repaired != raw[: last.start]
    assert_refused(path, repaired + last.raw, "stale frame")


@SYNCS
def test_junk_behind_a_clean_end_is_refused(path, sync_each, rebooted):
    raw = write_log(path, some_batches(2), sync_each=sync_each)
    rng = random.Random(4)
    for size in (1, 2, 3, 4, 20, 47, 48, 49, 100, 511, 600, 5000):
        junk = bytes([rng.randrange(1, 255)]) + bytes(
            rng.randrange(1, 256) for _ in range(size - 1)
        )
        if junk[:4] != FRAME_MAGIC[:size]:
            assert_refused(path, raw + junk, f"{size} bytes of junk")
    assert_refused(path, raw + b"and so on\n", "text")
    assert_refused(path, raw + FRAME_MAGIC * 100, "magic numbers")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_beginning_of_a_frame_behind_a_clean_end_is_cut(path, count):
    raw = write_log(path, some_batches(2))
    whole = outcome(path, raw)
    assert outcome(path, raw + FRAME_MAGIC[:count]) == whole
    assert path.read_bytes() == raw


def test_a_transfer_that_mangles_text_is_refused(path):
    raw = write_log(path, some_batches(2))
    mangled = [
        raw.replace(b"\r\n", b"\n"),
        raw.replace(b"\n", b"\r\n"),
        bytes(byte & 0x7F for byte in raw),
        raw.decode("latin-1").encode(),
        b"\xef\xbb\xbf" + raw,
        raw[: raw.index(b"\x1a")],
    ]
    for bad in mangled:
        assert bad != raw
        found = refused(path, bad, InvalidFormatError)
        assert found.offset == 0


@pytest.mark.parametrize("embedded", ["another log", "itself"])
def test_a_torn_value_that_holds_a_whole_log_is_cut_like_any_other(path, embedded, rebooted):
    if embedded == "itself":
        inner = write_log(path, some_batches(3))
    else:
        inner = write_log(path.with_name("inner.log"), some_batches(3))
        write_log(path, some_batches(3))
    before = outcome(path, path.read_bytes())
    engine = Engine(path)
    commit_all(engine, [[Put("a copy", inner)]])
    engine.log.abandon()
    raw = path.read_bytes()
    whole = outcome(path, raw)
    assert whole.entries["a copy"][0] == inner
    last = frames_of(raw)[-1]
    for size in range(last.start, last.end, 13):
        assert outcome(path, raw[:size]) == before, size
    for bit, damaged in flips(raw, range(last.start * 8, last.end * 8, 101)):
        assert_refused(path, damaged, bit)


def test_unsynced_frames_written_back_in_any_order_open_after_a_power_loss(path, monkeypatch):
    # "Torn only if no valid frame follows" refused 22 of 32 such states, which are legal.
    raw = write_log(path, some_batches(4, 500), base=some_batches(1))
    states = prefix_states(raw, path)
    synced_end = behind_the_base(raw)[0].start
    reboot(monkeypatch)
    sectors = range(synced_end // 512, -(-len(raw) // 512))
    seen = set()
    for kept in itertools.product((False, True), repeat=len(sectors)):
        image = bytearray(raw)
        for sector, is_kept in zip(sectors, kept, strict=True):
            start, stop = max(sector * 512, synced_end), min(sector * 512 + 512, len(raw))
            if not is_kept:
                image[start:stop] = bytes(stop - start)
        found = opened(path, bytes(image))
        lost = next(
            (sector * 512 for sector, is_kept in zip(sectors, kept, strict=True) if not is_kept),
            len(raw),
        )
        whole_end = max(end for end in states if end <= max(lost, synced_end))
        assert found == states[whole_end]
        seen.add(found.seq)
    assert len(seen) == 5
    assert len(sectors) >= 5


def test_the_same_states_are_refused_while_the_machine_runs_on(path):
    raw = write_log(path, some_batches(4, 500), base=some_batches(1))
    first = behind_the_base(raw)[1]
    for start in range(first.start, frames_of(raw)[-1].start - 512, 64):
        assert_refused(path, raw[:start] + bytes(512) + raw[start + 512 :], start)
