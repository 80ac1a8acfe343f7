"""What a link gives to its store: entries over the limits, and what a parse returns."""

from __future__ import annotations

import pytest
from scripted_upstream import Scripted
from virtual_link import MemorySink, drive, failed, live, reached

from foldlog import Purge, UpstreamOversize
from foldlog.protocol.updates import MAX_VALUE_BYTES

LARGE = bytes(MAX_VALUE_BYTES + 1)


def test_an_entry_over_the_limits_fails_the_link_unless_such_are_skipped():
    upstream, sink = Scripted(), MemorySink()
    upstream.put("k", LARGE)
    link = drive(sink, upstream, failed)
    assert isinstance(link.error, UpstreamOversize)
    assert (link.error.key, sink.fed) == ("k", [])


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


@pytest.mark.parametrize("many", [False, True])
def test_a_parse_may_make_a_purge_of_an_update(many):
    def parse(update):
        purge = Purge(update.key, update.version)
        return [purge] if many else purge

    upstream, sink = Scripted(), MemorySink()
    upstream.put("k", b"1")
    link = drive(sink, upstream, live, parse=parse)
    assert (sink.entries, sink.restarts, link.stats().updates) == ({}, [], 1)
