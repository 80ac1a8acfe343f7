"""Updates in columns: read and encoded as the same updates in a list."""

from __future__ import annotations

import pytest
from counting import functions_of
from interrupts import strikes

from foldlog import Delete, Purge, Put, VersionToken, WatchCursor
from foldlog.protocol.decoding import Undecodable, decode_batches
from foldlog.protocol.tokens import MAX_TOKEN_BYTES
from foldlog.protocol.updates import (
    MAX_KEY_BYTES,
    MAX_VALUE_BYTES,
    UpdateColumns,
    batches_body,
    encode_batch,
    keys_of,
    raw_updates,
)

CURSOR = WatchCursor.from_u64(7)


def in_columns(updates) -> UpdateColumns:
    values = [
        update.value if type(update) is Put else None if type(update) is Delete else False
        for update in updates
    ]
    versions = [bytes(update.version) for update in updates]
    return UpdateColumns([update.key for update in updates], values, versions)


def version(number: int) -> VersionToken:
    return VersionToken.from_u64(number)


PUTS = [Put(f"k.{number}", b"%d" % number, version(number)) for number in range(2, 40)]
MIXED = [
    Put("a", b"", version(1)),
    Delete("b", version(2)),
    Purge("ü", version(3)),
    Put("a", b"2", VersionToken.unknown()),
]
LARGE = [Put(f"k.{number}", b"v", version(number)) for number in range(10_000)]
some = pytest.mark.parametrize("updates", [[], PUTS[:1], PUTS, MIXED, MIXED[1:2], LARGE])


@some
def test_columns_are_a_sequence_of_their_updates(updates):
    columns = in_columns(updates)
    assert columns == updates
    assert (len(columns), bool(columns)) == (len(updates), bool(updates))
    assert [columns[index] for index in range(-len(updates), len(updates))] == updates * 2
    assert columns[1:3] == updates[1:3]
    assert columns != [*updates, PUTS[0]]
    assert keys_of(columns) == keys_of(updates)
    assert columns.removes == any(type(update) is not Put for update in updates)
    assert repr(updates) in repr(columns)


@some
@pytest.mark.parametrize("origin", [b"", b"o" * 32])
def test_columns_are_encoded_as_their_updates_are(updates, origin):
    assert encode_batch(in_columns(updates), CURSOR, origin) == encode_batch(
        updates, CURSOR, origin
    )


def test_encoding_columns_makes_no_update():
    assert "_updates" not in functions_of(encode_batch, in_columns(PUTS), CURSOR)


def test_columns_under_prefixes_are_those_whose_key_starts_with_one():
    columns = in_columns(MIXED)
    assert columns.under(("a", "b", "ü")) is columns
    assert columns.under(("ü", "a")) == [MIXED[0], MIXED[2], MIXED[3]]
    assert columns.under(("z",)) == []


def test_columns_grow_by_others():
    columns = in_columns(PUTS)
    columns.extend(in_columns(MIXED))
    assert columns == [*PUTS, *MIXED]


@pytest.mark.parametrize(
    ("column", "bad", "error"),
    [
        ("keys", b"k", TypeError),
        ("keys", "k" * (MAX_KEY_BYTES + 1), ValueError),
        ("keys", "\ud800", ValueError),
        ("values", "v", TypeError),
        ("values", True, TypeError),
        ("values", bytearray(1), TypeError),
        ("values", bytes(MAX_VALUE_BYTES + 1), ValueError),
        ("versions", "7", TypeError),
        ("versions", bytes(11), ValueError),
    ],
)
@pytest.mark.parametrize("others", [[], PUTS, MIXED])
def test_columns_that_cannot_be_held_are_refused(column, bad, error, others):
    columns = in_columns([*others, PUTS[0]])
    getattr(columns, column)[-1] = bad
    with pytest.raises(error):
        encode_batch(columns, CURSOR)


@pytest.mark.parametrize("column", ["keys", "values", "versions"])
def test_columns_of_different_lengths_are_refused(column):
    columns = in_columns(PUTS)
    getattr(columns, column).pop()
    with pytest.raises(ValueError, match="zip"):
        encode_batch(columns, CURSOR)


def test_a_long_key_of_few_bytes_and_a_token_are_held():
    """They fail the quick checks, and pass the exact ones."""
    updates = [*PUTS, Put("k" * MAX_KEY_BYTES, b"1", version(1))]
    columns = in_columns(updates)
    columns.versions[0] = PUTS[0].version
    batch = encode_batch(columns, CURSOR)
    assert batch == encode_batch(updates, CURSOR)
    assert {type(change[2]) for change in batch.changes[0].values()} == {bytes}


BAD = [
    Put("k.9", "text"),
    Put("k.9", True),
    Put("k" * (MAX_KEY_BYTES + 1), b"v"),
    Put("k.9", b"v", b"no token"),
    Delete("k.9", None),
]


def _columns_of_a_batch(updates) -> tuple:
    (batch,) = decode_batches(batches_body([encode_batch(updates, CURSOR).item]), 1)
    return batch.values, batch.versions


def _columns_for_rocksdb(updates) -> tuple:
    _, values, versions = raw_updates(updates)
    return values, map(bytes, versions)


@pytest.mark.parametrize("bad", BAD, ids=["text", "true", "long key", "bytes", "none"])
@pytest.mark.parametrize("updates", [PUTS, MIXED, PUTS[:1]], ids=["puts", "mixed", "one"])
@pytest.mark.parametrize("encoded", [_columns_of_a_batch, _columns_for_rocksdb])
def test_a_list_that_another_thread_changes_is_encoded_as_it_was_checked(encoded, updates, bad):
    """A thread replaced an element of the list that another one applied. The batch was answered,
    and the log did not open any more: what had been checked was not what was encoded."""
    at = len(updates) // 2
    outcomes = set()
    for before, after in ((bad, updates[at]), (updates[at], bad)):
        for strike in strikes(act=lambda: given.__setitem__(at, after)):  # noqa: B023
            given = [*updates]
            given[at] = before
            try:
                values, versions = strike.run(lambda: encoded(given))  # noqa: B023
            except Undecodable:
                raise  # a ValueError, too
            except (TypeError, ValueError):
                outcomes.add("refused")
            else:
                assert {type(value) for value in values} <= {bytes, bool, type(None)}
                assert max(map(len, versions)) <= MAX_TOKEN_BYTES
                outcomes.add("encoded")
    assert outcomes == {"refused", "encoded"}


def test_columns_are_encoded_as_they_were_when_they_were_given():
    for strike in strikes(act=lambda: columns.values.__setitem__(1, "text")):  # noqa: B023
        columns = in_columns(MIXED)
        try:
            batch = strike.run(lambda: encode_batch(columns, CURSOR))  # noqa: B023
        except TypeError:
            continue
        decode_batches(batches_body([batch.item]), 1)
