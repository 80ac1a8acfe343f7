"""One attachment: which batches a link gives to its store, and in which states, for every way to
resume."""

from __future__ import annotations

import asyncio

import pytest
from scripted_upstream import InPieces, Marked, Plain, Scripted, at, filled
from virtual_link import ORIGIN, Fed, MemorySink, drive, failed, holding, live, reached

from foldlog import Delete, LinkState, Put, VersionToken, WatchCursor
from foldlog.actors.link import attachment
from foldlog.protocol.upstream import Changes, ResetHeld, UpstreamLost, UpstreamRefused

pytestmark = pytest.mark.usefixtures("no_threads")

REBORN = ORIGIN[:16] + b"2" * 8


# Loading.


def test_a_state_is_loaded_in_pieces_with_the_cursor_last():
    upstream, sink = filled(InPieces, b"a", b"b"), MemorySink()
    upstream.delete("k.0")
    link = drive(sink, upstream, live)
    assert sink.fed == [
        Fed({"k.0": b"a"}, set(), None, ORIGIN, ""),
        Fed({"k.1": b"b"}, set(), None, ORIGIN, ""),
        Fed({}, {"k.0"}, None, ORIGIN, ""),
        Fed({}, set(), 3, ORIGIN, ""),
    ]
    assert link.states == [
        (LinkState.ATTACHING, ""),
        (LinkState.CATCHING_UP, "loading"),
        (LinkState.CATCHING_UP, ""),
        (LinkState.LIVE, ""),
    ]
    assert (link.stats().attaches, link.stats().updates, link.stats().resets) == (1, 3, 0)


def test_a_load_that_goes_on_writes_what_differs_and_deletes_what_is_gone():
    upstream, sink = filled(Scripted, b"a", b"b", b"c"), MemorySink()
    held = [upstream.updates[0], upstream.updates[1]._replace(value=b"old"), Put("gone", b"")]
    sink.hold(held, WatchCursor.none(), ORIGIN)
    drive(sink, upstream, live)
    assert sink.fed == [
        Fed({"k.1": b"b", "k.2": b"c"}, set(), None, ORIGIN, ""),
        Fed({}, {"gone"}, 3, ORIGIN, ""),
    ]


def test_a_load_that_goes_on_with_nothing_to_write_writes_the_cursor_alone():
    upstream, sink = filled(Scripted, b"a"), MemorySink()
    sink.hold(upstream.updates, WatchCursor.none(), ORIGIN)
    drive(sink, upstream, live)
    assert sink.fed == [Fed({}, set(), 1, ORIGIN, "")]


def test_a_load_that_would_delete_most_keys_is_held():
    upstream, sink = filled(Scripted, b"a"), MemorySink()
    sink.hold([Put(f"old.{n}", b"") for n in range(200)], WatchCursor.none(), ORIGIN)

    async def accepted(link):
        await failed(link)
        assert "200 of 200 keys would be deleted" in link.reason
        assert len(sink.fold) == 201
        link.accept_reset()
        await live(link)
        assert not link._intake.accepted

    drive(sink, upstream, accepted)
    assert sink.entries == {"k.0": b"a"}


def test_a_first_load_is_audited_only_after_the_interval():
    upstream, sink = filled(Scripted, b"a"), MemorySink()

    async def waits(link):
        await live(link)
        await asyncio.sleep(9)
        assert link.stats().audits == 0
        await asyncio.sleep(2)
        assert link.stats().audits == 1

    drive(sink, upstream, waits, audit_interval_s=10.0)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_an_upstream_without_a_state_is_loaded_from_its_changes_up_to_its_last_position(count):
    upstream, sink = filled(Plain, *[b"v"] * count), MemorySink()
    link = drive(sink, upstream, live)
    assert sink.entries == {f"k.{n}": b"v" for n in range(count)}
    assert sink.fold.cursor() == at(count)
    assert link.stats().attaches == 1


# Resuming.


def test_an_attachment_that_resumes_is_live_only_once_it_is_audited():
    upstream = filled(Scripted, b"a", b"b")
    sink, audited = holding(upstream, 1), asyncio.Event()

    class Held(Scripted):
        updates = upstream.updates

        def __init__(self):
            pass

        async def revisions(self, prefixes):
            await audited.wait()
            return await super().revisions(prefixes)

    async def waits(link):
        await reached(lambda: sink.fold.cursor() == at(2))
        await asyncio.sleep(20)
        assert link.state is LinkState.CATCHING_UP
        audited.set()
        await live(link)

    link = drive(sink, Held(), waits)
    assert sink.fed == [Fed({"k.1": b"b"}, set(), 2, ORIGIN, "")]
    assert [state for state, _ in link.states] == [
        LinkState.ATTACHING,
        LinkState.CATCHING_UP,
        LinkState.LIVE,
    ]


def test_an_upstream_that_cannot_be_audited_is_live_once_it_is_caught_up():
    upstream = filled(Plain, b"a", b"b")
    link = drive(holding(upstream, 1), upstream, live)
    assert link.stats().audits == 0


@pytest.mark.parametrize(("size", "good"), [(0, False), (1, True), (32, True), (33, False)])
def test_an_origin_has_1_to_32_bytes(size, good):
    upstream = filled(Scripted, b"a")
    upstream.origin = b"o" * size
    link = drive(MemorySink(), upstream, live if good else failed)
    assert isinstance(link.error, UpstreamRefused) is not good


def test_the_origin_of_a_mirror_of_prefixes_is_its_own():
    upstream, sink = filled(Scripted, b"a"), MemorySink()
    upstream.put("other", b"1")
    drive(sink, upstream, live, prefixes=("k.",))
    assert sink.entries == {"k.0": b"a"}
    assert sink.fold.origin[:16] == ORIGIN[:16]
    assert sink.fold.origin != ORIGIN


# Replacing.


def test_the_difference_to_another_incarnation_is_one_batch_and_told_as_a_rewind():
    old = filled(Scripted, b"same", b"old", b"gone")
    sink = holding(old, 3)
    upstream = filled(InPieces, b"same", b"new", b"x")
    upstream.delete("k.2")
    upstream.put("k.3", b"3")
    upstream.origin = REBORN

    async def timed(link):
        await live(link)
        assert asyncio.get_running_loop().time() >= attachment.CONFIRM_S
        assert not link._intake.accepted

    link = drive(sink, upstream, timed)
    reason = "the upstream was made anew since"
    assert sink.fed == [Fed({"k.1": b"new", "k.3": b"3"}, {"k.2"}, 5, REBORN, reason)]
    assert link.states[:2] == [(LinkState.ATTACHING, ""), (LinkState.CATCHING_UP, reason)]
    assert link.stats().resets == 1


def filled_short(kind):
    """An upstream that reaches back to its second change only."""

    class Short(kind):
        async def identify(self):
            return (await super().identify())._replace(first=at(2))

    return filled(Short, b"a", b"b", b"c")


def test_an_upstream_that_neither_reaches_back_nor_tells_its_state_is_refused():
    sink = MemorySink()
    link = drive(sink, filled_short(Plain), failed)
    assert isinstance(link.error, UpstreamRefused)
    assert "nor a state to send" in link.reason
    assert sink.fed == []


def test_an_upstream_that_no_longer_reaches_back_is_no_rewind():
    upstream = filled_short(Scripted)
    sink = holding(upstream, 1)

    async def timed(link):
        await live(link)
        assert asyncio.get_running_loop().time() < attachment.CONFIRM_S, "nothing to confirm"

    drive(sink, upstream, timed)
    assert sink.fed == [Fed({"k.1": b"b", "k.2": b"c"}, set(), 3, ORIGIN, "")]


def test_a_replacement_that_would_delete_most_keys_is_held_and_consent_serves_once():
    old = filled(Scripted, *[b""] * 200)
    sink = holding(old, 200)
    upstream = filled(Scripted, b"a")
    upstream.origin = REBORN

    async def accepted(link):
        await failed(link)
        assert (link.reason, len(sink.fold)) == ("199 of 200 keys would be deleted", 200)
        link.accept_reset()
        assert link.state is LinkState.ATTACHING
        await live(link)
        assert not link._intake.accepted

    drive(sink, upstream, accepted)
    assert sink.entries == {"k.0": b"a"}


def test_a_log_of_another_upstream_is_taken_over_only_with_consent():
    sink = MemorySink()
    sink.hold([Put("theirs", b"1")], at(5), b"o" * 24)
    upstream = filled(Scripted, b"a")

    async def accepted(link):
        await failed(link)
        assert isinstance(link.error, ResetHeld)
        assert sink.fed == []
        link.accept_reset()
        await live(link)

    drive(sink, upstream, accepted)
    assert sink.fed == [
        Fed({"k.0": b"a"}, {"theirs"}, 1, ORIGIN, "the log was fed by another upstream")
    ]


@pytest.mark.parametrize("kind", [Plain, Scripted])
def test_consent_to_a_reset_is_not_kept_for_another_one(kind):
    """The owner accepted a reset, which then was not needed. A later one found the consent."""
    upstream = filled(kind, b"a")
    sink, upstream.origin = holding(upstream), b"o" * 24

    async def accepted(link):
        await failed(link)
        upstream.origin = ORIGIN
        link.accept_reset()
        await live(link)
        assert not link._intake.accepted

    drive(sink, upstream, accepted)
    assert sink.fed == []


def test_a_rewind_that_a_second_look_does_not_confirm_is_not_carried_out():
    class Deposed(Scripted):
        looks = 0

        async def identify(self):
            self.looks += 1
            found = await super().identify()
            return found._replace(last=at(1)) if self.looks == 1 else found

    upstream = filled(Deposed, b"a", b"b")
    sink = holding(upstream, 2)
    link = drive(sink, upstream, live)
    assert (LinkState.LOST, "the upstream cannot confirm its identity") in link.states
    assert sink.fed == []
    assert link.stats().attaches == 2


# Marks.


def marked(sink_mark: bytes = b""):
    """An upstream with marks, and a sink that holds all of it, under a mark."""
    upstream = filled(Marked, b"a", b"b")
    sink = MemorySink()
    sink.hold(upstream.updates, at(2), ORIGIN + (sink_mark or upstream.mark(2)))
    return upstream, sink


def test_a_mark_that_the_upstream_knows_is_resumed_without_reading_values():
    upstream, sink = marked()

    async def no_state(prefixes):
        raise AssertionError("read values")
        yield

    upstream.state = no_state
    link = drive(sink, upstream, live)
    assert (sink.fed, link.stats().audits) == ([], 1)


def test_a_mark_that_the_upstream_does_not_know_is_a_restored_copy():
    upstream, sink = marked(b"m" * 8)
    link = drive(sink, upstream, live)
    reason = "the upstream was restored from a copy"
    assert [fed.rewound for fed in sink.fed] == [reason]
    assert (LinkState.CATCHING_UP, reason) in link.states
    assert sink.fold.origin == ORIGIN + upstream.mark(2)


@pytest.mark.parametrize("stored", [True, False])
def test_a_position_that_nothing_proves_is_marked_once_its_values_are_audited(stored):
    """Either the log holds no mark, or the upstream no longer knows the position."""
    upstream, sink = marked()
    sink.hold([Put("k.1", b"wrong", VersionToken.from_u64(2))], at(2), sink.fold.origin)
    if not stored:
        sink.hold([], at(2), ORIGIN)
    asked = []

    async def recalls(position, mark):
        asked.append((position, mark))
        return None if len(asked) == 1 else mark == upstream.mark(position.as_u64() or 0)

    upstream.recalls = recalls if stored else upstream.recalls
    link = drive(sink, upstream, live)
    assert sink.entries == {"k.0": b"a", "k.1": b"b"}
    assert link.stats().mended == 1
    assert not link._intake.in_doubt
    if stored:
        assert asked[0] == (at(2), upstream.mark(2))
        assert sink.fed[0].origin == ORIGIN, "no mark while in doubt"
        assert sink.fed[-1] == Fed({}, set(), 2, ORIGIN + upstream.mark(2), "")


# Letting go.


def test_an_upstream_that_ends_its_changes_is_attached_to_again():
    class Ends(Scripted):
        ended = 0

        async def changes(self, after, prefixes):
            async for piece in super().changes(after, prefixes):
                yield piece
                if not self.ended:
                    self.ended += 1
                    return

    upstream = filled(Ends, b"a")

    async def twice(link):
        await reached(lambda: link.stats().attaches == 2)
        await live(link)

    link = drive(MemorySink(), upstream, twice)
    assert (LinkState.LOST, "the upstream ended its changes") in link.states
    assert (LinkState.ATTACHING, "the upstream ended its changes") in link.states


def test_a_client_library_that_swallows_a_cancellation_is_cancelled_again():
    cancelled = []

    class Clings(Scripted):
        lost = False

        async def changes(self, after, prefixes):
            yield Changes([], after, 0)
            while len(cancelled) < 2:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append(asyncio.get_running_loop().time())
            raise asyncio.CancelledError

        async def revisions(self, prefixes):
            if not self.lost:
                self.lost = True
                raise UpstreamLost("the connection broke")
            return await super().revisions(prefixes)

    upstream = filled(Clings, b"a")

    async def again(link):
        await reached(lambda: link.stats().attaches == 2)

    link = drive(holding(upstream, 1), upstream, again)
    assert cancelled[1] - cancelled[0] == pytest.approx(0.5)
    assert (LinkState.LOST, "the connection broke") in link.states


@pytest.mark.parametrize("part", ["changes", "state"])
def test_what_is_being_read_is_closed_before_the_upstream_is_asked_again(part):
    events = []

    class Closes(InPieces):
        async def identify(self):
            events.append("identify")
            return await super().identify()

        async def changes(self, after, prefixes):
            try:
                async for piece in super().changes(after, prefixes):
                    yield piece
            finally:
                events.append("changes")

        async def state(self, prefixes):
            try:
                async for piece in super().state(prefixes):
                    yield piece
            finally:
                events.append("state")

    upstream = filled(Closes, b"a")

    def on_applied(updates, cursor):
        if events.count("identify") == 1 and (part == "state" or cursor == at(2)):
            raise RuntimeError("a hook fails while what it is told of is being read")

    async def twice(link):
        if part == "changes":
            await live(link)
            upstream.put("k.1", b"b")
        await reached(lambda: link.stats().attaches == 2)
        await live(link)

    drive(MemorySink(), upstream, twice, on_applied=on_applied)
    loaded = [] if part == "state" else ["state"]
    assert events[: len(loaded) + 3] == ["identify", *loaded, part, "identify"]


class Iterator:
    """What has only the methods of an asynchronous iterator."""

    def __init__(self, generator):
        self.generator = generator

    def __aiter__(self):
        return self

    def __anext__(self):
        return self.generator.__anext__()


def test_an_upstream_may_send_by_iterators_that_cannot_be_closed():
    class Iterating(Scripted):
        def changes(self, after, prefixes):
            return Iterator(super().changes(after, prefixes))

        def state(self, prefixes):
            return Iterator(super().state(prefixes))

    upstream, sink = filled(Iterating, b"a", b"b"), MemorySink()
    drive(sink, upstream, live)
    sink.hold([Delete("k.0")], at(2), ORIGIN)
    drive(sink, upstream, live)
    assert sink.entries == {"k.0": b"a", "k.1": b"b"}
