"""Another foldlog log as an upstream: rewritten, replaced, missing, or of the other format."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from upstream_kit import DEADLINE_S, mirrored, until

import foldlog
from foldlog import Changed, Delete, FollowerState, LinkState, Put, Synced, WatchCursor
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
        mirrored(path, LogFile(source)).close()
    source.unlink()
    with foldlog.open(source) as store:
        for number in range(3):
            store.put(f"new.{number}", b"1")
        with mirrored(path, LogFile(source)) as mirror:
            assert equal(mirror, store)
            assert mirror.stats().link.resets == 1


def test_a_batch_is_mirrored_whole_and_its_entries_keep_their_versions(tmp_path, path):
    with foldlog.open(tmp_path / "a.log") as store:
        store.put("gone", b"")
        with mirrored(path, LogFile(tmp_path / "a.log")) as mirror:
            seq = mirror.snapshot().seq
            updates = [Put(f"k{n}", b"", foldlog.VersionToken.from_u64(n)) for n in range(2500)]
            store.apply([*updates, Delete("gone")], WatchCursor.from_u64(9))
            until(lambda: len(mirror) == 2500)
            assert equal(mirror, store)
            assert mirror.snapshot().seq == seq + 1


def test_compactions_of_the_source_lose_nothing(tmp_path, path):
    with (
        foldlog.open(tmp_path / "a.log") as store,
        mirrored(path, LogFile(tmp_path / "a.log")) as mirror,
    ):
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


# The changes, piece by piece. The test is the follower.


class Watched:
    """In the place of a follower and of its watch: tells `events` in turn, and then nothing."""

    def __init__(self, *events) -> None:
        self.events, self.ended = list(events), None
        self.state, self.reason = FollowerState.FOLLOWING, ""
        self.is_open = False
        self.fold = foldlog.FoldSnapshot.empty()
        self.waits_s = []

    def snapshot(self):
        return self.fold

    def stats(self):
        return SimpleNamespace(reason=self.reason)

    def watch(self, since):
        return self

    def __enter__(self):
        self.is_open = True
        return self

    def __exit__(self, *_):
        self.is_open = False

    def next(self, timeout_s):
        self.waits_s.append(timeout_s)
        return self.events.pop(0) if self.events else None


def changed(seq, *keys, value=b"v"):
    return [Changed(Put(key, value), WatchCursor.none(), seq) for key in keys]


def pieces_of(watched, count):
    """The first pieces of the live changes, as (keys, position, behind)."""
    source = LogFile("a.log")
    source._follower = watched

    async def collect():
        changes = source._live(watched, watched.snapshot())
        try:
            return [await anext(changes) for _ in range(count)]
        finally:
            await changes.aclose()
            assert not watched.is_open

    return [
        ([update.key for update in piece.updates], piece.position.as_u64(), piece.behind)
        for piece in asyncio.run(collect())
    ]


def test_what_comes_together_is_one_piece_and_silence_is_a_heartbeat():
    watched = Watched(*changed(1, "a"), *changed(2, "b", "c"))
    assert pieces_of(watched, 3) == [(["a", "b", "c"], 2, 0), ([], 2, 0), ([], 2, 0)]
    assert watched.waits_s == [0.0] * 4 + [log_file.LOOK_S, 0.0, log_file.LOOK_S]


@pytest.mark.parametrize(("limit", "size"), [("PIECE_UPDATES", 3), ("PIECE_BYTES", 30)])
def test_a_piece_that_is_full_ends_with_its_batch(monkeypatch, limit, size):
    monkeypatch.setattr(log_file, limit, size)
    batches = [("a", "b"), ("c", "d", "e"), ("f", "g"), ("h",)]
    events = [
        event
        for seq, keys in enumerate(batches, 1)
        for event in changed(seq, *keys, value=b"v" * 10)
    ]
    assert pieces_of(Watched(*events), 3) == [
        (["a", "b", "c", "d", "e"], 2, None),
        (["f", "g", "h"], 4, 0),
        ([], 4, 0),
    ]


def test_deletes_count_as_updates_and_take_no_bytes(monkeypatch):
    monkeypatch.setattr(log_file, "PIECE_BYTES", 1)
    deletes = [Changed(Delete(key), WatchCursor.none(), seq) for seq, key in ((1, "a"), (2, "b"))]
    assert pieces_of(Watched(*deletes), 1) == [(["a", "b"], 2, 0)]


def test_a_state_that_is_synced_moves_the_position_and_never_back():
    watched = Watched(Synced(WatchCursor.none(), 5))
    assert pieces_of(watched, 1) == [([], 5, 0)]
    watched = Watched(*changed(7, "a"), Synced(WatchCursor.none(), 5))
    assert pieces_of(watched, 2) == [(["a"], 7, 0), ([], 7, 0)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda watched: watched.events.append(foldlog.Lagged(WatchCursor.none(), 3)), "Lagged"),
        (lambda watched: setattr(watched, "ended", "the file was replaced"), "was replaced"),
        (lambda watched: setattr(watched, "state", FollowerState.WAITING), "is waiting: torn"),
    ],
)
def test_a_follower_that_misses_something_or_ends_is_lost(change, reason):
    watched = Watched()
    watched.reason = "torn"
    change(watched)
    with pytest.raises(foldlog.UpstreamLost, match=reason):
        pieces_of(watched, 1)


def test_the_backlog_comes_in_pieces_of_whole_batches_that_say_how_many_are_left(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(log_file, "PIECE_UPDATES", 4)
    with foldlog.open(tmp_path / "a.log") as store:
        for number in range(1, 6):
            store.apply([Put(f"k.{number}", b""), Put("k", b"")], WatchCursor.from_u64(number))
        source = LogFile(tmp_path / "a.log")

        async def collect(after, count):
            await source.identify()
            changes = source.changes(after, ())
            try:
                return [await anext(changes) for _ in range(count)]
            finally:
                await changes.aclose()
                await source.close()

        pieces = asyncio.run(collect(WatchCursor.none(), 3))
        assert [(len(p.updates), p.position.as_u64(), p.behind) for p in pieces] == [
            (4, 2, 3),
            (4, 4, 1),
            (2, 5, 0),
        ]
        (piece,) = asyncio.run(collect(WatchCursor.from_u64(5), 1))
        assert (piece.updates, piece.position.as_u64(), piece.behind) == ([], 5, 0)
        with pytest.raises(foldlog.UpstreamLost, match="ends at batch 5, before 6"):
            asyncio.run(collect(WatchCursor.from_u64(6), 1))
        store.compact()
        with pytest.raises(foldlog.UpstreamLost, match="does not reach back to batch 2"):
            asyncio.run(collect(WatchCursor.from_u64(2), 1))


def test_a_source_that_is_not_identified_is_not_followed():
    source = LogFile("a.log")
    with pytest.raises(foldlog.UpstreamLost, match="is not followed"):
        source._following()
    asyncio.run(source.close())


def test_a_follower_that_is_opened_as_the_link_is_cancelled_is_closed(tmp_path, monkeypatch):
    async def cancelled(call):
        call()
        raise asyncio.CancelledError

    opened = []
    monkeypatch.setattr(log_file, "follow", lambda path: opened.append(follow(path)) or opened[-1])
    monkeypatch.setattr(log_file, "asyncio", SimpleNamespace(to_thread=cancelled))
    foldlog.open(tmp_path / "a.log").close()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(LogFile(tmp_path / "a.log").identify())
    assert [follower.state for follower in opened] == [FollowerState.CLOSED]


def test_a_log_is_known_by_its_path_and_id_and_a_follower_that_is_not_there_yet_is_lost(tmp_path):
    path = tmp_path / "a.log"
    with foldlog.open(path) as store:
        store.put("k", b"")
        store.compact()
        fold = store.snapshot()
    source, watched = LogFile(path), Watched()
    with pytest.raises(foldlog.UpstreamLost, match="the follower is following"):
        source._identify(watched)  # the header is newer
    watched.fold = fold
    found = source._identify(watched)
    name = hashlib.blake2b(b"log\0" + os.fsencode(path), digest_size=16).digest()
    assert (found.origin[:16], found.first.as_u64(), found.last.as_u64()) == (name, 1, 1)
    watched.state = FollowerState.WAITING
    with pytest.raises(foldlog.UpstreamLost, match="the follower is waiting"):
        source._identify(watched)


BROKEN = foldlog.CorruptLogError(Path("a.log"), 7, "broken")


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (FileNotFoundError(2, "No such file"), foldlog.UpstreamMissing, "does not exist"),
        (OSError(5, "Input/output error"), foldlog.UpstreamLost, r"a\.log: Input/output error$"),
        (OSError("odd"), foldlog.UpstreamLost, r"a\.log: odd$"),
        (BROKEN, foldlog.UpstreamLost, "broken"),
    ],
)
def test_what_goes_wrong_is_told_as_the_link_expects_it(error, kind, reason):
    with pytest.raises(foldlog.UpstreamError, match=reason) as caught, LogFile("a.log")._told():
        raise error
    assert type(caught.value) is kind


@pytest.mark.parametrize("error", [BROKEN, OSError(5, "broken")])
@pytest.mark.parametrize("part", ["changes", "state"])
def test_a_log_that_breaks_while_it_is_read_is_lost(monkeypatch, part, error):
    def broken(*arguments):
        raise error
        yield

    async def read():
        source = LogFile("a.log")
        source._follower = watched = Watched()
        watched.fold = SimpleNamespace(seq=1, blocks=broken)
        pieces = source.state(()) if part == "state" else source.changes(WatchCursor.none(), ())
        return [piece async for piece in pieces]

    monkeypatch.setattr(log_file, "batches_after_seq", broken)
    with pytest.raises(foldlog.UpstreamLost, match="broken"):
        asyncio.run(read())
