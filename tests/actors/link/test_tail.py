"""The tail of an attachment: what a piece of the changes does to the store and to the state."""

from __future__ import annotations

import asyncio

from scripted_upstream import Plain, at
from virtual_link import ORIGIN, Fed, drive, holding, live, reached

from foldlog import LinkState, Put
from foldlog.protocol.upstream import Changes


class Telling(Plain):
    """Sends just what the test puts into `pieces`."""

    def __init__(self) -> None:
        super().__init__()
        self.put("k", b"1")
        self.pieces: asyncio.Queue[Changes] = asyncio.Queue()

    async def changes(self, after, prefixes):
        while True:
            yield await self.pieces.get()


def told(*pieces, script=None, **config):
    """Run a link that resumes at position 1 until it has taken these pieces."""
    upstream = Telling()
    sink = holding(upstream)
    for piece in pieces:
        upstream.pieces.put_nowait(piece)

    async def taken(link):
        await reached(upstream.pieces.empty)
        await asyncio.sleep(1)
        if script is not None:
            await script(link, upstream)

    link = drive(sink, upstream, taken, **config)
    return sink, link


def test_a_heartbeat_writes_nothing_and_a_position_alone_moves_the_cursor():
    sink, _ = told(Changes([], at(1), 0), Changes([], at(2), 0))
    assert sink.fed == [Fed({}, set(), 2, ORIGIN, "")]


def test_what_is_dropped_still_moves_the_cursor():
    sink, link = told(
        Changes([Put("secret", b""), Put("k", b"2")], at(2)),
        Changes([Put("secret", b"")], at(3)),
        parse=lambda update: None if update.key == "secret" else update,
    )
    assert sink.fed == [Fed({"k": b"2"}, set(), 2, ORIGIN, ""), Fed({}, set(), 3, ORIGIN, "")]
    assert link.stats().updates == 1


def test_a_parse_may_make_several_updates_or_none_of_one():
    sink, _ = told(
        Changes([Put("none", b""), Put("two", b"2"), Put("one", b"1")], at(2)),
        parse=lambda update: {
            "none": [],
            "two": [update, update._replace(key="too")],
            "one": update,
        }[update.key],
    )
    assert sink.fed == [Fed({"two": b"2", "too": b"2", "one": b"1"}, set(), 2, ORIGIN, "")]


def test_updates_at_the_position_that_is_reached_are_applied():
    sink, _ = told(Changes([Put("k", b"2")], at(1), 0))
    assert sink.entries == {"k": b"2"}


def test_a_mirror_is_live_once_nothing_more_is_waiting_and_stays_so():
    async def script(link, upstream):
        assert (link.state, link.stats().lag) == (LinkState.CATCHING_UP, 3)
        assert link.stats().staleness_s == float("inf")
        upstream.pieces.put_nowait(Changes([], at(1), None))
        await asyncio.sleep(1)
        assert (link.state, link.stats().lag) == (LinkState.CATCHING_UP, None)
        upstream.pieces.put_nowait(Changes([], at(1), 0))
        await live(link)
        assert link.stats().staleness_s < 1000
        upstream.pieces.put_nowait(Changes([Put("k", b"2")], at(2), 5))
        await asyncio.sleep(1)
        assert (link.state, link.stats().lag) == (LinkState.LIVE, 5)

    told(Changes([], at(1), 3), script=script)
