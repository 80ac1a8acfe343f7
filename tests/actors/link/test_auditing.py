"""Audits, one by one: what they correct, when, and what they leave alone."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import pytest
from counting import functions_of
from scripted_upstream import InPieces, Marked, Plain, Scripted, at, filled
from virtual_link import ORIGIN, Fed, MemorySink, drive, failed, holding, live, reached

from foldlog import Delete, KvEntry, LinkState, Purge, Put, VersionToken
from foldlog.actors.link import attachment, auditing
from foldlog.actors.link.auditing import _versions, version_and_value
from foldlog.actors.link.tail import Tail
from foldlog.protocol.updates import UpdateColumns, fold_versions
from foldlog.protocol.upstream import Revisions

pytestmark = pytest.mark.usefixtures("no_threads")


def version(number: int) -> VersionToken:
    return VersionToken.from_u64(number)


def upstream_and_sink(*values: bytes, kind=Scripted):
    """An upstream with k.0, k.1, ..., and a sink that holds all of it."""
    upstream = filled(kind, *values)
    return upstream, holding(upstream)


def spoil(sink, *updates) -> None:
    """Make the fold differ from the upstream, with no change that tells of it."""
    sink.hold(list(updates), sink.fold.cursor(), sink.fold.origin)


def test_only_an_upstream_with_a_state_and_revisions_can_be_audited():
    class State(Plain):
        state = Scripted.state

    class Listed(Plain):
        revisions = Scripted.revisions

    found = [auditing.can_audit(kind()) for kind in (Plain, State, Listed, Scripted)]
    assert found == [False, False, False, True]


def test_an_audit_corrects_what_is_missing_wrong_or_too_much_as_one_batch():
    upstream, sink = upstream_and_sink(b"a", b"b", b"c")
    spoil(sink, Delete("k.0"), Put("k.1", b"x", version(1)), Put("extra", b"", version(3)))

    async def corrected(link):
        await live(link)
        assert asyncio.get_running_loop().time() < 1, "what is corrected is checked at once"

    link = drive(sink, upstream, corrected)
    assert sink.fed == [Fed({"k.0": b"a", "k.1": b"b"}, {"extra"}, 3, ORIGIN, "")]
    assert (link.stats().mended, link.stats().resets, link.stats().audits) == (3, 0, 2)


def test_a_mirror_is_live_only_once_an_audit_finds_nothing_to_correct():
    class Asked(Scripted):
        asked = 0

        async def revisions(self, prefixes):
            self.asked += 1
            if self.asked == 2:
                await asyncio.Event().wait()
            return await super().revisions(prefixes)

    upstream, sink = upstream_and_sink(b"a", kind=Asked)
    spoil(sink, Delete("k.0"))

    async def waits(link):
        await reached(lambda: upstream.asked == 2)
        await asyncio.sleep(5)
        assert link.state is LinkState.CATCHING_UP

    drive(sink, upstream, waits)


def test_nothing_is_audited_while_more_is_waiting():
    class Unsure(Scripted):
        async def changes(self, after, prefixes):
            async for piece in super().changes(after, prefixes):
                yield piece._replace(behind=None)

    upstream, sink = upstream_and_sink(b"a", kind=Unsure)
    link = drive(sink, upstream, lambda link: asyncio.sleep(5))
    assert (link.state, link.stats().audits) == (LinkState.CATCHING_UP, 0)


def test_an_audit_that_finds_nothing_writes_nothing():
    upstream, sink = upstream_and_sink(b"a", b"b")
    link = drive(sink, upstream, live)
    assert (sink.fed, link.stats().mended, link.stats().audits) == ([], 0, 1)


@pytest.mark.parametrize(("held", "rewound"), [(1, False), (2, False), (3, True)])
def test_only_an_older_entry_than_the_one_that_is_held_is_told_as_a_rewind(held, rewound):
    upstream, sink = upstream_and_sink(b"a", b"b")
    if held == 2:
        held_version, upstream.updates[1] = version(2), Put("k.1", b"b", version(2))
        spoil(sink, Put("k.1", b"b", version(1)))
    else:
        held_version = version(held)
        spoil(sink, Put("k.1", b"x", held_version))
    drive(sink, upstream, live)
    assert [bool(fed.rewound) for fed in sink.fed] == [rewound]


@pytest.mark.parametrize(("cost_s", "audits"), [(0.0, 2), (1.0, 1)])
def test_audits_go_on_at_their_interval_and_within_their_budget(monkeypatch, cost_s, audits):
    upstream, sink = upstream_and_sink(b"a")
    spent_s = itertools.count(5.0, cost_s)
    clock = SimpleNamespace(monotonic=auditing.time.monotonic, thread_time=lambda: next(spent_s))
    monkeypatch.setattr(auditing, "time", clock)

    async def counted(link):
        await live(link)
        await asyncio.sleep(9)
        assert link.stats().audits == 1
        await asyncio.sleep(2)
        assert link.stats().audits == audits

    drive(sink, upstream, counted, audit_interval_s=10.0)


async def unread(prefixes):
    raise AssertionError("the state was read")
    yield


def test_keys_under_other_prefixes_are_not_missing():
    upstream, sink = upstream_and_sink(b"a", b"b")
    sink = MemorySink()
    drive(sink, upstream, live, prefixes=("k.1",))
    upstream.state = unread
    link = drive(sink, upstream, live, prefixes=("k.1",))
    assert (sink.entries, link.stats().mended) == ({"k.1": b"b"}, 0)


def test_with_a_parse_an_audit_compares_what_it_makes_of_the_state():
    def parse(update):
        if update.key == "k.0":
            return None
        return update._replace(key="copy." + update.key)

    upstream, sink = upstream_and_sink(b"a", b"b", b"c")
    sink = MemorySink()
    drive(sink, upstream, live, parse=parse)
    spoil(sink, Delete("copy.k.1"), Put("k.0", b"a", version(1)))
    link = drive(sink, upstream, live, parse=parse)
    assert sink.entries == {"copy.k.1": b"b", "copy.k.2": b"c"}
    assert link.stats().mended == 2


def test_a_state_whose_later_pieces_delete_is_compared_as_it_is_at_its_end():
    upstream, sink = upstream_and_sink(b"a", b"b", kind=InPieces)
    upstream.delete("k.0")
    sink.hold(upstream.updates[2:], at(3), ORIGIN)
    link = drive(sink, upstream, live, parse=lambda update: update)
    assert (sink.fed, link.stats().mended) == ([], 0)
    spoil(sink, Put("k.0", b"a", version(1)))
    link = drive(sink, upstream, live)
    assert (sink.entries, link.stats().mended) == ({"k.1": b"b"}, 1)


def test_a_state_of_no_pieces_is_that_of_an_upstream_without_keys():
    class Empty(Scripted):
        async def state(self, prefixes):
            for piece in ():
                yield piece

    upstream = filled(Empty, b"a")
    upstream.delete("k.0")
    sink = holding(upstream)
    spoil(sink, Put("gone", b""))
    drive(sink, upstream, live, parse=lambda update: update)
    assert sink.entries == {}


def test_a_state_that_an_audit_gives_up_is_closed_before_the_upstream_is_asked_again():
    events = []

    class Closes(InPieces):
        async def identify(self):
            events.append("identify")
            return await super().identify()

        async def state(self, prefixes):
            try:
                async for piece in super().state(prefixes):
                    yield piece
            finally:
                await asyncio.sleep(1)
                events.append("closed")

    def parse(update):
        if events == ["identify"]:
            raise RuntimeError("a hook fails while the state is read")
        return update

    upstream, sink = upstream_and_sink(b"a", b"b", kind=Closes)
    drive(sink, upstream, live, parse=parse)
    assert events[:3] == ["identify", "closed", "identify"]


def test_a_parse_that_is_not_pure_does_not_make_audits_spin():
    counted = iter(range(5, 100))

    def parse(update):
        return Put(update.key, b"%d" % next(counted), version(next(counted)))

    async def audited(link):
        await asyncio.sleep(50)
        assert link.stats().audits == 2

    upstream, sink = upstream_and_sink(b"a")
    drive(sink, upstream, audited, parse=parse)


def test_an_audit_that_would_delete_most_keys_is_held_and_consent_serves_once():
    upstream, sink = upstream_and_sink(b"a")
    spoil(sink, *[Put(f"old.{n}", b"") for n in range(200)])

    async def accepted(link):
        await failed(link)
        assert link.reason == "200 of 201 keys would be deleted"
        assert len(sink.fold) == 201
        link.accept_reset()
        await reached(lambda: len(sink.fold) == 1)
        assert not link._intake.accepted
        await live(link)

    drive(sink, upstream, accepted)


def test_what_is_rewritten_is_no_delete():
    upstream, sink = upstream_and_sink(*[b"a"] * 200)
    spoil(sink, *[Put(f"k.{n}", b"x", version(500)) for n in range(200)])
    link = drive(sink, upstream, live)
    assert link.stats().mended == 200


class Meanwhile(Scripted):
    """Something happens while the revisions of the first audit are being read."""

    asked = 0

    def meanwhile(self) -> None:
        raise NotImplementedError

    async def revisions(self, prefixes):
        found = await super().revisions(prefixes)
        self.asked += 1
        if self.asked == 1:
            self.meanwhile()
            await asyncio.sleep(1.0)
        return found


def test_keys_that_change_while_an_audit_reads_are_left_to_the_tail():
    class Changing(Meanwhile):
        def meanwhile(self):
            self.put("k.0", b"new")
            self.delete("k.1")
            self.put("k.3", b"new")

    upstream, sink = upstream_and_sink(b"a", b"b", b"c", kind=Changing)
    link = drive(sink, upstream, live)
    assert (link.stats().mended, link.stats().audits) == (0, 1)
    assert sink.entries == {"k.0": b"new", "k.2": b"c", "k.3": b"new"}


def test_a_key_that_changes_while_suspects_are_read_again_is_left_to_the_tail():
    """What was read is older than what the tail has brought since: watchers saw it go back."""

    class Changing(Scripted):
        async def state(self, prefixes):
            async for piece in super().state(prefixes):
                yield piece
            self.put("k.0", b"new")
            await asyncio.sleep(1.0)

    upstream, sink = upstream_and_sink(b"a", b"b", kind=Changing)
    spoil(sink, Delete("k.0"), Delete("k.1"))

    async def changed(link):
        await reached(lambda: link.stats().audits >= 1)

    drive(sink, upstream, changed)
    assert sink.fed == [
        Fed({"k.0": b"new"}, set(), 3, ORIGIN, ""),
        Fed({"k.1": b"b"}, set(), 3, ORIGIN, ""),
    ]


def test_a_key_that_changes_between_two_audits_is_audited_again():
    class Changing(Meanwhile):
        def meanwhile(self):
            self.put("k.0", b"new")

    upstream, sink = upstream_and_sink(b"a", kind=Changing)

    async def spoiled(link):
        await live(link)
        spoil(sink, Delete("k.0"))
        await reached(lambda: link.stats().audits == 3)
        assert link.stats().mended == 1

    drive(sink, upstream, spoiled, audit_interval_s=5.0)
    assert sink.entries == {"k.0": b"new"}


class HeldBack(Scripted):
    """It lets no change through until three seconds after it was `overtaken`."""

    held_back = True

    async def changes(self, after, prefixes):
        async for piece in super().changes(after, prefixes):
            while piece.updates and self.held_back:
                await asyncio.sleep(0.1)
            yield piece

    async def overtaken(self, key):
        """Something is written that an audit reads before the tail does."""
        self.put(key, b"new")
        asyncio.get_running_loop().call_later(3.0, self.__setattr__, "held_back", False)
        await asyncio.sleep(1.0)


def test_what_an_audit_has_seen_and_the_tail_has_yet_to_bring_is_not_missing():
    class Ahead(HeldBack):
        async def revisions(self, prefixes):
            await self.overtaken("k.9")
            return await super().revisions(prefixes)

    upstream, sink = upstream_and_sink(b"a", kind=Ahead)
    upstream.state = unread
    link = drive(sink, upstream, live)
    assert link.stats().mended == 0
    assert sink.fed == [Fed({"k.9": b"new"}, set(), 2, ORIGIN, "")]


def test_an_entry_that_is_newer_than_what_the_tail_has_brought_is_left_to_it():
    class Ahead(HeldBack):
        async def state(self, prefixes):
            await self.overtaken("k.0")
            async for piece in super().state(prefixes):
                yield piece

    upstream, sink = upstream_and_sink(b"a", kind=Ahead)
    spoil(sink, Delete("k.0"))
    drive(sink, upstream, live)
    assert sink.fed == [Fed({"k.0": b"new"}, set(), 2, ORIGIN, "")]


def test_a_position_that_no_change_leads_to_is_reached_once_the_tail_has_run_dry():
    class Past(Scripted):
        async def revisions(self, prefixes):
            return Revisions((await super().revisions(prefixes)).versions, at(99))

    upstream, sink = upstream_and_sink(b"a", kind=Past)
    spoil(sink, Delete("k.0"))
    drive(sink, upstream, live)
    assert sink.entries == {"k.0": b"a"}


def test_an_audit_needs_no_heartbeat_after_the_one_that_told_that_nothing_waits():
    class Quiet(Scripted):
        async def changes(self, after, prefixes):
            async for piece in super().changes(after, prefixes):
                yield piece
                await asyncio.Event().wait()

    upstream, sink = upstream_and_sink(b"a", kind=Quiet)
    drive(sink, upstream, live)


def test_between_audits_no_keys_are_noted(monkeypatch):
    tails = []
    monkeypatch.setattr(attachment, "Tail", lambda *parts: tails.append(Tail(*parts)) or tails[-1])
    upstream, sink = upstream_and_sink(b"a")
    drive(sink, upstream, live)
    assert tails[0].touched is None


def test_suspects_that_turn_out_right_are_not_written():
    class Wrong(Scripted):
        async def revisions(self, prefixes):
            found = await super().revisions(prefixes)
            return found._replace(versions={"k.0": b"wrong", "never": b"was"})

    upstream, sink = upstream_and_sink(b"a", b"b", kind=Wrong)
    link = drive(sink, upstream, live)
    assert (sink.fed, link.stats().mended, link.stats().audits) == ([], 0, 1)


def test_a_large_fold_is_compared_whole_and_lets_the_loop_run(monkeypatch):
    monkeypatch.setattr(auditing, "BLOCKS", 3)
    slept = []

    async def sleep(delay_s):
        slept.append(delay_s)
        await asyncio.sleep(delay_s)

    monkeypatch.setattr(auditing, "asyncio", SimpleNamespace(sleep=sleep))
    upstream, sink = upstream_and_sink(*[b"a"] * 3000)
    spoil(sink, Delete("k.0"), Delete("k.2999"), Put("zz", b""))
    pauses = len(list(sink.fold.blocks())) // 3
    link = drive(sink, upstream, live)
    assert (link.stats().mended, link.stats().audits) == (3, 2)
    assert pauses > 1
    assert slept.count(0.0) == 2 * (1 + pauses)


def test_an_upstream_that_no_longer_knows_its_mark_at_an_audit_is_let_go_of():
    upstream, sink = upstream_and_sink(b"a", kind=Marked)
    sink.hold([], at(1), ORIGIN + upstream.mark(1))

    async def rewound(link):
        await live(link)
        upstream.updates[0], upstream.past = Put("k.0", b"other", version(1)), b"2"
        await reached(lambda: link.state is LinkState.LOST)
        assert link.reason == "the upstream no longer knows the position"
        await live(link)
        assert link.stats().resets == 1
        assert sink.entries == {"k.0": b"other"}

    drive(sink, upstream, rewound, audit_interval_s=5.0)


def test_a_mark_that_the_upstream_can_no_longer_tell_is_no_doubt_at_an_audit():
    upstream, sink = upstream_and_sink(b"a", kind=Marked)
    sink.hold([], at(1), ORIGIN + upstream.mark(1))

    async def forgotten(link):
        await live(link)

        async def recalls(position, mark):
            return None

        upstream.recalls = recalls
        await reached(lambda: link.stats().audits == 3)
        assert link.stats().attaches == 1

    drive(sink, upstream, forgotten, audit_interval_s=5.0)


def test_a_log_that_keeps_no_marks_is_audited_by_values_and_gets_none():
    upstream, sink = upstream_and_sink(b"a", kind=Marked)
    spoil(sink, Put("k.0", b"x", version(1)))
    sink.keeps_marks = False
    link = drive(sink, upstream, lambda link: asyncio.sleep(12), audit_interval_s=5.0)
    assert sink.fed == [Fed({"k.0": b"a"}, set(), 1, ORIGIN, "")]
    assert not link._intake.in_doubt
    assert (link.stats().audits, link.stats().attaches) == (4, 1)


def test_an_upstream_that_marks_what_it_sends_need_not_recall_it():
    class Forgetful(Scripted):
        past = Marked.past
        mark = Marked.mark

    upstream, sink = upstream_and_sink(b"a", kind=Forgetful)
    sink.hold([], at(1), ORIGIN + upstream.mark(1))
    drive(sink, upstream, live)
    assert (sink.fed, sink.restarts) == ([], [])


# What an audit makes of versions.

VERSIONS = [VersionToken.from_u64(number) for number in range(9)]
ENTRIES = [KvEntry(f"k.{at}", b"v", version) for at, version in enumerate(VERSIONS)]
with_and_without_values = pytest.mark.parametrize("with_values", [False, True])


def mark(with_values):
    return version_and_value if with_values else None


@with_and_without_values
def test_an_audit_makes_no_token_of_a_version(with_values):
    """Half of its calls made one, only to compare it."""
    columns = UpdateColumns(
        [entry.key for entry in ENTRIES],
        [entry.value for entry in ENTRIES],
        [bytes(entry.version) for entry in ENTRIES],
    )
    found: dict[str, bytes] = {}
    called = functions_of(fold_versions, found, columns, mark(with_values))
    called += functions_of(_versions, ENTRIES, with_values)
    assert not any("Token" in name or "KvEntry" in name for name in called)
    assert list(found.values()) == _versions(ENTRIES, with_values)


@with_and_without_values
@pytest.mark.parametrize(
    ("updates", "live"),
    [
        ([Put("a", b"1", VERSIONS[1]), Put("a", b"2", VERSIONS[2])], {"old", "a"}),
        ([Put("a", b"1", VERSIONS[1]), Delete("a", VERSIONS[2])], {"old"}),
        ([Delete("old", VERSIONS[1]), Put("a", b"1", VERSIONS[2])], {"a"}),
        ([Purge("a", VERSIONS[1]), Put("a", b"1", VERSIONS[2])], {"old", "a"}),
    ],
)
def test_the_versions_of_columns_are_those_of_their_updates(updates, live, with_values):
    values = [
        update.value if type(update) is Put else None if type(update) is Delete else False
        for update in updates
    ]
    columns = UpdateColumns(
        [update.key for update in updates], values, [bytes(update.version) for update in updates]
    )
    found, expected = {"old": b"0"}, {"old": b"0"}
    fold_versions(found, columns, mark(with_values))
    fold_versions(expected, updates, mark(with_values))
    assert found == expected
    assert found.keys() == live
