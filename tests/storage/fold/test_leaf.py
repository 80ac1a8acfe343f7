"""Leaves: encoded entries are found, located and decoded; equal states have equal leaves."""

from __future__ import annotations

import random

import msgpack
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from logfiles import commit_all, frames_of

from foldlog import Delete, Put, VersionToken
from foldlog.protocol.frames import KIND_BASE_END, KIND_LEAF
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.fold import delta, leaf

texts = st.text(max_size=6) | st.sampled_from(
    ["", "\n", "a\nb", "\0", "\ud7ff", "\ue000", "\U0010ffff", "x" * 300]
)
stores = st.dictionaries(
    texts, st.tuples(st.binary(max_size=20), st.binary(max_size=10)), min_size=1, max_size=40
)
same_sized = st.dictionaries(
    texts,
    st.tuples(st.binary(min_size=3, max_size=3), st.binary(min_size=8, max_size=8)),
    min_size=1,
)


def encode(entries):
    keys = sorted(entries)
    return leaf.encode_leaf(
        keys, [entries[key][0] for key in keys], [entries[key][1] for key in keys]
    )


def index_of(body):
    return body[: leaf.HEADER.unpack_from(body)[1]]


@given(stores | same_sized)
def test_a_leaf_decodes_to_what_was_encoded(entries):
    body = encode(entries)
    columns = leaf.decode_leaf(body)
    assert columns.keys == sorted(entries)
    assert dict(zip(columns.keys, zip(*columns[1:], strict=True), strict=True)) == entries
    assert leaf.range_bounds(body) == (min(entries), max(entries))
    assert leaf.decode_keys(body) == leaf.decode_keys(index_of(body)) == columns.keys
    assert leaf.decode_leaf(memoryview(body)) == columns
    leaf.check_index(index_of(body))
    assert leaf.check_order(body) == columns.keys
    leaf.check_leaf(body)


@given(stores | same_sized)
def test_an_entry_is_found_and_located_in_the_index_alone(entries):
    body = encode(entries)
    index = leaf.Index(index_of(body), len(body))
    assert index.keys == sorted(entries)
    for number, key in enumerate(index.keys):
        start, size, crc, version = index.locate(number)
        assert body[start : start + size] == entries[key][0]
        assert crc == crc32c(entries[key][0])
        assert version == entries[key][1]


@given(stores | same_sized, texts | st.none(), texts | st.none())
def test_a_part_of_a_leaf_is_what_lies_between_its_bounds(entries, low, high):
    columns = leaf.decode_leaf(encode(entries), low, high)
    expected = [
        key
        for key in sorted(entries)
        if (low is None or key >= low) and (high is None or key < high)
    ]
    assert columns.keys == expected
    assert columns.values == [entries[key][0] for key in expected]
    assert list(map(bytes, columns.versions)) == [entries[key][1] for key in expected]


@given(stores, st.data())
def test_a_leaf_with_a_bit_flipped_fails_its_checks(entries, data):
    body = encode(entries)
    bit = data.draw(st.integers(0, len(body) * 8 - 1))
    damaged = bytearray(body)
    damaged[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match="leaf"):
        leaf.check_leaf(bytes(damaged))


@given(stores, st.data())
def test_an_index_that_was_cut_or_flipped_fails_its_check(entries, data):
    index = index_of(encode(entries))
    size = data.draw(st.integers(0, len(index) - 1))
    with pytest.raises(ValueError, match="index"):
        leaf.check_index(index[:size])
    damaged = bytearray(index)
    damaged[size] ^= 1
    with pytest.raises(ValueError, match="index"):
        leaf.check_index(bytes(damaged))


@pytest.mark.parametrize("keys", [["b", "a"], ["a", "a"], ["a", "c", "b"]])
def test_keys_out_of_order_fail_the_check(keys):
    body = leaf.encode_leaf(keys, [b""] * len(keys), [b""] * len(keys))
    with pytest.raises(ValueError, match="ascending"):
        leaf.check_order(body)


def test_values_and_versions_over_their_limits_fail_the_check():
    with pytest.raises(ValueError, match="version"):
        leaf.check_order(leaf.encode_leaf(["a"], [b""], [bytes(11)]))
    with pytest.raises(ValueError, match="value"):
        leaf.check_order(leaf.encode_leaf(["a"], [bytes(16 * 1024 * 1024 + 1)], [b""]))
    with pytest.raises(ValueError, match="key"):
        leaf.check_order(leaf.encode_leaf(["x" * 65_536], [b""], [b""]))


# Where leaves end.


def limit_leaves(patch, least, most, size):
    patch.setattr(leaf, "MIN_ENTRIES", least)
    patch.setattr(leaf, "MAX_ENTRIES", most)
    patch.setattr(leaf, "_BOUNDARY_MASK", 3)
    patch.setattr(leaf, "MAX_LEAF_BYTES", size)


def ends_of(keys, values):
    ends = []
    start = 0
    while start < len(keys):
        start = leaf.leaf_end(keys, values, start) or len(keys)
        ends.append(start)
    return ends


def test_leaves_keep_their_limits():
    keys = [f"key{n:06}" for n in range(20_000)]
    ends = ends_of(keys, [b"v"] * len(keys))
    sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    assert min(sizes[:-1]) >= leaf.MIN_ENTRIES
    assert max(sizes) <= leaf.MAX_ENTRIES
    assert 180 < sum(sizes) / len(sizes) < 320


def test_large_values_end_a_leaf_early():
    keys = [f"key{n:03}" for n in range(300)]
    assert ends_of(keys, [bytes(leaf.MAX_LEAF_BYTES)] * 300) == list(range(1, 301))
    assert ends_of(keys, [bytes(leaf.MAX_LEAF_BYTES // 4)] * 300)[0] == 4


@given(st.sets(st.text(max_size=3), min_size=1), st.integers(0, 30), st.integers(1, 9))
def test_an_end_once_decided_holds_whatever_follows(keys, cut, size):
    with pytest.MonkeyPatch.context() as patch:
        limit_leaves(patch, 2, 7, 40)
        order = sorted(keys)
        values = [bytes(size)] * len(order)
        end = leaf.leaf_end(order[:cut], values[:cut], 0)
        if end is not None:
            assert leaf.leaf_end(order, values, 0) == end


# Equal states, equal bytes.


def compacted_bodies(engine):
    engine.compact()
    raw = engine.path.read_bytes()
    frames = [(frame.header.kind, frame.body) for frame in frames_of(raw)]
    frames = [frame for frame in frames if frame[0] in (KIND_LEAF, KIND_BASE_END)]
    return frames, msgpack.unpackb(frames[-1][1])["digest"]


@pytest.fixture
def leaves_small(monkeypatch):
    limit_leaves(monkeypatch, 3, 9, 200)
    monkeypatch.setattr(delta, "PIECE_ENTRIES", 6)
    monkeypatch.setattr(delta, "SETTLE_ENTRIES", 10)
    monkeypatch.setattr(delta.EMPTY_DELTA, "settle_entries", 10)


def random_batches(rng, count, keys, most):
    batches = []
    for _ in range(count):
        updates = []
        for _ in range(rng.randrange(1, most)):
            key = f"{rng.randrange(keys):05}"
            if rng.random() < 0.6:
                value, version = rng.randbytes(rng.choice([0, 5, 30])), rng.randrange(5)
                updates.append(Put(key, value, VersionToken.from_u64(version)))
            else:
                updates.append(Delete(key))
        batches.append(updates)
    return batches


def assert_same_bytes(path, rng, batches):
    steps = Engine(path.with_name("steps.log"))
    once = Engine(path.with_name("once.log"))
    for updates in batches:
        commit_all(steps, [updates])
        commit_all(once, [updates])
        if rng.random() < 0.5:
            steps.compact()
    assert compacted_bodies(steps) == compacted_bodies(once)
    state = {entry.key: entry for entry in steps.fold.range("")}
    fresh = Engine(path.with_name("fresh.log"))
    commit_all(fresh, [[]] * (len(batches) - 1) + [[Put(*entry) for entry in state.values()]])
    assert compacted_bodies(fresh) == compacted_bodies(once)
    for engine in (steps, once, fresh):
        engine.log.abandon()
        engine.path.unlink()


@pytest.mark.usefixtures("leaves_small")
@pytest.mark.parametrize("seed", range(25))
def test_compaction_in_steps_and_at_once_give_the_same_leaves(path, seed):
    rng = random.Random(seed)
    assert_same_bytes(path, rng, random_batches(rng, 12, rng.choice([10, 40, 150]), 30))


@pytest.mark.parametrize("seed", range(2))
def test_compaction_in_steps_and_at_once_give_the_same_leaves_of_full_size(path, seed):
    rng = random.Random(seed)
    filling = [[Put(f"{n:05}", b"%d" % n) for n in range(0, 6000, 2)]]
    assert_same_bytes(path, rng, filling + random_batches(rng, 6, 6000, 600))


def test_leaves_far_from_a_change_are_copied_as_they_are(path):
    engine = Engine(path)
    commit_all(engine, [[Put(f"{n:05}", b"%d" % n) for n in range(6000)]])
    before = {body for kind, body in compacted_bodies(engine)[0] if kind == KIND_LEAF}
    commit_all(engine, [[Put("03000", b"changed")]])
    after = {body for kind, body in compacted_bodies(engine)[0] if kind == KIND_LEAF}
    engine.close()
    assert len(before) > 15
    assert len(after - before) <= 2
