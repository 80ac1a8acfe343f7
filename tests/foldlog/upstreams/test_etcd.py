"""etcd, a real one: several changes at one revision, compaction, and what it is given wrongly."""

from __future__ import annotations

import pytest
import servers
from upstream_kit import mirrored, same, until

import foldlog
from foldlog import LinkState
from foldlog.upstreams import Etcd


@pytest.fixture
def source(etcd):
    return etcd


def test_changes_of_one_revision_are_one_batch(source, path):
    """A cursor in the middle of a revision would lose the rest of it."""
    with mirrored(path, source.upstream()) as mirror:
        seq, cursor = mirror.snapshot().seq, mirror.cursor().as_u64()
        source.put_together({f"together.{number}": b"1" for number in range(50)})
        until(lambda: "together.0" in mirror)
        assert same(mirror, source)
        assert mirror.snapshot().seq == seq + 1
        assert mirror.cursor().as_u64() > cursor
        versions = {entry.version for entry in mirror.range("together.")}
        assert len(versions) == 1


def test_a_compaction_past_the_cursor_is_told_as_the_difference(source, path):
    source.put("kept", b"1")
    source.put("goes", b"1")
    mirrored(path, source.upstream()).close()
    source.delete("goes")
    source.put("kept", b"2")
    source.forget()
    with mirrored(path, source.upstream()) as mirror:
        assert same(mirror, source)
        assert "goes" not in mirror
        assert mirror.stats().link.resets == 1


def test_many_keys_are_read_page_by_page_at_one_revision(source, path, monkeypatch):
    from foldlog.upstreams import etcd

    monkeypatch.setattr(etcd, "PAGE_KEYS", 7)
    source.put_together({f"page.{number:02}": b"v" for number in range(50)})
    upstream = Etcd(f"http://127.0.0.1:{source.server.port}", prefix="page.")
    with mirrored(path, upstream) as mirror:
        assert len(mirror) == 50
        source.delete("page.07")
        source.put("other", b"")
        until(lambda: len(mirror) == 49)


@pytest.mark.parametrize("url", ["", "127.0.0.1:2379", "etcd://h:1", "http://", "http://h:port"])
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(ValueError, match="an address"):
        Etcd(url)


def test_an_address_where_nobody_listens_is_told_and_no_secret_with_it(path):
    upstream = Etcd(f"http://u:s3cret@127.0.0.1:{servers.free_port()}")
    with foldlog.mirror(path, upstream) as mirror:
        until(lambda: mirror.link.state is LinkState.LOST)
        assert "s3cret" not in mirror.link.reason + repr(upstream) + repr(mirror)


def test_refused_credentials_fail_at_once(source, path):
    upstream = Etcd(f"http://127.0.0.1:{source.server.port}", user="u", password="wrong")
    with foldlog.mirror(path, upstream) as mirror:
        with pytest.raises(foldlog.UpstreamRefused):
            mirror.wait_synced(30)
        assert mirror.link.state is LinkState.FAILED
