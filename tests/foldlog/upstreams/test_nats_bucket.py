"""What a bucket makes of the answers of JetStream, and of what its consumers deliver. The test is
the server."""

from __future__ import annotations

import asyncio
import ssl

import pytest

from foldlog import Delete, Purge, Put, VersionToken, WatchCursor
from foldlog.protocol.updates import UpdateColumns
from foldlog.protocol.upstream import Changes, UpstreamLost
from foldlog.upstreams import NatsKv
from foldlog.upstreams.nats_connection import NoMessage
from foldlog.upstreams.nats_kv import _filter_config
from foldlog.upstreams.nats_pull import Piece

pytest.importorskip("nats", reason="nats-py is not installed: the extra `nats`")


def at(sequence: int) -> WatchCursor:
    return WatchCursor.from_u64(sequence)


def mark(stored_ns: int) -> bytes:
    return stored_ns.to_bytes(8, "big")


class Server:
    """In the place of a connection: answers requests of the API."""

    is_lost = False

    def __init__(self, answer) -> None:
        self.answer, self.asked, self.closed = answer, [], 0

    def check(self) -> None:
        pass

    async def request(self, subject, body):
        self.asked.append((subject, body))
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    async def close(self) -> None:
        self.closed += 1


def info(**fields) -> dict:
    return {"created": "2026-01-01T00:00:00Z", "state": {"last_seq": 5}, **fields}


def bucket(answer, *pieces, **options) -> NatsKv:
    """A bucket that is connected, whose consumers deliver `pieces`, and note how they are made."""
    made = NatsKv("nats://h", bucket=options.pop("bucket", "b"), **options)
    made._connection = Server(answer)
    made.consumers = []

    async def consume(start, prefixes, *, upto=None):
        made.consumers.append((start, prefixes, upto))
        for piece in pieces:
            yield piece

    made._consume = consume
    return made


def identified(answer, **options):
    return asyncio.run(bucket(answer, **options).identify())


# Who it is.


def test_another_creation_is_another_incarnation_and_another_name_or_domain_another_bucket():
    origins = [
        identified(info()).origin,
        identified(info(created="2026-01-01T00:00:01Z")).origin,
        identified(info(), bucket="c").origin,
        identified(info(), domain="d").origin,
    ]
    assert len(set(origins)) == 4
    assert len({origin[:16] for origin in origins}) == 3
    assert origins[0][:16] == origins[1][:16]
    assert {len(origin) for origin in origins} == {24}
    assert (identified(info()).first, identified(info()).last) == (WatchCursor.none(), at(5))


PEERS = {
    "one server": (None, True),
    "a leader alone": ({"leader": "n0"}, True),
    "all are current": ({"leader": "n0", "replicas": [{"current": True}] * 2}, True),
    "half of the others are": (
        {"leader": "n0", "replicas": [{"current": True}, {"current": False}]},
        True,
    ),
    "none of the others is": ({"leader": "n0", "replicas": [{"current": False}] * 2}, False),
    "most of the others are not": (
        {"leader": "n0", "replicas": [{"current": True}, {}, {}, {"current": False}]},
        False,
    ),
    "there is no leader": ({"leader": "", "replicas": [{"current": True}] * 2}, False),
}


@pytest.mark.parametrize("case", sorted(PEERS))
def test_a_stream_whose_leader_may_be_deposed_is_not_asked(case):
    cluster, good = PEERS[case]
    if good:
        assert identified(info(cluster=cluster)).last == at(5)
    else:
        with pytest.raises(UpstreamLost, match="no current leader"):
            identified(info(cluster=cluster))


def lost() -> None:
    raise UpstreamLost("just now")


def test_a_lost_connection_is_made_anew_by_identify_alone(monkeypatch):
    from foldlog.upstreams import nats_kv

    options = {
        "user": "u",
        "password": "p",
        "token": "t",
        "tls": ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
    }
    made = bucket(info(), credentials="file", **options)
    old = made._connection
    old.is_lost, opened = True, []

    class New(Server):
        def __init__(self, who, servers, options, api):
            super().__init__(info())
            opened.append((servers, {name: each for name, each in options.items() if each}, api))

        async def open(self):
            pass

    monkeypatch.setattr(nats_kv, "Connection", New)
    asyncio.run(made.identify())
    asyncio.run(made.identify())
    assert opened == [(["nats://h"], options | {"user_credentials": "file"}, "$JS.API")]
    assert old.closed == 1
    monkeypatch.setattr(made._connection, "check", lost)
    with pytest.raises(UpstreamLost, match="just now"):
        asyncio.run(made.identify())
    asyncio.run(made.close())
    with pytest.raises(UpstreamLost, match="is not connected"):
        asyncio.run(made.recalls(at(1), b""))
    asyncio.run(made.close())


def test_a_domain_has_an_api_of_its_own():
    assert NatsKv("nats://h", bucket="b", domain="hub")._api == "$JS.hub.API"


# Marks.


@pytest.mark.parametrize(
    ("answer", "known"),
    [
        ({"message": {"time": "1970-01-01T00:00:00.000000009Z"}}, True),
        ({"message": {"time": "1970-01-01T00:00:00.000000010Z"}}, False),
        (NoMessage("none"), None),
    ],
)
def test_a_position_is_known_by_the_time_at_which_its_message_was_stored(answer, known):
    made = bucket(answer)
    assert asyncio.run(made.recalls(at(7), mark(9))) is known
    assert made._connection.asked == [("STREAM.MSG.GET.KV_b", {"seq": 7})]


# Changes, state, revisions.


def put(key: str, sequence: int) -> Put:
    return Put(key, b"v", VersionToken.from_u64(sequence))


def columns(*updates) -> UpdateColumns:
    values = {Put: lambda put: put.value, Delete: lambda _: None, Purge: lambda _: False}
    return UpdateColumns(
        [update.key for update in updates],
        [values[type(update)](update) for update in updates],
        [bytes(update.version) for update in updates],
    )


def collected(pieces) -> list[Changes]:
    async def collect():
        return [piece async for piece in pieces]

    return asyncio.run(collect())


def test_changes_begin_after_the_position_and_a_heartbeat_does_not_move_it():
    made = bucket(info(), Piece([], pending=3), Piece([put("a", 6)], 6, 2, 60), Piece([]))
    assert collected(made.changes(at(5), ("a",))) == [
        Changes([], at(5), 3),
        Changes([put("a", 6)], at(6), 2, mark(60)),
        Changes([], at(6), None),
    ]
    start = {"deliver_policy": "by_start_sequence", "opt_start_seq": 6}
    assert made.consumers == [(start, ("a",), None)]
    collected(made.changes(WatchCursor.none(), ()))
    assert made.consumers[1][0]["opt_start_seq"] == 1


def test_a_state_is_complete_up_to_the_last_position_and_has_the_mark_of_what_it_reached():
    made = bucket(info(), Piece([put("a", 4)], 4, 1, 40), Piece([put("b", 5)], 5, 1, 50))
    later = bucket(info(), Piece([put("a", 4)], 4, 1, 40), Piece([put("b", 7)], 7, 0, 70))
    short = bucket(info(), Piece([put("a", 4)], 4, 0, 40))
    assert [(each.position, each.mark) for each in collected(made.state(()))] == [
        (at(5), b""),
        (at(5), mark(50)),
    ]
    assert [(each.position, each.mark) for each in collected(later.state(()))] == [
        (at(5), b""),
        (at(7), mark(70)),
    ]
    assert [(each.position, each.mark) for each in collected(short.state(()))] == [(at(5), b"")]
    assert made.consumers == [({"deliver_policy": "last_per_subject"}, (), at(5))]


def test_revisions_are_those_of_the_live_keys_at_the_last_position_that_was_reached():
    pieces = [
        Piece(columns(put("a", 3), put("b", 4), put("c", 5)), 5),
        Piece(columns(Delete("a", VersionToken.from_u64(6)), Purge("x"), put("b", 7)), 7),
        Piece(columns()),
    ]
    made = bucket(info(), *pieces)
    found = asyncio.run(made.revisions(("p",)))
    versions = {"b": VersionToken.from_u64(7), "c": VersionToken.from_u64(5)}
    assert (found.versions, found.position) == (versions, at(7))
    start = {"deliver_policy": "last_per_subject", "headers_only": True}
    assert made.consumers == [(start, ("p",), at(5))]
    early = asyncio.run(bucket(info(), Piece(columns(put("a", 3)), 3)).revisions(()))
    assert early.position == at(5)


class Version:
    def __init__(self, major: int, minor: int) -> None:
        self.major, self.minor = major, minor


@pytest.mark.parametrize(
    ("version", "filters", "config"),
    [
        (Version(2, 9), ["$KV.b.eu.>"], {"filter_subject": "$KV.b.eu.>"}),
        (Version(2, 9), ["$KV.b.eu.>", "$KV.b.us.>"], {"filter_subject": "$KV.b.>"}),
        (Version(2, 10), ["$KV.b.eu.>"], {"filter_subject": "$KV.b.eu.>"}),
        (Version(2, 10), ["x.>", "y.>"], {"filter_subjects": ["x.>", "y.>"]}),
        (Version(3, 0), ["x.>", "y.>"], {"filter_subjects": ["x.>", "y.>"]}),
    ],
)
def test_a_server_that_takes_one_filter_gets_one_that_covers_all(version, filters, config):
    assert _filter_config(filters, version) == config
