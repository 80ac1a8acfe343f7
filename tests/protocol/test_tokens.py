"""Tokens: opaque bytes of at most ten, that say what they are."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldlog import VersionToken, WatchCursor

KINDS = pytest.mark.parametrize("kind", [VersionToken, WatchCursor])


@KINDS
@given(raw=st.binary(max_size=10))
def test_a_token_is_its_bytes(kind, raw):
    token = kind(raw)
    assert bytes(token) == raw
    assert token == raw
    assert hash(token) == hash(raw)
    assert token == kind(bytearray(raw)) == kind(memoryview(raw))
    assert type(pickle.loads(pickle.dumps(token))) is kind
    assert pickle.loads(pickle.dumps(token)) == copy.deepcopy(token) == token


@KINDS
@given(raw=st.binary(min_size=11, max_size=40))
def test_more_than_ten_bytes_are_refused(kind, raw):
    with pytest.raises(ValueError, match="at most 10 bytes"):
        kind(raw)


@KINDS
@pytest.mark.parametrize("bad", [None, 0, 8, "", "text", [1, 2], (1,), 1.5], ids=repr)
def test_what_is_not_bytes_is_a_type_error(kind, bad):
    with pytest.raises(TypeError, match=kind.__name__):
        kind(bad)


@KINDS
@given(number=st.integers(0, 2**64 - 1))
def test_a_number_round_trips_and_sorts_as_it_should(kind, number):
    token = kind.from_u64(number)
    assert bytes(token) == number.to_bytes(8, "big")
    assert token.as_u64() == number
    assert repr(token) == f"{kind.__name__}.from_u64({number})"
    if number:
        assert kind.from_u64(number - 1) < token


@KINDS
@pytest.mark.parametrize("number", [-1, 2**64, 10**30])
def test_a_number_out_of_range_is_refused(kind, number):
    with pytest.raises(ValueError, match="2\\*\\*64"):
        kind.from_u64(number)


@KINDS
@pytest.mark.parametrize("bad", [True, 1.0, "1", None, b"1"], ids=repr)
def test_what_is_no_number_is_a_type_error(kind, bad):
    with pytest.raises(TypeError):
        kind.from_u64(bad)


@KINDS
@pytest.mark.parametrize("length", [0, 1, 7, 9, 10])
def test_only_a_token_of_eight_bytes_is_a_number(kind, length):
    assert kind(bytes(length)).as_u64() is None


def test_the_empty_tokens_say_so():
    assert VersionToken.unknown().is_unknown
    assert WatchCursor.none().is_none
    assert VersionToken() == VersionToken.unknown() == b""
    assert not VersionToken(b"\0").is_unknown
    assert not WatchCursor(b"\0").is_none
    assert repr(WatchCursor.none()) == str(WatchCursor.none()) == "WatchCursor('')"


def test_a_cursor_is_made_from_a_version_and_from_nothing_else():
    cursor = WatchCursor.from_version(VersionToken.from_u64(5))
    assert type(cursor) is WatchCursor
    assert cursor.as_u64() == 5
    for bad in (b"5", WatchCursor.from_u64(5), 5, None):
        with pytest.raises(TypeError):
            WatchCursor.from_version(bad)
