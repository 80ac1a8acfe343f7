"""A connection to NATS: why it fails, in the terms of the seam, and without secrets. The test is
nats-py; time is virtual."""

from __future__ import annotations

import asyncio
import json
import ssl
from types import SimpleNamespace

import pytest
from virtual_time import in_virtual_time

from foldlog.protocol.upstream import UpstreamLost, UpstreamMissing, UpstreamRefused
from foldlog.upstreams import NatsKv, nats_connection
from foldlog.upstreams.nats_connection import Connection, NoMessage, bare, checked_url, secrets_of

errors = pytest.importorskip("nats.errors", reason="nats-py is not installed: the extra `nats`")


class Client:
    """In the place of nats-py's."""

    def __init__(self) -> None:
        self.is_connected, self.is_closed = True, False
        self.options: dict = {}
        self.asked: list[tuple] = []
        self.answer: object = {}
        """Of a request: what it is answered with, or raises; None: nothing ever."""
        self.error: BaseException | None = None
        """What connecting and telling raise."""
        self.clings = False
        """Closing does not end."""
        self.cancelled = 0
        self._transport = SimpleNamespace(close=lambda: setattr(self, "transport_closed", True))
        self.transport_closed = False

    async def connect(self, servers, **options):
        self.options = options
        await self._fail()

    async def _fail(self):
        if isinstance(self.error, asyncio.Event):
            await self.error.wait()
        elif self.error is not None:
            raise self.error

    async def request(self, subject, body, timeout):
        self.asked.append((subject, json.loads(body)))
        if self.answer is None:
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled += 1
        if isinstance(self.answer, BaseException):
            raise self.answer
        data = self.answer if isinstance(self.answer, bytes) else json.dumps(self.answer).encode()
        return SimpleNamespace(data=data)

    async def publish(self, subject, body, reply):
        self.asked.append((subject, body, reply))
        await self._fail()

    async def close(self):
        if self.clings:
            await asyncio.Event().wait()
        assert not self.is_closed
        self.is_closed = True


def connected(**options) -> tuple[Connection, Client]:
    """A connection and its client."""
    connection = Connection("b", ["nats://u:s3cret@h"], options, "$API")
    connection.client = Client()
    return connection, connection.client


# Connecting.


@in_virtual_time
async def test_it_never_reconnects_by_itself_and_gives_no_option_that_is_none():
    connection, client = connected(user="u", token=None)
    await connection.open()
    assert client.options["allow_reconnect"] is False
    assert client.options["max_reconnect_attempts"] == 1
    assert client.options["reconnect_time_wait"] == nats_connection.RETRY_S
    assert (client.options["ping_interval"], client.options["max_outstanding_pings"]) == (5, 2)
    assert (client.options["user"], "token" in client.options) == ("u", False)


@pytest.mark.parametrize(
    ("error", "said", "kind", "reason"),
    [
        (OSError("s3cret away"), "", UpstreamLost, r"b cannot be reached: \*\*\* away"),
        (TimeoutError(), "", UpstreamLost, "cannot be reached: TimeoutError"),
        (errors.NoServersError(), "Connect refused", UpstreamLost, "reached: Connect refused"),
        (errors.Error("x"), "Authorization Violation", UpstreamRefused, "refuses the credentials"),
        (errors.Error("authentication timeout"), "", UpstreamRefused, "refuses the credentials"),
        (ssl.SSLCertVerificationError("odd"), "", UpstreamRefused, "is not trusted"),
        (errors.NoServersError(), "certificate verify failed", UpstreamRefused, "is not trusted"),
        (ModuleNotFoundError("nkeys"), "", UpstreamRefused, r"pip install 'nats-py\[nkeys\]'"),
        (AttributeError("'list' s3cret"), "", UpstreamLost, "is not a NATS server"),
        (ValueError("s3cret is no seed"), "", UpstreamRefused, r"b: \*\*\* is no seed"),
        (errors.Error("x"), "Connect refused", UpstreamLost, "reached: nats: x|reached: x"),
    ],
)
@in_virtual_time
async def test_a_connection_that_cannot_be_made_says_why_and_is_closed(error, said, kind, reason):
    connection, client = connected()
    if said:
        await connection._on_error(Exception(said))
    client.error = error
    with pytest.raises(kind, match=reason) as caught:
        await connection.open()
    assert client.transport_closed
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("scheme", "options"), [("tls", {}), ("nats", {"tls": ssl.create_default_context()})]
)
def test_credentials_are_not_sent_in_the_clear_where_tls_is_asked_for(scheme, options):
    """nats-py leaves it to the server whether there is TLS: one that said nothing of it got them,
    also at tls://."""
    received = []

    async def main():
        ended = asyncio.Event()

        async def serve(reader, writer):
            writer.write(b'INFO {"server_id": "a", "version": "2.10.0", "max_payload": 1024}\r\n')
            received.append(await reader.read())
            writer.close()
            ended.set()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            upstream = NatsKv(f"{scheme}://u:s3cret@127.0.0.1:{port}", bucket="b", **options)
            try:
                with pytest.raises(UpstreamRefused, match="the server has none"):
                    await upstream.identify()
            finally:
                await upstream.close()
            async with asyncio.timeout(60):
                await ended.wait()

    asyncio.run(main())
    assert received == [b""]


@in_virtual_time
async def test_a_server_that_does_not_answer_is_given_up():
    connection, client = connected()
    client.error = asyncio.Event()
    with pytest.raises(UpstreamLost, match="TimeoutError"):
        await connection.open()
    now = asyncio.get_running_loop().time()
    assert now <= nats_connection.CONNECT_S + 1 + nats_connection.CLOSE_S


@in_virtual_time
async def test_an_exit_while_connecting_closes_the_connection():
    connection, client = connected()
    client.error = asyncio.CancelledError()
    with pytest.raises(asyncio.CancelledError):
        await connection.open()
    assert client.transport_closed


@in_virtual_time
async def test_closing_ends_though_nats_py_does_not_and_a_closed_one_is_not_closed_again():
    connection, client = connected()
    client.clings = True
    await connection.close()
    assert asyncio.get_running_loop().time() == nats_connection.CLOSE_S
    assert client.transport_closed
    client.is_closed, client._transport = True, None
    await connection.close()


# Requests.


@in_virtual_time
async def test_a_request_is_answered():
    connection, client = connected()
    client.answer = {"a": 1}
    assert await connection.request("INFO.b", {"x": 2}) == {"a": 1}
    await connection.tell("NEXT.b", b"body", "reply")
    assert client.asked == [("$API.INFO.b", {"x": 2}), ("$API.NEXT.b", b"body", "reply")]


@pytest.mark.parametrize(
    ("answer", "kind", "reason"),
    [
        ({"error": {"err_code": 10059}}, UpstreamMissing, "does not exist"),
        ({"error": {"err_code": 10039}}, UpstreamRefused, "not enabled"),
        ({"error": {"err_code": 10037, "description": "no message"}}, NoMessage, "b: no message"),
        ({"error": {"err_code": 1, "description": "else"}}, UpstreamLost, "b: else"),
        ({"error": {"code": 500}}, UpstreamLost, "500"),
        (b"no json", UpstreamLost, "b: "),
        (errors.NoRespondersError(), UpstreamLost, "JetStream does not answer"),
        (errors.Error("s3cret"), UpstreamLost, r"b: .*\*\*\*"),
        (TimeoutError(), UpstreamLost, "b: TimeoutError"),
        (OSError("broken"), UpstreamLost, "b: broken"),
        (asyncio.CancelledError(), UpstreamLost, "the connection is lost"),
    ],
)
@in_virtual_time
async def test_a_request_that_fails_says_why(answer, kind, reason):
    connection, client = connected()
    client.answer = answer
    with pytest.raises(kind, match=reason) as caught:
        await connection.request("INFO", {})
    assert type(caught.value) is kind


@in_virtual_time
async def test_a_request_that_is_cancelled_from_outside_is_cancelled():
    connection, client = connected()
    client.answer = None
    task = asyncio.ensure_future(connection.request("INFO", {}))
    await asyncio.sleep(1)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
    assert client.cancelled == 1


@in_virtual_time
async def test_a_failed_send_is_a_lost_connection():
    connection, client = connected()
    client.error = errors.ConnectionClosedError()
    with pytest.raises(UpstreamLost):
        await connection.tell("NEXT", b"", "r")


# A connection that is lost, and permissions that are denied.


@pytest.mark.parametrize("way", ["told", "found"])
@in_virtual_time
async def test_a_lost_connection_is_told_and_wakes_all_who_wait(way):
    connection, client = connected()
    woken = []
    connection.check()
    connection.wire.receivers[b"1"] = SimpleNamespace(wake=lambda: woken.append(1))
    if way == "told":
        await connection._on_lost()
        assert (woken, connection.is_lost) == ([1], True)
    else:
        client.is_connected = False
    with pytest.raises(UpstreamLost, match="the connection is lost"):
        await connection.request("INFO", {})


DENIED = "Permissions Violation for Publish to $JS.API."


@in_virtual_time
async def test_a_denied_permission_ends_the_request_that_would_never_be_answered():
    connection, client = connected()
    client.answer = None
    loop = asyncio.get_running_loop()
    error = Exception(DENIED + "STREAM.INFO.KV_s3cret")
    loop.call_later(1, lambda: loop.create_task(connection._on_error(error)))
    with pytest.raises(UpstreamRefused, match=r"STREAM.INFO.KV_\*\*\*"):
        await connection.request("INFO", {})
    assert (loop.time(), client.cancelled) == (1, 1)
    await connection._on_error(Exception("another one"))
    with pytest.raises(UpstreamRefused, match=r"STREAM\.INFO"):
        connection.check()


@pytest.mark.parametrize(
    "said", [DENIED + "CONSUMER.DELETE.b", DENIED + "CONSUMER.INFO.b", "Stale Connection"]
)
@in_virtual_time
async def test_what_a_mirror_can_do_without_is_not_refused(said):
    connection, _ = connected()
    await connection._on_error(Exception(said))
    connection.check()
    assert not connection.denied.is_set()


@in_virtual_time
async def test_a_permission_that_is_denied_as_a_request_fails_is_the_reason(monkeypatch):
    connection, client = connected()

    async def denied(*arguments, timeout):
        await connection._on_error(Exception(DENIED + "x"))
        raise TimeoutError

    monkeypatch.setattr(client, "request", denied)
    with pytest.raises(UpstreamRefused, match="Permissions"):
        await connection.request("INFO", {})
    client.is_connected = False
    with pytest.raises(UpstreamRefused):
        connection.check()


# Addresses and secrets.


def test_the_longest_form_of_a_secret_is_taken_out_first():
    secrets = secrets_of(["nats://u:pass@h", "nats://tok@h", "nats://h"], {"password": "pass/word"})
    assert secrets == ["pass%2Fword", "pass/word", "pass", "tok"]


def test_every_form_of_a_secret_is_kept_out_of_what_is_told():
    urls = ["nats://u:p%40ss%2Fword@h", "nats://t0ken@h"]
    found = secrets_of(urls, {"password": "pa ss", "token": None})
    assert {"p@ss/word", "p%40ss%2Fword", "t0ken", "pa ss", "pa%20ss"} <= set(found)


@pytest.mark.parametrize(
    "url", [" nats://h:1 ", "tls://u:p@h", "ws://h", "wss://h", "nats://[::1]:4"]
)
def test_an_address_may_have_blanks_around_it(url):
    assert checked_url(url) == url.strip()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://u:p@h:1", "nats://h:1"),
        ("tls://h", "tls://h"),
        ("nats://t@[::1]:4", "nats://[::1]:4"),
    ],
)
def test_an_address_is_shown_without_its_secrets(url, shown):
    assert bare(url) == shown
