"""The note's bytes: what was written is read, and damage to it leaves the note before, or none;
never another one.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldlog.storage.log.sidecars.note import (
    LOCK_BYTES,
    LOCK_MAGIC,
    NOTE_BYTES,
    NOTE_MAGIC,
    SLOT_BYTES,
    Holder,
    Note,
    Watermark,
    describe_holder,
    is_own,
    pack_slot,
    parse_note,
    this_process,
)

HOLDER = Holder(4711, 4026531836, bytes(range(16)), "host-1")
OLD = Note(HOLDER, 77, Watermark(bytes(range(16)), 5, 700), None, 8)
NEW = Note(HOLDER, 77, Watermark(bytes(range(16)), 6, 800), 99, 9)
BOTH = pack_slot(OLD) + pack_slot(NEW)
U64 = st.integers(0, 2**64 - 1)


@given(
    st.builds(
        Note,
        st.builds(
            Holder,
            st.integers(0, 2**32 - 1),
            U64,
            st.binary(min_size=16, max_size=16),
            st.text("ab-.1", max_size=64),
        ),
        U64,
        st.none() | st.builds(Watermark, st.binary(min_size=16, max_size=16), U64, U64),
        st.none() | U64,
        U64,
    )
)
def test_a_note_reads_as_it_was_written(note):
    slot = pack_slot(note)
    assert len(slot) == SLOT_BYTES
    assert parse_note(slot + bytes(SLOT_BYTES)) == note
    assert parse_note(bytes(SLOT_BYTES) + slot) == note


def test_the_newer_slot_counts_wherever_it_stands():
    assert parse_note(BOTH) == NEW
    assert parse_note(pack_slot(NEW) + pack_slot(OLD)) == NEW


def test_any_flipped_bit_leaves_this_note_or_the_one_before_and_the_file_is_still_ours():
    for at in range(8 * NOTE_BYTES):
        raw = bytearray(BOTH)
        raw[at // 8] ^= 1 << at % 8
        assert parse_note(bytes(raw)) in (NEW, OLD)
        assert is_own(bytes(raw), NOTE_MAGIC, NOTE_BYTES)


def test_a_write_torn_at_any_byte_leaves_the_note_before():
    newer = pack_slot(NEW._replace(counter=10, watermark=None))
    for done in range(SLOT_BYTES):
        raw = newer[:done] + BOTH[done:]
        assert parse_note(raw) in (NEW, NEW._replace(counter=10, watermark=None))
        assert parse_note(bytes(done) + BOTH[done:]) == NEW
        assert is_own(raw, NOTE_MAGIC, NOTE_BYTES)


@pytest.mark.parametrize("raw", [b"", b"\0" * NOTE_BYTES, BOTH[:100], b"\xff" * NOTE_BYTES])
def test_what_holds_no_slot_is_no_note(raw):
    assert parse_note(raw) is None


@pytest.mark.parametrize(
    ("raw", "own"),
    [
        (b"", True),
        (bytes(LOCK_BYTES), True),
        (LOCK_MAGIC * 4, True),
        (LOCK_MAGIC, True),
        (bytes(16) + LOCK_MAGIC + b"\xff" * 32, True),
        (LOCK_MAGIC * 4 + b"\n", False),
        (b'{"pid": 1}', False),
        (b"garbage", False),
        (bytes(LOCK_BYTES + 1), False),
    ],
)
def test_a_lock_file_is_ours_when_any_part_of_it_is(raw, own):
    assert is_own(raw, LOCK_MAGIC, LOCK_BYTES) == own


def test_a_holder_is_named_by_its_pid_only_where_that_pid_is_its_own():
    """In a container, process 1 was told that the log "is open in process 1": another one's."""
    elsewhere = HOLDER._replace(pid=1, pid_namespace=4026532000)
    assert describe_holder(HOLDER, HOLDER._replace(pid=5)) == (4711, "")
    pid, words = describe_holder(elsewhere, HOLDER)
    assert pid is None
    assert "pid 1 in its own pid namespace" in words
    pid, words = describe_holder(HOLDER._replace(boot=bytes(range(1, 17))), HOLDER)
    assert pid is None
    assert "host-1" in words
    assert describe_holder(HOLDER._replace(boot=bytes(16)), HOLDER) == (4711, "")
    assert describe_holder(None, HOLDER) == (None, "")
    assert this_process().pid == os.getpid()
