"""Decoding a batch: the quick way and the strict one agree, whatever the bytes say."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from foldlog.protocol.decoding import Undecodable, _decode_item, _usual_item
from foldlog.protocol.updates import Change, DecodedPuts

SIZE = 4096
ODD = (None, False, True, 7, "text", b"bytes", b"eleven byte", "\ud800", [], {}, 1.5)


def item_of(chance: random.Random) -> list[object]:
    """A batch as it is unpacked, often with something odd in it."""
    count = chance.randrange(4)
    columns: list[list[object]] = [
        [f"k{number}" for number in range(count)],
        [b"v" * chance.randrange(20) for _ in range(count)],
        [b"x" * chance.choice((0, 8, 10)) for _ in range(count)],
    ]
    item: list[object] = [b"c" * chance.choice((0, 8, 10)), *columns]
    where = chance.choice(("nowhere", "item", "column", "length", "origin"))
    if where == "item":
        item[chance.randrange(4)] = chance.choice(ODD)
    elif where == "column" and count:
        chance.choice(columns)[chance.randrange(count)] = chance.choice(ODD)
    elif where == "length":
        chance.choice(columns).append(chance.choice(ODD))
    elif where == "origin":
        item.append(chance.choice((b"", b"origin", None)))
    return item


@pytest.mark.parametrize("seed", range(20))
def test_the_quick_way_gives_what_the_strict_one_does_or_leaves_it_to_that(seed: int):
    chance = random.Random(seed)
    quick = 0
    for _ in range(500):
        item = item_of(chance)
        found = _usual_item(item)
        if found is None:
            continue
        quick += 1
        assert found == _decode_item(item, SIZE)
        assert type(found) is DecodedPuts
        changes: dict[str, Change] = {}
        found.change_into(changes)
        assert changes == dict(chain.from_iterable(part.items() for part in found.changes()))
    assert quick > 50


@pytest.mark.parametrize(
    "item",
    [
        None,
        (),
        [],
        [b"c", [], [], []][:3],
        [b"c", ["k"], [b"v"], [b"x" * 11]],
        [b"c", ["k", "l"], [b"v", b"v"], [b"", b"x" * 11]],
        [b"c" * 11, [], [], []],
        [b"c", [b"k"], [b"v"], [b""]],
        [b"c", ["k"], ["v"], [b""]],
        [b"c", ["k"], [b"v"], [""]],
        [b"c", ["k"], [True], [b""]],
        [b"c", ["k"], [b"v"], []],
    ],
)
def test_what_is_not_valid_is_left_to_the_strict_way_which_refuses_it(item: object):
    assert _usual_item(item) is None
    with pytest.raises(Undecodable):
        _decode_item(item, SIZE)
