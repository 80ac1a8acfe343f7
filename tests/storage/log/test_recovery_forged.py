"""Forged frames with correct checksums that the product never writes: refused, always."""

from __future__ import annotations

import contextlib
import os
import tracemalloc

import msgpack
import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from logfiles import (
    State,
    damage,
    forge,
    forge_log,
    frames_of,
    opened,
    outcome,
    reboot,
    refused,
    some_batches,
    write_log,
)

from foldlog import (
    AppendLogSnapshot,
    CorruptLogError,
    FoldlogError,
    InvalidFormatError,
    Put,
    WatchCursor,
)
from foldlog.protocol.decoding import decode_batches
from foldlog.protocol.frames import (
    FILE_HEADER,
    FRAME_HEADER,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    KIND_SEAL,
)
from foldlog.protocol.updates import encode_batch
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.fold.leaf import encode_leaf
from foldlog.storage.formats.foldlog.walk import Walker
from foldlog.storage.formats.registry import read_own_header
from foldlog.storage.log import recovery, scan
from foldlog.storage.log.files import OS_FILES, ReadHandle
from foldlog.storage.log.scan import BadFrame, Chain, read_frames
from foldlog.storage.log.tail import Tail
from foldlog.storage.repair.salvage import salvage_log
from foldlog.storage.repair.verify import verify_log

pytestmark = pytest.mark.exhaustive

EMPTY_BASE_END = msgpack.packb({"cursor": b"", "leaves": 0, "entries": 0, "digest": b""})


@pytest.fixture
def raw(path):
    return write_log(path, some_batches(2), base=some_batches(2))


def item(keys=("k",), values=(b"v",), versions=(b"",), cursor=b""):
    return [cursor, list(keys), list(values), list(versions)]


# Lengths.


@pytest.mark.parametrize(
    "length", [0, 1, 60, 80, 2**20, 2**30 - 1, 2**30, 2**30 + 1, 2**31 - 1, 2**31, 2**32 - 1]
)
@pytest.mark.parametrize("last", [False, True], ids=["amid the log", "at its end"])
def test_a_length_that_lies_allocates_nothing_and_reads_as_nothing_wrong(
    path, raw, length, last, rebooted
):
    frames = frames_of(raw)
    target = frames[-1] if last else frames[-2]
    kept = target.header._asdict()
    del kept["crc"], kept["kind"]
    lying = forge(raw, target.header.kind, target.body, **kept | {"body_len": length})
    before = opened(path, raw[: target.start])
    tracemalloc.start()
    try:
        found = outcome(path, raw[: target.start] + lying + raw[target.end :])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * 1024 * 1024
    if length > 2**30:
        assert isinstance(found, CorruptLogError), "no writer begins a frame over the limit"
    if isinstance(found, State):
        # The header verifies and the frame runs past the end, or ends in zeros: like a torn write.
        assert length > len(raw) - target.start - 52 or (last and rebooted)
        assert found == before
    else:
        assert isinstance(found, CorruptLogError)
        assert found.offset == target.start


@pytest.mark.parametrize("length", [0, 1, 60, 80, 2**30 + 1, 2**31 - 1, 2**32 - 1])
def test_a_length_that_does_not_verify_is_refused_unread(path, raw, length, rebooted):
    for frame in frames_of(raw):
        damaged = bytearray(raw)
        damaged[frame.start + 8 : frame.start + 12] = length.to_bytes(4, "little")
        assert bytes(damaged) != raw
        refused(path, bytes(damaged))


# Kinds, flags and versions of a newer format.


@pytest.mark.parametrize(
    "lies", [{"kind": 0}, {"kind": 6}, {"kind": 255}, {"flags": 4}, {"flags": 5}, {"flags": 0x80}]
)
def test_a_frame_of_a_newer_format_is_never_skipped_and_never_cut(path, raw, lies, rebooted):
    strange = forge(
        raw,
        lies.get("kind", KIND_SEAL),
        b"",
        **{name: value for name, value in lies.items() if name != "kind"},
    )
    for policy in ("refuse", "cut"):
        error = refused(path, raw + strange, InvalidFormatError, on_damage=policy)
        assert error.offset == len(raw)
        assert error.last_good_seq == 4


@pytest.mark.parametrize(
    ("version", "flags", "length"), [(0, 0, 52), (2, 0, 52), (65535, 0, 52), (1, 1, 52), (1, 0, 60)]
)
def test_a_log_of_another_format_version_is_refused_and_named(path, raw, version, flags, length):
    header = bytearray(raw[: FILE_HEADER.size])
    header[8:16] = (
        version.to_bytes(2, "little") + flags.to_bytes(2, "little") + length.to_bytes(4, "little")
    )
    header[-4:] = crc32c(bytes(header[:-4])).to_bytes(4, "little")
    for policy in ("refuse", "cut"):
        error = refused(
            path, bytes(header) + raw[FILE_HEADER.size :], InvalidFormatError, on_damage=policy
        )
        assert str(version) in error.reason


# The chain.


@pytest.mark.parametrize(
    "lies",
    [
        {"seq": 3, "batches": 0},
        {"seq": 5, "batches": 0},
        {"seq": 6, "batches": 1},
        {"seq": 2**64 - 1, "batches": 1},
        {"synced_seq": 1},
        {"synced_seq": 5},
        {"synced_seq": 2**64 - 1},
        {"offset": 0},
        {"offset": 2**64 - 1},
        {"link": 0},
    ],
    ids=str,
)
def test_a_frame_that_does_not_continue_the_chain_is_refused(path, raw, lies, rebooted):
    kind = KIND_BATCHES if lies.get("batches") else KIND_SEAL
    body = msgpack.packb([item()]) if kind == KIND_BATCHES else b""
    error = refused(path, raw + forge(raw, kind, body, **lies))
    assert error.offset == len(raw)


def test_a_sequence_at_its_end_takes_no_more_batches(path):
    path.write_bytes(forge_log([(KIND_BASE_END, EMPTY_BASE_END)], base_seq=2**64 - 1))
    before = path.read_bytes()
    engine = Engine(path)
    assert engine.fold.seq == 2**64 - 1
    with pytest.raises(FoldlogError, match="sequence"):
        engine.commit([encode_batch([Put("k", b"v")], WatchCursor.none())])
    assert path.read_bytes() == before
    engine.close()


# Bodies that do not decode, or decode to what is no batch.

HOSTILE = {
    "nothing": b"",
    "cut short": b"\x91\x94\xc4",
    "trailing data": msgpack.packb([item()]) + b"\xc0",
    "a nest bomb": b"\x91" * 100_000,
    "a huge array": b"\xdd\xff\xff\xff\xff",
    "a huge array within": b"\x91\x94\xc4\x00\xdd\x7f\xff\xff\xff",
    "a huge map": b"\xdf\xff\xff\xff\xff",
    "a huge blob": b"\xc6\xff\xff\xff\xff",
    "a huge text": b"\x91\x94\xc4\x00\x91\xdb\xff\xff\xff\xff",
    "a huge extension": b"\xc9\xff\xff\xff\xff\x01",
    "an extension": msgpack.packb([msgpack.ExtType(5, b"x")]),
    "a timestamp": msgpack.packb([item(values=[msgpack.Timestamp(1)])]),
    "a bad byte": b"\xc1",
    "nil": b"\xc0",
    "a number": b"\x07",
    "a map": msgpack.packb({"cursor": b""}),
    "an unhashable key": b"\x91\x81\x90\xc0",
    "no batches": msgpack.packb([]),
    "a batch that is no array": msgpack.packb([7]),
    "a batch of three": msgpack.packb([item()[:3]]),
    "a batch of five": msgpack.packb([[*item(), b""]]),
    "a cursor of 11 bytes": msgpack.packb([item(cursor=b"x" * 11)]),
    "a cursor of text": msgpack.packb([item(cursor="x")]),
    "no cursor": msgpack.packb([item(cursor=None)]),
    "a column that is no array": msgpack.packb([[b"", "k", [b"v"], [b""]]]),
    "columns of different lengths": msgpack.packb([item(keys=["a", "b"])]),
    "a key of bytes": msgpack.packb([item(keys=[b"k"])]),
    "a key that is a number": msgpack.packb([item(keys=[7])]),
    "a key that is nil": msgpack.packb([item(keys=[None])]),
    "a key that is not UTF-8": b"\x91\x94\xc4\x00\x91\xa1\xff\x91\xc4\x00\x91\xc4\x00",
    "a key with a lone surrogate": b"\x91\x94\xc4\x00\x91\xa3\xed\xa0\x80\x91\xc4\x00\x91\xc4\x00",
    "an over-long key": msgpack.packb([item(keys=["x" * 65_536])]),
    "an over-long key of wide characters": msgpack.packb([item(keys=["\U0001f600" * 16_384])]),
    "a value of text": msgpack.packb([item(values=["v"])]),
    "a value that is a number": msgpack.packb([item(values=[0])]),
    "a value that is NaN": msgpack.packb([item(values=[float("nan")])]),
    "a value that is true": msgpack.packb([item(values=[True])]),
    "a value that is an array": msgpack.packb([item(values=[[]])]),
    "an over-long value": msgpack.packb([item(values=[bytes(16 * 1024 * 1024 + 1)])]),
    "a version of text": msgpack.packb([item(versions=["v"])]),
    "a version that is nil": msgpack.packb([item(versions=[None])]),
    "a version of 11 bytes": msgpack.packb([item(versions=[b"x" * 11])]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_batch_that_verifies_and_does_not_decode_is_corruption(path, raw, name, rebooted):
    error = refused(path, raw + forge(raw, KIND_BATCHES, HOSTILE[name], batches=1))
    assert (error.offset, error.last_good_seq) == (len(raw), 4)
    assert error.reason


@pytest.mark.parametrize("name", ["a key of bytes", "trailing data"])
def test_such_a_batch_can_be_cut_like_other_damage(path, raw, name):
    found = outcome(path, raw + forge(raw, KIND_BATCHES, HOSTILE[name], batches=1), on_damage="cut")
    assert found.seq == 4
    assert path.read_bytes() == raw


@pytest.mark.parametrize(("said", "held"), [(1, 2), (2, 1), (3, 1)])
def test_a_frame_that_miscounts_its_batches_is_corruption(path, raw, said, held):
    refused(path, raw + forge(raw, KIND_BATCHES, msgpack.packb([item()] * held), batches=said))


@pytest.mark.parametrize("kind", [KIND_OPEN, KIND_SEAL, KIND_BATCHES])
def test_only_frames_of_batches_count_batches(path, raw, kind):
    body = {
        KIND_OPEN: msgpack.packb({"boot": ""}),
        KIND_SEAL: b"",
        KIND_BATCHES: msgpack.packb([item()]),
    }[kind]
    refused(path, raw + forge(raw, kind, body, batches=0 if kind == KIND_BATCHES else 1))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc0",
        b"\x07",
        b"\x80",
        b"\x81\xa4boot\xc0",
        b"\x81\xa4boot\xc4\x00",
        b"\x91\xa4boot",
        b"\xdf\xff\xff\xff\xff",
        b"\x81\x90\xc0",
        b"\x80\x80",
    ],
)
def test_an_open_frame_that_does_not_decode_is_corruption(path, raw, body):
    error = refused(path, raw + forge(raw, KIND_OPEN, body))
    assert error.offset == len(raw)


@given(st.binary(max_size=60))
def test_decoding_any_bytes_gives_batches_or_a_value_error(body):
    try:
        count = body[0] & 15 if body[:1] and body[0] >> 4 == 9 else 1
        batches = decode_batches(body, count)
    except ValueError:
        return
    for batch in batches:
        encode_batch(batch.updates(), batch.cursor)


json_like = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.binary(max_size=12),
        st.text(max_size=4),
        st.floats(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=12,
)


@given(st.one_of(json_like, st.lists(st.lists(json_like, min_size=4, max_size=4), max_size=2)))
def test_decoding_any_value_gives_batches_or_a_value_error(value):
    try:
        count = len(value) if isinstance(value, list) else 1
        batches = decode_batches(msgpack.packb(value), count)
    except ValueError:
        return
    for batch in batches:
        encode_batch(batch.updates(), batch.cursor)


# Bases.


def leaf_of(*keys):
    return encode_leaf(keys, [b"v"] * len(keys), [b""] * len(keys))


def end_of(leaves, entries, **other):
    return msgpack.packb(
        {"cursor": b"", "leaves": leaves, "entries": entries, "digest": b""} | other
    )


def test_a_forged_base_that_is_sound_opens(path):
    raw = forge_log(
        [(KIND_LEAF, leaf_of("a", "b")), (KIND_LEAF, leaf_of("c")), (KIND_BASE_END, end_of(2, 3))]
    )
    assert list(outcome(path, raw).entries) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [(KIND_SEAL, b"")],
        [(KIND_OPEN, msgpack.packb({"boot": ""}))],
        [(KIND_LEAF, leaf_of("a"))],
        [(KIND_LEAF, b""), (KIND_BASE_END, end_of(1, 1))],
        [(KIND_LEAF, bytes(15)), (KIND_BASE_END, end_of(1, 1))],
        [(KIND_LEAF, bytes(16)), (KIND_BASE_END, end_of(1, 0))],
        [(KIND_LEAF, b"\xff" * 64), (KIND_BASE_END, end_of(1, 2**32 - 1))],
        [(KIND_LEAF, leaf_of("a")[:-3]), (KIND_BASE_END, end_of(1, 2))],
        [
            (KIND_LEAF, leaf_of("a").replace(b"\xffa\xff", b"\xff\xfe\xff")),
            (KIND_BASE_END, end_of(1, 1)),
        ],
        [(KIND_LEAF, leaf_of("b")), (KIND_LEAF, leaf_of("a")), (KIND_BASE_END, end_of(2, 2))],
        [(KIND_LEAF, leaf_of("a")), (KIND_LEAF, leaf_of("a")), (KIND_BASE_END, end_of(2, 2))],
        [(KIND_LEAF, leaf_of("a")), (KIND_BASE_END, end_of(2, 1))],
        [(KIND_LEAF, leaf_of("a")), (KIND_BASE_END, end_of(1, 2))],
        [(KIND_BASE_END, end_of(0, 0)), (KIND_LEAF, leaf_of("a"))],
        [(KIND_BASE_END, end_of(0, 0)), (KIND_BASE_END, end_of(0, 0))],
        [(KIND_BASE_END, b"")],
        [(KIND_BASE_END, b"\xc0")],
        [(KIND_BASE_END, b"\x80")],
        [(KIND_BASE_END, end_of(0, 0, cursor=b"x" * 11))],
        [(KIND_BASE_END, end_of(0, 0, cursor="text"))],
        [(KIND_BASE_END, end_of(0, 0, digest=None))],
        [(KIND_BASE_END, end_of("0", 0))],
        [(KIND_BASE_END, end_of(0, 0) + b"\xc0")],
    ],
    ids=lambda frames: " ".join(f"{kind}:{len(body)}" for kind, body in frames) or "none",
)
def test_a_base_that_verifies_and_makes_no_sense_is_refused(path, frames):
    raw = forge_log(frames)
    for policy in ("refuse", "cut"):
        found = outcome(path, raw, on_damage=policy)
        if isinstance(found, State):  # with on_damage="cut", what stands behind a whole base may go
            assert policy == "cut"
            assert frames[0][0] == KIND_BASE_END
            assert found.entries == {}
        else:
            assert isinstance(found, CorruptLogError)


@pytest.mark.parametrize("low", ["keys", "values"])
def test_a_leaf_that_verifies_and_lies_within_is_refused_when_it_is_read(path, low):
    body = bytearray(leaf_of("a", "b"))
    if low == "keys":
        body[body.index(b"\xffb\xff") + 1] = ord("c")  # its index has a checksum of its own
    else:
        body[-1] ^= 1
    path.write_bytes(forge_log([(KIND_LEAF, bytes(body)), (KIND_BASE_END, end_of(1, 2))]))
    engine = Engine(path)
    with pytest.raises(CorruptLogError):
        engine.fold.get("b")
    engine.log.abandon()


def test_damage_to_a_leaf_while_the_log_is_open_is_never_read_as_a_value(path):
    raw = write_log(path, [], base=[[Put(f"k{n:03}", b"value %d" % n) for n in range(300)]])
    leaf = frames_of(raw)[0]
    # A frame's header and trailer are read at opening, once.
    for at in range(leaf.start + 48, leaf.end - 4, 53):
        path.write_bytes(raw)
        engine = Engine(path)
        damage(path, at)
        for key in ("k000", "k001", "k120"):
            with contextlib.suppress(CorruptLogError):
                assert engine.fold.get(key).value == b"value %d" % int(key[1:])
        with pytest.raises(CorruptLogError) as caught:
            engine.fold.range("")
        assert caught.value.path == path
        engine.log.abandon()


def test_a_hole_that_a_header_calls_a_frame_takes_no_memory(path, raw):
    """A batch of a GiB whose pages were lost, or 4 KiB of disk that claim to be one: each reader
    allocated all of it, and `verify` twice."""
    length = 900 * 1024 * 1024
    path.write_bytes(raw + forge(raw, KIND_BATCHES, b"", body_len=length, batches=1))
    os.truncate(path, path.stat().st_size + length)
    readers = (
        lambda: Engine(path),
        lambda: Tail(OS_FILES, path).poll(),
        lambda: salvage_log(path, path.with_name("saved")),
        lambda: verify_log(path),
    )
    tracemalloc.start()
    try:
        for reader in readers[:2]:
            with pytest.raises(CorruptLogError):
                reader()
        assert readers[2]().losses
        assert not readers[3]().ok
        assert tracemalloc.get_traced_memory()[1] < 100 * 1024 * 1024
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("at", "reason"),
    [(None, ""), (FRAME_HEADER.size, "body does not verify"), (-1, "trailer is wrong")],
)
def test_a_large_frame_is_checked_in_pieces_as_any_other_is(path, raw, at, reason, monkeypatch):
    monkeypatch.setattr(scan, "LARGE_BYTES", 0)
    monkeypatch.setattr(scan, "WINDOW_BYTES", 7)
    frame = frames_of(raw)[-1]
    if at is not None:
        damage(path, (frame.start if at > 0 else frame.end) + at)
    with ReadHandle(OS_FILES, path) as handle:
        header = read_own_header(handle)
        frames = read_frames(handle, header, Chain.start(header), len(raw), window_bytes=60)
        if at is None:
            assert sum(1 for _ in frames) == len(frames_of(raw))
        else:
            with pytest.raises(BadFrame, match=reason):
                list(frames)
        reasons = [piece.reason for piece in Walker(handle, header.seed, len(raw)).pieces()]
        assert reason in reasons[-1]
        assert not any(reasons[:-1])


def test_a_file_crafted_of_magic_numbers_is_refused_in_bounded_work(path, monkeypatch):
    raw = write_log(path, some_batches(2))
    tried = 0
    real = recovery.parse_frame_header

    def counted(*arguments):
        nonlocal tried
        tried += 1
        return real(*arguments)

    monkeypatch.setattr(recovery, "parse_frame_header", counted)
    reboot(monkeypatch)
    damaged = bytearray(raw)
    damaged[-10] ^= 1
    refused(path, bytes(damaged) + b"\xf5fr\xa7" * 300_000)
    assert tried <= recovery.MAX_CANDIDATES + 2


def test_opening_twice_after_each_refusal_gives_the_same_refusal(path, raw):
    path.write_bytes(raw + forge(raw, KIND_BATCHES, b"\xc0", batches=1))
    seen = set()
    for _ in range(2):
        with pytest.raises(CorruptLogError) as caught:
            AppendLogSnapshot.open(path)
        seen.add(str(caught.value))
    assert len(seen) == 1
