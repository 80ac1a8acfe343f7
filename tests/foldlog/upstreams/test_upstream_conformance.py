"""What every upstream must do for its mirror, NATS, etcd and another log alike, against real
servers."""

from __future__ import annotations

from functools import partial

import pytest
import servers
from upstream_kit import LogSource, NatsSource, mirrored, opened, same, until

import foldlog
from foldlog import Changed, Delete, LinkState, MirrorReadOnly, Put, Synced, WatchCursor


@pytest.fixture(params=["etcd", "log", "nats", *(f"nats of {leg}" for leg in servers.NATS_LEGS)])
def source(request, tmp_path):
    if request.param == "etcd":
        yield request.getfixturevalue("etcd")
    else:
        leg = request.param.partition(" of ")[2]
        kind = LogSource if request.param == "log" else partial(NatsSource, leg=leg)
        with opened(kind(tmp_path / "upstream")) as source:
            yield source


def test_a_mirror_holds_what_its_upstream_does_and_keeps_up(source, path):
    for number in range(20):
        source.put(f"k.{number}", b"%d" % number)
    source.delete("k.3")
    with foldlog.mirror(path, source.upstream()) as mirror:
        assert mirror.wait_synced(timeout_s=30)
        assert same(mirror, source)
        assert len(mirror) == 19
        assert (mirror.lag(), mirror.link.state) == (0, LinkState.LIVE)
        assert mirror.staleness_s < 30
        source.put("k.5", b"new")
        source.delete("k.6")
        until(lambda: same(mirror, source))
        assert mirror.stats().link.state is LinkState.LIVE


def test_watchers_of_a_mirror_are_told_each_change_in_order(source, path):
    source.put("k", b"0")
    with mirrored(path, source.upstream()) as mirror:
        watch = mirror.watch(since=mirror.snapshot())
        assert isinstance(watch.next(30), Synced)
        source.put("a", b"1")
        source.put("b", b"2")
        source.delete("k")
        told = [watch.next(30) for _ in range(3)]
    assert all(isinstance(event, Changed) for event in told)
    assert [getattr(event.update, "value", None) for event in told] == [b"1", b"2", None]


def test_what_was_missed_while_away_is_told_from_the_cursor_on(source, path):
    source.put("kept", b"1")
    source.put("gone", b"1")
    with mirrored(path, source.upstream()) as mirror:
        cursor = mirror.cursor()
    source.delete("gone")
    source.put("new", b"2")
    with mirrored(path, source.upstream()) as mirror:
        assert same(mirror, source)
        assert mirror.cursor() > cursor
        assert mirror.stats().link.resets == 0


def test_deletes_that_the_upstream_has_forgotten_are_found(source, path):
    """A delete while the client was away, and then the upstream drops its history: no change tells
    of it any more, and the rule that the first position is not past the cursor says that resuming
    is sound."""
    for number in range(9):
        source.put(f"k.{number}", b"")
    mirrored(path, source.upstream()).close()
    source.delete("k.4")
    source.forget()
    source.put("k.5", b"1")
    with mirrored(path, source.upstream()) as mirror:
        assert same(mirror, source)
        assert "k.4" not in mirror


def test_a_killed_upstream_is_attached_to_again_and_reads_go_on(source, path):
    source.put("k", b"1")
    with mirrored(path, source.upstream()) as mirror:
        source.kill()
        assert mirror.get("k").value == b"1"
        source.put("k", b"2")
        until(lambda: mirror.get("k").value == b"2")
        mirror.wait_synced(30)
        assert same(mirror, source)


def test_local_writes_to_a_mirror_are_refused(source, path):
    with mirrored(path, source.upstream()) as mirror:
        seq = mirror.snapshot().seq
        for write in (
            lambda: mirror.put("k", b""),
            lambda: mirror.create("k", b""),
            lambda: mirror.update("k", b"", expected=foldlog.VersionToken.unknown()),
            lambda: mirror.delete("k"),
            lambda: mirror.apply([], WatchCursor.none()),
            lambda: mirror.apply_async([], WatchCursor.none()),
            lambda: mirror.writer,
        ):
            with pytest.raises(MirrorReadOnly, match="write to its upstream"):
                write()
        assert mirror.snapshot().seq == seq


def test_a_log_that_another_upstream_fed_is_held_until_its_owner_agrees(source, path):
    source.put("theirs", b"1")
    with foldlog.open(path) as store:
        store.apply([Put("ours", b"1")], WatchCursor.from_u64(1))
    with foldlog.mirror(path, source.upstream()) as mirror:
        with pytest.raises(foldlog.ResetHeld, match="unknown upstream"):
            mirror.wait_synced(30)
        assert mirror.link.state is LinkState.FAILED
        assert mirror.get("ours").value == b"1"
        assert "theirs" not in mirror
        watch = mirror.watch(since=mirror.snapshot())
        assert isinstance(watch.next(30), Synced)
        mirror.accept_reset()
        until(lambda: same(mirror, source))
        mirror.wait_synced(30)
        events = [watch.next(30) for _ in range(3)]
    assert isinstance(events[0], foldlog.Rewound)
    assert {type(event.update) for event in events[1:]} == {Put, Delete}


@pytest.mark.parametrize("prefix", ["k.", ["k.", "m"]])
def test_prefixes_select_keys_and_other_prefixes_are_told_from_the_start(source, path, prefix):
    for key in ("k.1", "k.2", "l.1", "m.1"):
        source.put(key, b"1")
    prefixes = (prefix,) if isinstance(prefix, str) else tuple(prefix)
    with mirrored(path, source.upstream(), prefix=prefix) as mirror:
        assert list(mirror.snapshot()) == [k for k in source.entries() if k.startswith(prefixes)]
    with mirrored(path, source.upstream(), prefix="l") as mirror:
        assert list(mirror.snapshot()) == ["l.1"]


def test_what_parse_drops_still_moves_the_cursor(source, path):
    def parse(update):
        if update.key.startswith("secret"):
            return None
        if isinstance(update, Put):
            return Put("copy." + update.key, update.value.upper(), update.version)
        return Delete("copy." + update.key, update.version)

    applied = []
    source.put("a", b"x")
    with foldlog.mirror(
        path, source.upstream(), parse=parse, on_applied=lambda u, c: applied.append(c)
    ) as mirror:
        mirror.wait_synced(30)
        cursor = mirror.cursor()
        source.put("secret", b"x")
        until(lambda: mirror.cursor() > cursor)
        assert dict(mirror.snapshot().items()) == {"copy.a": b"X"}
        until(lambda: applied[-1] == mirror.cursor())  # the hook is called after the batch is seen


def test_a_hook_that_fails_is_the_links_failure_and_skips_nothing(source, path):
    def parse(update):
        raise RuntimeError("cannot parse this")

    source.put("a", b"x")
    with foldlog.mirror(path, source.upstream(), parse=parse) as mirror:
        with pytest.raises(RuntimeError, match="cannot parse this"):
            mirror.wait_synced(30)
        assert (len(mirror), mirror.cursor().is_none) == (0, True)
        assert {restart.actor for restart in mirror.stats().restarts} == {"link"}


@pytest.mark.parametrize(
    "options", [{"format": "foldlog"}, {"format": "slipstream-v2"}, {"backend": "rocksdb"}]
)
def test_a_mirror_in_any_format_and_on_any_engine_resumes_and_is_audited(source, path, options):
    source.put("a", b"1")
    source.put("gone", b"1")
    with mirrored(path, source.upstream(), **options) as mirror:
        assert same(mirror, source)
        cursor = mirror.cursor()
    source.delete("gone")
    source.forget()
    source.put("b", b"2")
    options.pop("format", None)  # found out
    with mirrored(path, source.upstream(), **options) as mirror:
        assert same(mirror, source)
        assert mirror.cursor() > cursor
        source.put("c", b"3")
        until(lambda: same(mirror, source))
        assert mirror.verify().ok


def test_a_mirror_on_rocksdb_is_reset_only_with_consent_and_tells_the_difference(source, path):
    source.put("theirs", b"1")
    with foldlog.open(path, backend="rocksdb") as store:
        store.apply([Put("ours", b"1")], WatchCursor.from_u64(1))
    with foldlog.mirror(path, source.upstream(), backend="rocksdb") as mirror:
        with pytest.raises(foldlog.ResetHeld, match="unknown upstream"):
            mirror.wait_synced(30)
        mirror.accept_reset()
        mirror.wait_synced(30)
        assert same(mirror, source)
