"""Another foldlog log as an upstream: rewritten, replaced, missing, or of the other format."""

from __future__ import annotations

import os
import threading

import pytest
from upstream_kit import DEADLINE_S, until

import foldlog
from foldlog import Delete, FollowerState, LinkState, Put, WatchCursor
from foldlog.follow import follow
from foldlog.upstreams import LogFile, log_file


def equal(mirror, store) -> bool:
    return mirror.snapshot().range() == store.snapshot().range()


def test_a_log_that_comes_to_be_later_is_waited_for(tmp_path, path):
    with foldlog.mirror(path, LogFile(tmp_path / "later.log")) as mirror:
        until(lambda: "does not exist" in mirror.link.reason)
        with foldlog.open(tmp_path / "later.log") as store:
            store.put("k", b"1")
            mirror.wait_synced(30)
            assert equal(mirror, store)


def test_a_log_that_another_took_the_place_of_is_told_as_the_difference(tmp_path, path):
    source = tmp_path / "a.log"
    with foldlog.open(source) as store:
        store.put("old", b"1")
        with foldlog.mirror(path, LogFile(source)) as mirror:
            mirror.wait_synced(30)
    source.unlink()
    with foldlog.open(source) as store:
        for number in range(3):
            store.put(f"new.{number}", b"1")
        with foldlog.mirror(path, LogFile(source)) as mirror:
            mirror.wait_synced(30)
            assert equal(mirror, store)
            assert mirror.stats().link.resets == 1


def test_a_batch_is_mirrored_whole_and_its_entries_keep_their_versions(tmp_path, path):
    with foldlog.open(tmp_path / "a.log") as store:
        store.put("gone", b"")
        with foldlog.mirror(path, LogFile(tmp_path / "a.log")) as mirror:
            mirror.wait_synced(30)
            seq = mirror.snapshot().seq
            updates = [Put(f"k{n}", b"", foldlog.VersionToken.from_u64(n)) for n in range(2500)]
            store.apply([*updates, Delete("gone")], WatchCursor.from_u64(9))
            until(lambda: len(mirror) == 2500)
            assert equal(mirror, store)
            assert mirror.snapshot().seq == seq + 1


def test_compactions_of_the_source_lose_nothing(tmp_path, path):
    with (
        foldlog.open(tmp_path / "a.log") as store,
        foldlog.mirror(path, LogFile(tmp_path / "a.log")) as mirror,
    ):
        mirror.wait_synced(30)
        for number in range(20):
            store.put(f"k{number % 7}", b"%d" % number)
            if number % 5 == 4:
                store.delete(f"k{number % 7}")
                store.compact()
        until(lambda: equal(mirror, store))
        mirror.wait_synced(30)


@pytest.mark.parametrize("kind", ["directory", "slipstream-v2"])
def test_a_source_that_cannot_be_followed_is_refused_by_its_name(tmp_path, path, kind):
    """A mirror of a directory tried again for ever, and told an errno. That of a log of the Rust
    crate was refused for its magic, where `tail` names the format."""
    source = tmp_path / "source"
    if kind == "directory":
        source.mkdir()
    else:
        foldlog.open(source, format=kind).close()
    with foldlog.mirror(path, LogFile(source)) as mirror:
        with pytest.raises(foldlog.UpstreamRefused, match=kind):
            mirror.wait_synced(30)
        assert mirror.link.state is LinkState.FAILED


def test_a_source_that_cannot_be_opened_is_told_without_an_errno(tmp_path, path):
    source = tmp_path / "source"
    os.mkfifo(source)
    with foldlog.mirror(path, LogFile(source)) as mirror:
        until(lambda: mirror.link.reason)
        assert mirror.link.reason == f"{source}: not a regular file"


def test_a_mirror_of_a_mirror_is_exact(tmp_path, path):
    with foldlog.open(tmp_path / "a.log") as store:
        store.put("k", b"1")
        with (
            foldlog.mirror(tmp_path / "b.log", LogFile(tmp_path / "a.log")) as first,
            foldlog.mirror(path, LogFile(tmp_path / "b.log")) as second,
        ):
            first.wait_synced(30)
            second.wait_synced(30)
            store.delete("k")
            store.put("l", b"2")
            until(lambda: equal(second, store))


def test_what_is_no_upstream_and_no_option_is_refused_before_anything_is_opened(path):
    with pytest.raises(TypeError, match="is not an upstream"):
        foldlog.mirror(path, object())
    upstream = LogFile("a.log")
    for wrong in (
        {"on_oversize": "drop"},
        {"mass_delete": 2},
        {"audit_interval_s": 0},
        {"prefix": []},
    ):
        with pytest.raises(ValueError, match=r"is|prefixes selects nothing"):
            foldlog.mirror(path, upstream, **wrong)
    assert not path.exists()


def test_a_mirror_that_is_dropped_lets_go_of_log_and_link(tmp_path, path):
    import gc

    with foldlog.open(tmp_path / "a.log"):
        held = [foldlog.mirror(path, LogFile(tmp_path / "a.log"))]
        held[0].wait_synced(30)
        thread = held[0].link.thread
        with pytest.warns(ResourceWarning, match="dropped"):
            held.clear()
        gc.collect()
        until(lambda: not thread.is_alive())
        until(lambda: _opens(path))


def _opens(path) -> bool:
    try:
        foldlog.open(path).close()
    except foldlog.StoreLocked:
        return False
    return True


def test_a_mirror_that_is_closed_while_it_opens_its_source_leaves_no_follower(
    tmp_path, path, monkeypatch
):
    """The follower was kept by the upstream after the link had let go of it, and its thread stayed
    as long as the upstream."""
    begun, go = threading.Event(), threading.Event()
    opened = []

    def slow(source):
        begun.set()
        assert go.wait(DEADLINE_S)
        follower = follow(source)
        opened.append(follower)
        return follower

    monkeypatch.setattr(log_file, "follow", slow)
    source = LogFile(tmp_path / "a.log")
    foldlog.open(tmp_path / "a.log").close()
    with foldlog.mirror(path, source):
        assert begun.wait(DEADLINE_S)
        # The link is told to stop while its source is being opened.
        threading.Timer(0.0, go.set).start()
    until(lambda: opened and opened[0].state is FollowerState.CLOSED)
    assert source._follower is None
