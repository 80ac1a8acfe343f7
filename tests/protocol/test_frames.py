"""The bytes of headers and frames: what is packed parses, and nothing else does."""

from __future__ import annotations

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from foldlog.protocol.frames import (
    FILE_HEADER,
    FILE_MAGIC,
    FRAME_HEADER,
    FRAME_MAGIC,
    FRAME_OVERHEAD,
    KINDS,
    TRAILER,
    FileHeader,
    build_frame,
    parse_file_header,
    parse_frame_header,
)

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)
headers = st.builds(FileHeader, st.binary(min_size=16, max_size=16), u64, u64)


def test_the_sizes_are_those_of_the_format():
    assert (FILE_HEADER.size, FRAME_HEADER.size, FRAME_OVERHEAD, len(TRAILER)) == (52, 48, 52, 4)
    assert FILE_MAGIC == b"\x89FLG\r\n\x1a\n"
    assert sorted(KINDS) == [1, 2, 3, 4, 5]


def test_checksums_are_crc_32c():
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(100)) != 0


@given(headers)
def test_a_file_header_packs_and_parses(header):
    assert parse_file_header(header.pack()) == header
    assert parse_file_header(header.pack() + b"more") == header
    assert header.link == int.from_bytes(header.pack()[-4:], "little")


@given(headers, st.integers(0, 52 * 8 - 1))
def test_a_file_header_with_any_bit_flipped_is_refused(header, bit):
    raw = bytearray(header.pack())
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ValueError, match=r"file header|foldlog|version"):
        parse_file_header(bytes(raw))


@given(headers, st.integers(0, 51))
def test_a_file_header_cut_off_is_refused(header, size):
    with pytest.raises(ValueError, match="not a foldlog log"):
        parse_file_header(header.pack()[:size])


fields = st.fixed_dictionaries(
    {
        **dict.fromkeys(("seq", "synced_seq", "offset"), u64),
        "link": u32,
        "flags": st.integers(0, 255),
        "batches": st.integers(0, 65535),
    }
)


@given(u32, st.sampled_from(sorted(KINDS)), st.binary(max_size=40), fields)
def test_a_frame_builds_and_its_header_parses(seed, kind, body, fields):
    raw, crc = build_frame(seed, kind, body, **fields)
    assert len(raw) == FRAME_OVERHEAD + len(body)
    assert raw.startswith(FRAME_MAGIC)
    assert raw.endswith(body + TRAILER)
    header = parse_frame_header(b"??" + raw, 2, seed)
    sums = {"crc": crc, "body_len": len(body), "body_crc": crc32c(body), "kind": kind}
    assert header._asdict() == fields | sums
    assert header.size == len(raw)


@given(st.integers(0, 48 * 8 - 1), u32)
def test_a_frame_header_with_any_bit_flipped_is_none(bit, seed):
    raw, _ = build_frame(seed, 2, b"body", seq=3, synced_seq=1, offset=52, link=9, batches=1)
    raw = bytearray(raw)
    raw[bit // 8] ^= 1 << bit % 8
    assert parse_frame_header(raw, 0, seed) is None


def test_a_frame_of_another_log_or_generation_is_none():
    header = FileHeader(b"a" * 16, 1, 0)
    place = {"seq": 1, "synced_seq": 0, "offset": 52, "link": header.link}
    raw, _ = build_frame(header.seed, 2, b"body", **place, batches=1)
    assert parse_frame_header(raw, 0, header.seed) is not None
    for other in (FileHeader(b"b" * 16, 1, 0), FileHeader(b"a" * 16, 2, 0)):
        assert other.seed != header.seed
        assert parse_frame_header(raw, 0, other.seed) is None
    assert FileHeader(b"a" * 16, 1, 5).link != header.link


@given(st.binary(max_size=60), st.integers(0, 60), u32)
def test_parsing_any_bytes_is_none_and_never_an_error(raw, at, seed):
    assert parse_frame_header(raw, at, seed) is None


def test_a_header_at_the_very_end_of_a_buffer_parses_and_one_byte_less_does_not():
    raw, _ = build_frame(0, 5, b"", seq=0, synced_seq=0, offset=0, link=0)
    assert parse_frame_header(raw[:48], 0, 0) is not None
    assert parse_frame_header(raw[:47], 0, 0) is None
    assert parse_frame_header(memoryview(raw), 0, 0) is not None
