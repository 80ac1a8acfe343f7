"""A program's own upstream that lies: wrong types, positions that go back, exits, no rest."""

from __future__ import annotations

import asyncio

import pytest
from scripted_upstream import Marked, Plain, Scripted, at
from virtual_link import MemorySink, drive, failed, live, reached

from foldlog import LinkState, Put, UpstreamRefused
from foldlog.protocol.upstream import Changes, Identity, Revisions

ORIGIN = Plain.origin


def gives(kind, **answers):
    """An upstream that answers as told."""

    async def identify(self):
        return answers["identify"]

    async def changes(self, after, prefixes):
        for piece in answers["changes"]:
            yield piece
        await asyncio.sleep(1e6)

    async def revisions(self, prefixes):
        return answers["revisions"]

    methods = {"identify": identify, "changes": changes, "revisions": revisions}
    return type("Lying", (kind,), {name: methods[name] for name in answers})()


@pytest.mark.parametrize(
    ("kind", "answers", "reason"),
    [
        (Plain, {"identify": None}, "identify returns Identity, not NoneType"),
        (Plain, {"identify": (ORIGIN, at(0), at(1))}, "identify returns Identity, not tuple"),
        (Plain, {"identify": Identity("name", at(0), at(1))}, "an origin is bytes, not str"),
        (Plain, {"identify": Identity(ORIGIN, b"", at(1))}, "a first position is WatchCursor"),
        (Plain, {"identify": Identity(ORIGIN, at(0), 1)}, "a last position is WatchCursor"),
        (Marked, {"identify": Identity(b"o" * 25, at(0), at(1))}, "1 to 24 bytes, not 25"),
        (Plain, {"changes": [None]}, "changes and state yield Changes, not NoneType"),
        (Plain, {"changes": [([], at(1))]}, "changes and state yield Changes, not tuple"),
        (Plain, {"changes": [Changes([], 1)]}, "a position is WatchCursor, not int"),
        (Plain, {"changes": [Changes([], at(1), "0")]}, "behind is int, not str"),
        (Plain, {"changes": [Changes([], at(1), -1)]}, "behind is a count or None, not -1"),
        (Plain, {"changes": [Changes([], at(1), False)]}, "behind is a count or None"),
        (Plain, {"changes": [Changes([], at(1), 0, "m" * 8)]}, "a mark is bytes, not str"),
        (Plain, {"changes": [Changes([], at(1), 0, b"mmm")]}, "a mark has 0 or 8 bytes, not 3"),
        (Scripted, {"revisions": {"k": b"1"}}, "revisions returns Revisions, not dict"),
        (Scripted, {"revisions": Revisions({}, b"")}, "a position is WatchCursor, not bytes"),
    ],
)
def test_what_an_upstream_gives_has_the_types_of_the_seam(kind, answers, reason):
    """Some wrong types were restarted for five times, with an AttributeError as the reason; a mark
    of three bytes was written, and the log then taken for one of another upstream."""
    upstream, sink = gives(kind, **answers), MemorySink()
    upstream.put("k", b"1")
    sink.hold(upstream.updates, at(1), upstream.origin)
    link = drive(sink, upstream, failed)
    assert isinstance(link.error, UpstreamRefused)
    assert reason in link.reason
    assert (sink.fed, sink.restarts) == ([], [])


WENT_BACK = "the upstream went back from position 0000000000000009 to 0000000000000002"


def test_a_position_that_goes_back_is_not_written():
    """The cursor went back with it, and no watcher was told."""
    pieces = [Changes([Put("k", b"2")], at(9), 0), Changes([Put("k", b"1")], at(2), 0)]
    upstream, sink = gives(Plain, changes=pieces), MemorySink()
    upstream.updates = [Put("k", b"2")] * 9

    async def lost(link):
        await reached(lambda: (LinkState.LOST, WENT_BACK) in link.states)

    drive(sink, upstream, lost)
    assert {fed.position for fed in sink.fed} == {None, 9}
    assert sink.entries == {"k": b"2"}


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("part", ["changes", "revisions"])
def test_an_exit_of_a_part_restarts_the_link(part, error):
    """It ended the event loop: the link died at the first."""

    class Exiting(Scripted):
        raised = 0

        def leave(self, name):
            if name == part and self.raised < 2:
                self.raised += 1
                raise error

        async def changes(self, after, prefixes):
            self.leave("changes")
            async for piece in super().changes(after, prefixes):
                yield piece

        async def revisions(self, prefixes):
            self.leave("revisions")
            return await super().revisions(prefixes)

    upstream, sink = Exiting(), MemorySink()
    upstream.put("k", b"1")
    sink.hold(upstream.updates, at(1), ORIGIN)
    drive(sink, upstream, live)
    assert (upstream.raised, len(sink.restarts)) == (2, 2)


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError(), SystemExit(1), GeneratorExit(), OSError()], ids=repr
)
def test_whatever_closing_an_upstream_raises_the_link_attaches_again(error):
    """A client library that cancels what still waits for an answer ended the link for good: it said
    that it was closed, while its store was open."""

    class Cancelling(Plain):
        ended = closed = 0

        async def changes(self, after, prefixes):
            self.ended += 1
            if self.ended > 2:
                async for piece in super().changes(after, prefixes):
                    yield piece

        async def close(self):
            self.closed += 1
            raise error

    upstream, sink = Cancelling(), MemorySink()
    upstream.put("k", b"1")
    sink.hold(upstream.updates, at(1), ORIGIN)
    link = drive(sink, upstream, live)
    assert (upstream.ended, upstream.closed, sink.restarts) == (3, 3, [])  # once as it is stopped
    assert LinkState.CLOSED not in {state for state, _ in link.states}


@pytest.mark.parametrize("part", ["changes", "state"])
def test_an_upstream_whose_pieces_are_always_ready_does_not_keep_the_link_from_being_stopped(part):
    """Only batches that were written let the loop run: heartbeats, and a state with nothing of the
    prefixes, did not, and `close` ended without the link's thread."""

    class Ready(Scripted):
        pieces = 0

        async def changes(self, after, prefixes):
            while part == "changes":
                yield self.next()
            await asyncio.sleep(1e6)

        async def state(self, prefixes):
            while part == "state":
                yield self.next()

        def next(self):
            self.pieces += 1
            assert self.pieces < 10_000, "the loop never ran"
            return Changes([], at(1), 0)

    upstream, sink = Ready(), MemorySink()
    upstream.put("k", b"1")
    if part == "changes":
        sink.hold(upstream.updates, at(1), ORIGIN)

    async def some(link):
        while not upstream.pieces:
            await asyncio.sleep(0)

    drive(sink, upstream, some)
    assert 0 < upstream.pieces < 10_000


def test_a_hook_that_makes_a_coroutine_fails_the_link():
    """It was never run, and nobody told."""

    async def asynchronous(update):
        return update

    upstream, sink = Plain(), MemorySink()
    upstream.put("k", b"1")
    link = drive(sink, upstream, failed, parse=lambda update: asynchronous(update))
    assert isinstance(link.error, TypeError)
    assert "is asynchronous: a hook is a plain function" in link.reason
