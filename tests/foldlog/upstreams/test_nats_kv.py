"""Buckets of a real NATS server: what its sequences do not tell, and what it is given wrongly."""

from __future__ import annotations

import itertools
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import servers
from upstream_kit import NatsSource, mirrored, opened, same, until

import foldlog
from foldlog import Changed, LinkState, Rewound, Synced
from foldlog.actors.link import link as link_module
from foldlog.actors.link.resuming import retry_delay_s
from foldlog.upstreams import NatsKv
from foldlog.upstreams.nats_kv import _filters
from foldlog.upstreams.nats_wire import nanoseconds

names = (f"bucket{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with servers.nats(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def source(server, tmp_path):
    with opened(NatsSource(tmp_path, next(names), server=server)) as source:
        yield source


# What a cursor does not tell.


def test_a_recreated_bucket_is_replaced_as_one_batch_and_told_as_the_difference(source, path):
    """A new bucket under the old name counts from 1. Resuming at the old cursor lost 100 of 105
    updates, without an error."""
    source.put_many({f"k.{n}": b"old" for n in range(50)})
    with mirrored(path, source.upstream()) as mirror:
        watch = mirror.watch(since=mirror.snapshot())
        assert isinstance(watch.next(30), Synced)
        seq = mirror.snapshot().seq
        source.recreate()
        source.put_many({f"k.{n}": b"new" for n in range(40)})
        until(lambda: mirror.stats().link.resets == 1)
        until(lambda: same(mirror, source))
        assert isinstance(watch.next(30), Rewound)
        assert isinstance(watch.next(30), Changed)
        assert mirror.snapshot().seq <= seq + 3


def put_back(source, folder) -> None:
    """Stop the server, put its copied files back, and start it."""
    files, copy = folder / "js", folder / "copy"
    source.disconnect()
    source.server.kill()
    if copy.exists():
        shutil.rmtree(files)
        copy.rename(files)
    else:
        shutil.copytree(files, copy)
    source.server.start()
    source.connect()


def mirrored_and_restored(source, folder, path, writes) -> None:
    """A mirror holds `a`, `b` and `c`; of these a copy of the bucket holds `a` alone. It is put
    back, and written to."""
    source.put("a", b"1")
    put_back(source, folder)  # takes the copy
    source.put("b", b"lost")
    source.put("c", b"lost")
    mirrored(path, source.upstream()).close()
    put_back(source, folder)
    for key, value in writes:
        source.put(key, value)


def test_a_stream_restored_from_a_copy_is_not_resumed(tmp_path, path):
    """Restored from a copy, a stream has the same date of creation, and by the time that the client
    is back its sequence may be past the client's cursor: with the same keys at the same sequences,
    and other values."""
    with opened(NatsSource(tmp_path / "nats")) as source:
        writes = [("b", b"kept"), ("c", b"kept"), ("d", b"kept")]
        mirrored_and_restored(source, tmp_path / "nats", path, writes)
        with mirrored(path, source.upstream()) as mirror:
            assert same(mirror, source)
            assert mirror.get("b").value == b"kept"
            assert mirror.stats().link.resets == 1


def test_values_are_audited_where_the_position_is_no_longer_known(tmp_path, path):
    """As above, but the message at the cursor is gone, so that nothing proves the position."""
    with opened(NatsSource(tmp_path / "nats")) as source:
        writes = [("b", b"kept"), ("c", b"kept"), ("c", b"again")]
        mirrored_and_restored(source, tmp_path / "nats", path, writes)
        with mirrored(path, source.upstream()) as mirror:
            assert same(mirror, source)
            assert mirror.stats().link.mended == 1


def test_a_hot_bucket_loses_nothing_and_is_resumed(source, path):
    """Of 50 hot keys with a history of 1, the first sequence is past the cursor at once, though
    nothing was lost."""
    source.put_many({f"k.{n}": b"0" for n in range(50)})
    mirrored(path, source.upstream()).close()
    for turn in range(3):
        source.put_many({f"k.{n}": b"%d" % turn for n in range(50)})
    with mirrored(path, source.upstream()) as mirror:
        assert same(mirror, source)
        assert (mirror.stats().link.resets, mirror.stats().link.mended) == (0, 0)


def test_keys_that_expire_without_a_word_are_found_by_an_audit(source, path):
    source.put("old", b"1")
    with mirrored(path, source.upstream(), audit_interval_s=0.2) as mirror:
        assert "old" in mirror
        limit_ns = 100_000_000  # the shortest that a server takes
        assert source.configure(max_age=limit_ns, duplicate_window=limit_ns)
        until(lambda: "old" not in mirror)
        assert same(mirror, source)


@pytest.mark.parametrize("history", [1, 3])
def test_purges_and_deletes_of_keys_are_told(server, tmp_path, path, history):
    with opened(NatsSource(tmp_path, next(names), server=server, history=history)) as source:
        for key in ("a", "b", "c"):
            source.put(key, b"1")
            source.put(key, b"2")
        with mirrored(path, source.upstream()) as mirror:
            source.purge("a")
            source.delete("b")
            until(lambda: list(mirror.snapshot()) == ["c"])
            source.put("a", b"3")
            until(lambda: same(mirror, source))


def test_a_mass_delete_holds_and_asks(source, path):
    source.put_many({f"k.{n}": b"" for n in range(200)})
    with mirrored(path, source.upstream()) as mirror:
        source.recreate()
        until(lambda: mirror.link.state is LinkState.FAILED)
        with pytest.raises(foldlog.ResetHeld, match="200 of 200 keys would be deleted"):
            mirror.wait_synced(30)
        assert len(mirror) == 200
        mirror.accept_reset()
        until(lambda: len(mirror) == 0)
        mirror.wait_synced(30)
        source.put("k", b"1")
        until(lambda: same(mirror, source))


def test_no_consumer_stays_on_the_server(source, path):
    for _ in range(8):
        mirrored(path, source.upstream()).close()
    until(lambda: source.consumers() == 0)


def test_a_mirror_that_is_killed_leaves_a_consumer_that_removes_itself(source):
    async def abandon() -> dict:
        upstream = source.upstream()
        await upstream.identify()
        changes = upstream.changes(foldlog.WatchCursor.none(), ())
        await anext(changes)
        info = await upstream._connected().request(f"CONSUMER.LIST.KV_{source.bucket}", {})
        (consumer,) = info["consumers"]
        await changes.aclose()
        await upstream.close()
        return consumer["config"]

    config = source.loop.run(abandon())
    assert 0 < config["inactive_threshold"] <= 10e9
    assert (config["ack_policy"], config["num_replicas"], config["mem_storage"]) == (
        "none",
        1,
        True,
    )


# Keys and values of every kind.


def test_keys_that_clients_refuse_are_held(source, path):
    keys = ["ü", "a:b", "a=b/c", "_x", "A.b.C", "x" * 500]
    for key in keys:
        source.put(key, key.encode())
    with mirrored(path, source.upstream()) as mirror:
        assert list(mirror.snapshot()) == sorted(keys)
        source.delete("ü")
        until(lambda: "ü" not in mirror)


def test_values_larger_than_a_request_may_bring_arrive(tmp_path, path):
    """A value above a pull's max_bytes is answered with 409 for ever: the limit is dropped when
    nothing came."""
    config = "max_payload: 33554432\nmax_pending: 67108864\n"
    with opened(NatsSource(tmp_path / "nats", server_config=config)) as source:
        source.put("before", b"1")
        source.put("large", b"v" * (9 * 1024 * 1024))
        source.put("after", b"1")
        with mirrored(path, source.upstream()) as mirror:
            assert len(mirror.get("large").value) == 9 * 1024 * 1024
            source.put("large", b"w" * (9 * 1024 * 1024))
            source.put("last", b"1")
            until(lambda: "last" in mirror)
            assert mirror.get("large").value[:1] == b"w"
        source.put("huge", b"v" * (17 * 1024 * 1024))
        with pytest.raises(foldlog.UpstreamOversize, match="'huge'") as caught:
            mirrored(path, source.upstream())
        assert caught.value.key == "huge"
        with mirrored(path, source.upstream(), on_oversize="skip") as mirror:
            assert mirror.stats().link.skipped == 1
            assert sorted(mirror.snapshot()) == ["after", "before", "large", "last"]
            source.put("huge", b"small now")
            until(lambda: mirror.get("huge"))
            assert mirror.stats().link.skipped == 0


def test_more_bytes_than_a_request_may_bring_arrive(source, path):
    """NATS 2.9 left out of a pass each message for which the open requests had no bytes left."""
    keys = {f"k.{number}": b"v" * 100_000 for number in range(300)}
    source.put_many(keys)
    with mirrored(path, source.upstream()) as mirror:
        assert dict(mirror.snapshot().items()) == keys
        assert mirror.stats().link.mended == 0


@pytest.mark.parametrize(
    ("prefixes", "filters"),
    [
        ((), ["$KV.b.>"]),
        (("eu/",), ["$KV.b.>"]),
        (("eu.",), ["$KV.b.eu.>"]),
        (("eu.we",), ["$KV.b.eu.>"]),
        (("eu.west.", "eu.", "us.x"), ["$KV.b.eu.>", "$KV.b.us.>"]),
        (("a*.b",), ["$KV.b.>"]),
        (("a..b",), ["$KV.b.a.>"]),
    ],
)
def test_a_prefix_becomes_filters_at_the_boundary_of_a_token(prefixes, filters):
    assert _filters("$KV.b.", prefixes) == filters


def test_filters_reach_the_server_and_what_they_leave_out_never_comes(source, path):
    source.put_many({f"{where}.{n}": b"" for where in ("eu", "us", "uk") for n in range(20)})
    with mirrored(path, source.upstream(), prefix=["eu.1", "us."]) as mirror:
        assert len(mirror) == 11 + 20
        source.put("uk.1", b"x")
        source.put("eu.15", b"x")
        until(lambda: mirror.get("eu.15").value == b"x")
        assert len(mirror) == 31


def test_times_of_the_server_are_read_to_the_nanosecond():
    assert nanoseconds("1970-01-01T00:00:01.5Z") == 1_500_000_000
    assert nanoseconds("1970-01-01T00:00:01Z") == 1_000_000_000


# Bad input.


@pytest.mark.parametrize("url", ["", "127.0.0.1:4222", "http://h:1", "nats://", "nats://h:port"])
def test_what_is_no_address_is_refused_at_once(url):
    with pytest.raises(ValueError, match="an address"):
        NatsKv(url, bucket="b")


@pytest.mark.parametrize("bucket", ["", "a.b", "a b", "$", "ü", None])
def test_what_is_no_bucket_is_refused_at_once(bucket):
    with pytest.raises(ValueError, match="a bucket's name"):
        NatsKv("nats://127.0.0.1:4222", bucket=bucket)


def test_an_address_where_nobody_listens_is_told_and_tried_again(path):
    upstream = NatsKv(f"nats://127.0.0.1:{servers.free_port()}", bucket="b")
    with foldlog.mirror(path, upstream) as mirror:
        until(lambda: mirror.link.state is LinkState.LOST)
        assert "cannot be reached" in mirror.link.reason
        with pytest.raises(foldlog.RequestTimeout, match="cannot be reached"):
            mirror.wait_synced(0.3)
        assert (mirror.get("k"), mirror.lag()) == (None, None)


def test_a_bucket_that_does_not_exist_is_waited_for(source, path):
    upstream = NatsKv(source.url, bucket="later")
    with foldlog.mirror(path, upstream) as mirror:
        until(lambda: "does not exist" in mirror.link.reason)
        source.bucket = "later"
        source.create()
        source.put("k", b"1")
        mirror.wait_synced(30)
        assert same(mirror, source)


def test_refused_credentials_fail_at_once_and_show_nowhere(tmp_path, path, caplog):
    caplog.set_level(logging.DEBUG)
    config = 'authorization { users = [{user: "u", password: "right-s3cret"}] }\n'
    with servers.nats(tmp_path / "nats", config=config) as server:
        wrong = NatsKv(f"nats://u:wrong-s3cret@127.0.0.1:{server.port}", bucket="b")
        with foldlog.mirror(path, wrong) as mirror:
            with pytest.raises(foldlog.UpstreamRefused, match="credentials") as caught:
                mirror.wait_synced(30)
            assert mirror.link.state is LinkState.FAILED
        right = NatsKv(
            f"nats://127.0.0.1:{server.port}", bucket="b", user="u", password="right-s3cret"
        )
        with foldlog.mirror(path, right) as mirror:
            until(lambda: "does not exist" in mirror.link.reason)
            told = [repr(right), repr(wrong), repr(mirror), mirror.link.reason, str(caught.value)]
    assert "s3cret" not in "".join(told) + caplog.text


def test_a_log_of_another_bucket_is_held(source, server, tmp_path, path):
    source.put("k", b"ours")
    mirrored(path, source.upstream()).close()
    with opened(NatsSource(tmp_path, next(names), server=server)) as other:
        other.put("k", b"theirs")
        with foldlog.mirror(path, other.upstream()) as mirror:
            with pytest.raises(foldlog.ResetHeld, match="another upstream"):
                mirror.wait_synced(30)
            assert mirror.get("k").value == b"ours"


def test_the_first_update_comes_within_a_second_of_a_servers_return(tmp_path, path, monkeypatch):
    waits_s = []

    def noted_delay_s(attempt, jitter):
        waits_s.append(retry_delay_s(attempt, jitter))
        return waits_s[-1]

    monkeypatch.setattr(link_module, "retry_delay_s", noted_delay_s)
    with opened(NatsSource(tmp_path / "nats")) as source:
        source.put("k", b"0")
        with mirrored(path, source.upstream()) as mirror:
            watch = mirror.watch(since=mirror.snapshot())
            assert isinstance(watch.next(30), Synced)
            source.server.kill()
            until(lambda: mirror.link.state is LinkState.LOST)
            until(lambda: len(waits_s) > 5)
            source.server.start()
            source.connect()
            source.put("k", b"1")
            assert watch.next(30).update.value == b"1"
            assert max(waits_s) <= 0.5, "between two attempts"


def test_a_client_that_is_killed_while_it_loads_or_follows_is_exact_afterwards(source, path):
    """Its cursor is written with the data, so that whatever a killed process leaves is a position
    to go on from."""
    command = [str(Path(sys.executable).parent / "foldlog"), "mirror", str(path)]
    command += [f"{source.url}/{source.bucket}", "--quiet"]
    for turn in range(3):
        source.put_many({f"k.{number}": b"%d" % turn for number in range(turn, 6000)})
        source.delete(f"k.{turn}")
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            with foldlog.follow(path) as follower:
                until(lambda: follower.stats().seq > turn)  # noqa: B023
        finally:
            process.kill()
            process.wait()
    with mirrored(path, source.upstream()) as mirror:
        assert (len(mirror), mirror.get("k.5").value) == (5997, b"2")
        assert mirror.verify().ok


def test_what_is_used_of_nats_py_beyond_its_public_names_is_there():
    """nats-py makes an object and a queue entry of each message, which costs ten times as much as
    reading it. So its parser is replaced, which has no public place: any release may move it.
    The extra `nats` allows no release that was not tried."""
    import inspect
    from importlib.metadata import requires, version

    from nats.aio.client import Client
    from nats.aio.subscription import Subscription
    from nats.protocol.parser import Parser

    client = Client()
    assert isinstance(client._ps, Parser)
    assert client._transport is None
    assert client._server_info == {}
    assert inspect.getsource(Client).count("self._connect_command()") == 1
    assert inspect.iscoroutinefunction(client._ps.parse)
    assert Subscription(client, 7)._id == 7
    (extra,) = [each for each in requires("foldlog") or () if each.startswith("nats-py")]
    below = extra.partition("<")[2].partition(",")[0].partition(";")[0]
    installed, limit = (
        tuple(map(int, each.split(".")[:2])) for each in (version("nats-py"), below)
    )
    assert installed < limit
