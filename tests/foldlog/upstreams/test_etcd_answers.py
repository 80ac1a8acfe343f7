"""What the answers of etcd's gateway mean. The test is the gateway; time is virtual."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import ssl

import pytest
import virtual_time
from virtual_time import in_virtual_time

from foldlog import Delete, Put, VersionToken, WatchCursor
from foldlog.protocol.upstream import UpstreamError, UpstreamLost, UpstreamRefused
from foldlog.upstreams import Etcd, NatsKv, from_url
from foldlog.upstreams import etcd as etcd_module
from foldlog.upstreams.http_json import HttpError


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def kv(key: bytes, revision: int, value: bytes | None = b"v") -> dict:
    fields = {"key": b64(key), "mod_revision": str(revision)}
    return fields if value is None else fields | {"value": b64(value)}


class Gateway:
    """Answers ranges from `kvs` at `revision`, and a watch with what the test puts into `lines`."""

    def __init__(self) -> None:
        self.revision, self.cluster = 7, 1
        self.kvs: list[dict] = []
        self.asked: list[tuple[str, dict, str]] = []
        self.error: BaseException | None = None
        self.lines: asyncio.Queue = asyncio.Queue()
        self.closed = 0

    async def post(self, host, port, path, body, token, tls):
        self.asked.append((path, dict(body), token))
        if self.error is not None:
            raise self.error
        if path == "/v3/auth/authenticate":
            return {"token": "t0"}
        header = {"cluster_id": str(self.cluster), "revision": str(self.revision)}
        start = base64.b64decode(body["key"])
        rest = [each for each in self.kvs if base64.b64decode(each["key"]) >= start]
        found = rest[: body["limit"]]
        answer = {"header": header, "kvs": found, "more": len(found) < len(rest)}
        return {name: value for name, value in answer.items() if value}

    async def stream(self, host, port, path, body, token, tls):
        self.asked.append((path, dict(body), token))
        if self.error is not None:
            raise self.error
        return self

    async def next(self):
        line = await self.lines.get()
        if isinstance(line, BaseException):
            raise line
        return line

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def gateway(monkeypatch):
    gateway = Gateway()
    monkeypatch.setattr(etcd_module, "post", gateway.post)
    monkeypatch.setattr(etcd_module, "stream", gateway.stream)
    return gateway


def at(revision: int) -> WatchCursor:
    return WatchCursor.from_u64(revision)


def identified(upstream):
    return virtual_time.run(upstream.identify())


# Who it is.


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"url": None}, TypeError),
        ({"url": b"http://h"}, TypeError),
        ({"prefix": None}, TypeError),
        ({"prefix": b"a/"}, TypeError),
        ({"prefix": "\udcff"}, ValueError),
        ({"user": b"u"}, TypeError),
        ({"password": 5}, TypeError),
        ({"password": "s3cret\ud800"}, ValueError),
        ({"tls": True}, TypeError),
    ],
)
@pytest.mark.parametrize("kind", [Etcd, NatsKv])
def test_arguments_of_wrong_types_are_refused_before_anything_is_connected_to(
    kind, arguments, error
):
    """The link found out, was restarted five times, and failed with an AttributeError."""
    sound = {"url": "http://h"} if kind is Etcd else {"url": "nats://h", "bucket": "b"}
    if kind is NatsKv and "prefix" in arguments:
        arguments = {"bucket": arguments["prefix"]}
        error = ValueError
    with pytest.raises(error) as caught:
        kind(**(sound | arguments))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("domain", ["a b", "a.b", "*", ">", "hub\r\n"])
def test_a_domain_is_one_token_of_a_subject(domain):
    """It was put into the requests as it was, line ends included."""
    with pytest.raises(ValueError, match="a domain has no blanks, dots or wildcards"):
        NatsKv("nats://h", bucket="b", domain=domain)


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_the_path_of_a_log_is_a_path(path):
    with pytest.raises(ValueError, match="the path of a log"):
        from_url(path)


@pytest.mark.parametrize(
    ("url", "option"), [("a.log", "user"), ("etcd://h", "domain"), ("nats://h/b", "prefix")]
)
def test_an_option_of_another_kind_of_upstream_is_refused(url, option):
    """That of a log was ignored."""
    with pytest.raises(TypeError, match=f"{option} is no option of"):
        from_url(url, **{option: "x"})


def test_an_address_is_taken_apart():
    made = Etcd("https://u:p%40ss@h", prefix="a/")
    assert repr(made) == "Etcd('https://h:2379', prefix='a/')"
    assert (made._user, made._password) == ("u", "p@ss")
    assert repr(Etcd("http://[::1]:1")) == "Etcd('http://[::1]:1', prefix='')"
    made = Etcd("http://u:p@h:1", user="other", password="secret")
    assert repr(made) == "Etcd('http://h:1', prefix='')"
    assert (made._user, made._password, made._tls) == ("other", "secret", None)
    trusted = ssl.create_default_context()
    assert Etcd("https://h", tls=trusted)._tls is trusted
    assert Etcd("https://h")._tls is not None


def test_a_cluster_and_a_prefix_make_an_origin(gateway):
    origins = []
    for cluster, prefix in ((1, ""), (2, ""), (1, "a")):
        gateway.cluster = cluster
        found = identified(Etcd("http://h", prefix=prefix))
        assert (found.first, found.last) == (at(0), at(7))
        origins.append(found.origin)
    assert len(set(origins)) == 3
    assert {len(origin) for origin in origins} == {24}
    assert origins[0][:16] == origins[1][:16] != origins[2][:16]


def test_a_user_is_authenticated_once_and_again_once_the_token_has_expired(gateway):
    upstream = Etcd("http://u:p@h")
    for _ in range(2):
        identified(upstream)
    credentials = {"name": "u", "password": "p"}
    assert gateway.asked[0] == ("/v3/auth/authenticate", credentials, "")
    assert [(path, token) for path, _, token in gateway.asked[1:]] == [("/v3/kv/range", "t0")] * 2
    gateway.error = HttpError("401", b'{"code": 16, "message": "invalid auth token"}')
    with pytest.raises(UpstreamLost, match="invalid auth token"):
        identified(upstream)
    gateway.error = None
    gateway.asked.clear()
    identified(upstream)
    assert [path for path, _, _ in gateway.asked] == ["/v3/auth/authenticate", "/v3/kv/range"]


@pytest.mark.parametrize(
    "body",
    [b'{"code": 16, "message": "no such user"}', b'{"code": 7, "message": "invalid auth token"}'],
)
def test_only_a_token_that_has_expired_is_asked_for_again(gateway, body):
    upstream = Etcd("http://u:p@h")
    identified(upstream)
    gateway.error = HttpError("x", body)
    with pytest.raises(UpstreamRefused):
        identified(upstream)


def test_who_gives_no_user_is_not_authenticated(gateway):
    identified(Etcd("http://h"))
    assert [(path, token) for path, _, token in gateway.asked] == [("/v3/kv/range", "")]


@pytest.mark.parametrize(
    ("prefix", "end"),
    [
        ("", b"\0"),
        ("a/", b"a0"),
        ("a", b"b"),
        ("\u07ff", b"\xdf\xc0"),
        ("\U0010ffff", b"\xf4\x8f\xbf\xc0"),
    ],
)
def test_a_prefix_is_a_range_of_keys(gateway, prefix, end):
    identified(Etcd("http://h", prefix=prefix))
    ((_, body, _),) = gateway.asked
    assert base64.b64decode(body["key"]) == (prefix.encode() or b"\0")
    assert base64.b64decode(body["range_end"]) == end


# Failures.


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (ConnectionRefusedError("nobody"), UpstreamLost, "nobody"),
        (TimeoutError(), UpstreamLost, "TimeoutError"),
        (EOFError(), UpstreamLost, "EOFError"),
        (HttpError("HTTP status 502", b"<html>"), UpstreamLost, "HTTP status 502"),
        (HttpError("HTTP status 502", b"[1]"), UpstreamLost, "HTTP status 502"),
        (HttpError("HTTP status 502", b"[" * 100_000), UpstreamLost, "HTTP status 502"),
        (HttpError("HTTP status 401", b"<html>", 401), UpstreamRefused, "HTTP status 401"),
        (HttpError("HTTP status 403", b"", 403), UpstreamRefused, "HTTP status 403"),
        (UnicodeError("label empty or too long"), UpstreamLost, "label empty"),
        (HttpError("x", b'{"code": 14, "message": "no leader"}'), UpstreamLost, r"\): no leader$"),
        (HttpError("x", b'{"grpc_code": 14, "error": "old"}'), UpstreamLost, r"\): old$"),
        (HttpError("x", b'{"code": 16, "message": "who"}'), UpstreamRefused, "who"),
        (HttpError("x", b'{"code": 16, "error": "invalid auth token"}'), UpstreamRefused, "token"),
        (HttpError("x", b'{"code": 7, "message": "denied"}'), UpstreamRefused, "denied"),
        (HttpError("x", b'{"code": 3, "message": "bad"}'), UpstreamRefused, "bad"),
        (
            HttpError("x", b'{"code": 9, "error": "authentication is not enabled"}'),
            UpstreamRefused,
            "not enabled",
        ),
        (HttpError("x", b'{"code": 5}'), UpstreamLost, "'code': 5"),
    ],
)
@pytest.mark.parametrize("call", ["range", "watch"])
@in_virtual_time
async def test_a_failure_is_told_for_what_it_is(gateway, error, kind, reason, call):
    """The reason of a timeout was empty, as is the text of a TimeoutError."""
    gateway.error = error
    upstream = Etcd("http://h")
    with pytest.raises(UpstreamError, match=reason) as caught:
        await (upstream.identify() if call == "range" else anext(upstream.changes(at(7), ())))
    assert type(caught.value) is kind


HEADER = {"cluster_id": "1", "revision": "5"}


@pytest.mark.parametrize(
    "answer",
    [
        [],
        {},
        None,
        5,
        "header",
        {"header": None},
        {"header": {"cluster_id": "1"}},
        {"header": HEADER | {"revision": "-5"}},
        {"header": HEADER | {"revision": str(2**64)}},
        {"header": HEADER | {"revision": float("inf")}},
        {"header": HEADER | {"cluster_id": "-1"}},
        {"header": HEADER | {"cluster_id": str(2**64)}},
        {"header": HEADER, "kvs": 7},
        {"header": HEADER, "kvs": [7]},
        {"header": HEADER, "kvs": [{"key": "YQ=="}]},
        {"header": HEADER, "kvs": [{"key": "Y", "mod_revision": "1"}]},
        {"header": HEADER, "kvs": [kv(b"k", 1)], "more": True},
    ],
    ids=repr,
)
@pytest.mark.parametrize("call", ["state", "revisions"])
def test_json_that_no_gateway_sends_is_a_lost_connection(gateway, monkeypatch, answer, call):
    """A proxy that answered so for two seconds, while etcd started, ended the link for good. Pages
    that did not move on were read for ever."""

    async def post(*arguments):
        return answer

    async def ask():
        upstream = Etcd("http://h")
        await upstream.identify()
        if call == "revisions":
            await upstream.revisions(())
        else:
            assert [piece async for piece in upstream.state(())]

    monkeypatch.setattr(etcd_module, "post", post)
    with pytest.raises(UpstreamLost, match="is not that of an etcd"):
        virtual_time.run(ask())


def test_a_token_that_does_not_come_is_a_lost_connection(gateway, monkeypatch):
    async def post(*arguments):
        return {}

    monkeypatch.setattr(etcd_module, "post", post)
    with pytest.raises(UpstreamLost, match="is not that of an etcd"):
        identified(Etcd("http://u:p@h"))


def test_a_server_that_does_not_answer_is_lost(gateway, monkeypatch):
    async def never(*arguments):
        await asyncio.Event().wait()

    monkeypatch.setattr(etcd_module, "post", never)
    with pytest.raises(UpstreamLost, match="TimeoutError"):
        identified(Etcd("http://h"))


# State and revisions.


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
@in_virtual_time
async def test_pages_are_read_at_one_revision_and_go_on_after_the_last_key(
    gateway, monkeypatch, count
):
    monkeypatch.setattr(etcd_module, "PAGE_KEYS", 3)
    gateway.kvs = [kv(b"k.%d" % n, n + 1) for n in range(count)]
    upstream = Etcd("http://h", prefix="k.")
    pieces = []
    async for piece in upstream.state(()):
        pieces.append(piece)
        gateway.revision += 1
    assert [update for piece in pieces for update in piece.updates] == [
        Put(f"k.{n}", b"v", VersionToken.from_u64(n + 1)) for n in range(count)
    ]
    assert {piece.position for piece in pieces} == {at(7)}
    assert len(pieces) == max(-(-count // 3), 1)
    revisions = await upstream.revisions(())
    assert revisions.versions == {f"k.{n}": VersionToken.from_u64(n + 1) for n in range(count)}
    assert revisions.position == at(gateway.revision)
    keys_only = [body.get("keys_only", False) for _, body, _ in gateway.asked]
    assert keys_only == [False] * len(pieces) + [True] * len(pieces)


def test_a_page_that_promises_more_and_holds_nothing_ends_reading(gateway, monkeypatch):
    async def post(*arguments):
        return {"header": {"revision": "7"}, "more": True}

    monkeypatch.setattr(etcd_module, "post", post)
    assert virtual_time.run(Etcd("http://h").revisions(())).versions == {}


# Changes.


def watched(after=5):
    """The changes after a revision, closed at the end of the block."""
    position = at(after) if after else WatchCursor.none()
    return contextlib.aclosing(Etcd("http://h").changes(position, ()))


def events(*changes) -> dict:
    return {"result": {"events": list(changes)}}


def put(key: bytes, revision: int) -> dict:
    return {"kv": kv(key, revision)}


@in_virtual_time
async def test_a_watch_begins_after_the_position_and_tells_puts_and_deletes(gateway):
    gateway.lines.put_nowait({"result": {"created": True}})
    gateway.lines.put_nowait(
        events(put(b"a", 6), {"type": "DELETE", "kv": kv(b"b", 6, None)}, put(b"c", 7))
    )
    gateway.lines.put_nowait(events({"type": "PUT", "kv": kv(b"empty", 8, None)}))
    async with watched() as changes:
        first, second = await anext(changes), await anext(changes)
    assert gateway.asked[0][1]["create_request"]["start_revision"] == 6
    six, seven = VersionToken.from_u64(6), VersionToken.from_u64(7)
    assert first.updates == [Put("a", b"v", six), Delete("b", six), Put("c", b"v", seven)]
    assert (first.position, first.behind) == (at(7), 0)
    assert second.updates == [Put("empty", b"", VersionToken.from_u64(8))]
    assert gateway.closed == 1


@pytest.mark.parametrize(
    ("after", "start", "revision", "position"),
    [
        (0, 1, 1, 1),
        (5, 6, 4, 5),  # events that are read again do not move the position back
    ],
)
@in_virtual_time
async def test_a_watch_goes_on_from_its_position(gateway, after, start, revision, position):
    gateway.lines.put_nowait(events(put(b"a", revision)))
    async with watched(after) as changes:
        assert (await anext(changes)).position == at(position)
    assert gateway.asked[0][1]["create_request"]["start_revision"] == start


@pytest.mark.parametrize(
    ("revisions", "behind"),
    [
        ([5], [0]),  # nothing has happened
        ([4], [0]),
        ([6, 6], [None, 0]),  # of other keys, if nothing has come for it by the next look
        ([6, 7, 7], [None, None, 0]),
    ],
)
@in_virtual_time
async def test_a_revision_without_a_change_is_in_step_once_it_has_settled(
    gateway, revisions, behind
):
    async with watched() as changes:
        for gateway.revision, told in zip(revisions, behind, strict=True):
            piece = await anext(changes)
            assert (piece.updates, piece.position, piece.behind) == ([], at(5), told)
    assert asyncio.get_running_loop().time() == len(revisions) * etcd_module.LOOK_S


@in_virtual_time
async def test_a_change_that_comes_while_the_revision_is_asked_for_is_not_in_step(
    gateway, monkeypatch
):
    answer = gateway.post

    async def post(*arguments):
        gateway.lines.put_nowait(events(put(b"a", 6)))
        await asyncio.sleep(0.1)
        return await answer(*arguments)

    monkeypatch.setattr(etcd_module, "post", post)
    gateway.revision = 5
    async with watched() as changes:
        assert (await anext(changes)).behind is None
        assert (await anext(changes)).position == at(6)


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        (None, UpstreamLost, "the watch ended"),
        (HttpError("broke off"), UpstreamLost, "broke off"),
        ([], UpstreamLost, "is not that of an etcd"),
        ({"result": {"events": [{}]}}, UpstreamLost, "is not that of an etcd"),
        ({"error": 5}, UpstreamLost, "is not that of an etcd"),
        ({"error": {"grpc_code": 14, "message": "no leader"}}, UpstreamLost, "no leader"),
        ({"error": {"grpc_code": 7, "message": "denied"}}, UpstreamRefused, "denied"),
        (events(put(b"a\xff", 6)), UpstreamRefused, "is not UTF-8"),
    ],
)
@in_virtual_time
async def test_a_watch_that_ends_says_why_and_is_closed(gateway, line, kind, reason):
    gateway.lines.put_nowait(line)
    async with watched() as changes:
        with pytest.raises(kind, match=reason):
            await anext(changes)
    assert gateway.closed == 1


@pytest.mark.parametrize(
    ("result", "first", "reason"),
    [
        ({"compact_revision": "6"}, 5, "compacted at 6"),
        ({"compact_revision": "1"}, 0, "compacted at 1"),
        ({"cancel_reason": "no permission"}, 0, "no permission"),
    ],
)
@in_virtual_time
async def test_a_watch_that_is_cancelled_tells_from_where_one_can_resume(
    gateway, result, first, reason
):
    upstream = Etcd("http://h")
    gateway.lines.put_nowait({"result": {"canceled": True, **result}})
    with pytest.raises(UpstreamLost, match=reason):
        await anext(upstream.changes(at(3), ()))
    assert (await upstream.identify()).first == at(first)
