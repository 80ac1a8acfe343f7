"""What a link gives to its store: entries over the limits, and what a parse returns."""

from __future__ import annotations

import asyncio

import pytest
from scripted_upstream import Plain, Scripted, at, filled
from virtual_link import MemorySink, drive, failed, holding, live, reached

from foldlog import Purge, UpstreamOversize
from foldlog.protocol.updates import MAX_KEY_BYTES, MAX_VALUE_BYTES
from foldlog.protocol.upstream import Changes

LARGE = bytes(MAX_VALUE_BYTES + 1)


@pytest.mark.parametrize(("key", "value"), [("k", LARGE), ("k" * (MAX_KEY_BYTES + 1), b"")])
def test_an_entry_over_the_limits_fails_the_link_unless_such_are_skipped(key, value):
    upstream, sink = Scripted(), MemorySink()
    upstream.put(key, value)
    link = drive(sink, upstream, failed)
    assert isinstance(link.error, UpstreamOversize)
    assert (link.error.key, sink.fed) == (key, [])


def test_a_key_that_is_skipped_takes_its_old_value_along_and_is_not_mended():
    """The old value is not the upstream's any more. Each audit found the skipped key missing."""
    upstream = filled(Scripted, b"small", b"1")
    sink = holding(upstream)

    async def skipped(link):
        await live(link)
        upstream.put("k.0", LARGE)
        await reached(lambda: sink.entries == {"k.1": b"1"})
        audits = link.stats().audits
        await reached(lambda: link.stats().audits > audits + 3)

    link = drive(sink, upstream, skipped, skip_oversize=True, audit_interval_s=1.0)
    assert (link.stats().mended, link.stats().skipped, link.stats().attaches) == (0, 1, 1)


def test_a_skipped_key_is_no_longer_skipped_once_its_value_fits():
    upstream, sink = Scripted(), MemorySink()
    upstream.put("k", LARGE)
    upstream.put("l", LARGE)

    async def fits(link):
        await live(link)
        assert link.stats().skipped == 2
        upstream.put("k", b"small now")
        await reached(lambda: sink.entries == {"k": b"small now"})
        assert (link.stats().skipped, set(link._intake.skipped)) == (1, {"l"})

    drive(sink, upstream, fits, skip_oversize=True)


LONG = "k" * (MAX_KEY_BYTES + 1)


def test_a_key_over_the_limit_is_told_as_such():
    """The reason named the size of its value, which was not at fault."""
    upstream, sink = Scripted(), MemorySink()
    upstream.put(LONG, b"1")
    link = drive(sink, upstream, failed)
    assert isinstance(link.error, UpstreamOversize)
    assert link.error.key == LONG
    assert f"cannot be held: it takes {len(LONG)} bytes" in link.reason


def test_the_delete_of_a_key_that_could_never_be_held_is_no_failure():
    """It failed the link for good, after the key had been deleted upstream as the docs ask."""
    upstream, sink = Scripted(), MemorySink()
    upstream.put("k", b"1")
    sink.hold(upstream.updates, at(1), upstream.origin)
    upstream.delete(LONG)
    link = drive(sink, upstream, live)
    assert (sink.entries, sink.fed[-1].position, link.stats().skipped) == ({"k": b"1"}, 2, 0)


def test_the_last_write_of_a_batch_decides_what_counts_as_skipped():
    """The one that fits came first, and the key was audited for ever."""

    class AtOnce(Plain):
        async def changes(self, after, prefixes):
            yield Changes(self.updates, at(len(self.updates)), 0)
            await asyncio.sleep(1e6)

    upstream, sink = AtOnce(), MemorySink()
    for key, value in (("k", b"small"), ("k", LARGE), ("l", LARGE), ("l", b"small"), ("m", LARGE)):
        upstream.put(key, value)
    upstream.delete("m")
    link = drive(sink, upstream, live, skip_oversize=True)
    assert sink.entries == {"l": b"small"}
    assert (link.stats().skipped, set(link._intake.skipped)) == (1, {"k"})


@pytest.mark.parametrize("many", [False, True])
def test_a_parse_may_make_a_purge_of_an_update(many):
    def parse(update):
        purge = Purge(update.key, update.version)
        return [purge] if many else purge

    upstream, sink = Scripted(), MemorySink()
    upstream.put("k", b"1")
    link = drive(sink, upstream, live, parse=parse)
    assert (sink.entries, sink.restarts, link.stats().updates) == ({}, [], 1)


@pytest.mark.parametrize("error", [OSError(28, "no space left"), SystemExit(3), MemoryError()])
def test_a_parse_that_is_a_generator_and_fails_is_the_hooks_failure(error):
    """An OSError of its body passed for a lost connection, for ever: only the call was watched."""

    def parse(update):
        yield update
        raise error

    upstream, sink = Scripted(), MemorySink()
    upstream.put("k", b"1")
    link = drive(sink, upstream, failed, parse=parse, max_restarts=1)
    assert link.error is not None
    assert type(error).__name__ in sink.restarts[-1].reason
    assert sink.entries == {}
