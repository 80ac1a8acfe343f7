"""A bucket of NATS JetStream KV. Uses nats-py only for the connection: its own watch drops messages
that it cannot buffer.

Everything is read through pull consumers: named, ephemeral, in memory, without acknowledgements.
The number of messages requested gives back-pressure, the consumer's sequence proves that none was
lost, and heartbeats show that the server is alive. On any gap, silence or unexpected answer, the
connection is dropped and the link reconnects.

Sequences alone do not reveal every missed change: deletes may be purged, keys may expire silently,
and a stream may be restored from a backup. The link's audits find these through `revisions`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import secrets
import ssl
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from datetime import UTC, datetime
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit

from foldlog.protocol.tokens import NAME_BYTES, VersionToken, WatchCursor
from foldlog.protocol.updates import Delete, Purge, Put, Update
from foldlog.protocol.upstream import (
    Changes,
    Identity,
    Prefixes,
    Revisions,
    UpstreamLost,
    UpstreamMissing,
    UpstreamRefused,
)

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg

REQUEST_MESSAGES = 1000
REQUEST_BYTES = 8 * 1024 * 1024
OPEN_REQUESTS = 2
PIECE_UPDATES = 1000
PIECE_BYTES = 1024 * 1024
EXPIRES_S = 30.0
HEARTBEAT_S = 1.0
SILENCE_S = 3.0
"""After this long without a message or heartbeat, the consumer is considered dead."""
INACTIVE_S = 10.0
"""The server removes a consumer that was idle for this long, such as one left by a killed
client."""
CONNECT_S = 5.0
REQUEST_S = 5.0
RETRY_S = 0.02
"""Between two attempts to reach a server. Longer back-off is up to the link."""
INCARNATION_BYTES = 8
_BUCKET = re.compile(r"[A-Za-z0-9_-]+")
_new_bytes = bytes.__new__
_MARKER = "Nats-Marker-Reason"
_OPERATION = "KV-Operation"


class NatsKv:
    """The bucket `bucket` of the JetStream at `url` (nats://HOST:PORT or tls://HOST:PORT; separate
    several with commas).

    `user` and `password`, `token`, `credentials` (a file) and `tls` (an ssl.SSLContext) are passed
    to nats-py; the user may also be part of the URL. `domain`: the JetStream domain. Secrets never
    appear in a repr, a reason or a log. ValueError for an invalid address or bucket name.
    """

    def __init__(
        self,
        url: str,
        *,
        bucket: str,
        user: str | None = None,
        password: str | None = None,
        token: str | None = None,
        credentials: str | None = None,
        tls: ssl.SSLContext | None = None,
        domain: str | None = None,
    ) -> None:
        if not isinstance(bucket, str) or not _BUCKET.fullmatch(bucket):
            raise ValueError("a bucket's name is letters, digits, _ and -, and not empty")
        self._servers = [_checked(each) for each in url.split(",")]
        self.bucket, self._stream = bucket, f"KV_{bucket}"
        self._subjects = f"$KV.{bucket}."
        self._api = f"$JS.{domain}.API" if domain else "$JS.API"
        self._domain = domain or ""
        self._options: dict[str, Any] = {
            "user": user,
            "password": password,
            "token": token,
            "user_credentials": credentials,
            "tls": tls,
        }
        self._secrets = [each for each in (password, token) if each]
        for server in self._servers:
            parts = urlsplit(server)
            secret = parts.password or parts.username  # a user without a password is a token
            if secret:
                self._secrets.append(unquote(secret))
        self._client: Client | None = None
        self._lost: asyncio.Event | None = None
        self._error = ""
        self._filters: list[str] | None = None

    def __repr__(self) -> str:
        hosts = ",".join(_bare(server) for server in self._servers)
        return f"NatsKv({hosts!r}, bucket={self.bucket!r})"

    # The connection.

    async def _connect(self) -> Client:
        client = self._client
        if client is not None and client.is_connected:
            return client
        nats, errors = _nats()
        await self.close()
        client = cast("Client", nats.aio.client.Client())
        cast(Any, client)._process_headers = _headers  # nats-py's own takes 20 us
        lost = self._lost = asyncio.Event()

        async def on_error(error: Exception) -> None:
            self._error = self._clean(error)

        async def on_closed() -> None:
            lost.set()

        options = {name: value for name, value in self._options.items() if value is not None}
        self._error = ""
        try:
            async with asyncio.timeout(CONNECT_S + 1):
                await client.connect(
                    self._servers,
                    allow_reconnect=False,
                    # By default, a first connection is tried 60 times, 2 s apart.
                    max_reconnect_attempts=1,
                    reconnect_time_wait=cast(int, RETRY_S),
                    connect_timeout=int(CONNECT_S),
                    ping_interval=5,
                    max_outstanding_pings=2,
                    error_cb=on_error,
                    closed_cb=on_closed,
                    disconnected_cb=on_closed,
                    name="foldlog",
                    **options,
                )
        except (OSError, TimeoutError, errors.Error) as error:
            await _abandon(client)
            told = self._error if isinstance(error, errors.NoServersError) else ""
            reason = told or self._clean(error) or type(error).__name__
            said = f"{error} {self._error}".lower()
            if "authorization" in said or "authentication" in said:
                raise UpstreamRefused(f"{self!r} refuses the credentials: {reason}") from None
            if isinstance(error, ssl.SSLCertVerificationError):
                raise UpstreamRefused(f"{self!r}: {reason}") from None
            raise UpstreamLost(f"{self!r} cannot be reached: {reason}") from None
        except ValueError as error:  # credentials that nats-py cannot read
            await _abandon(client)
            raise UpstreamRefused(f"{self!r}: {self._clean(error)}") from None
        except BaseException:
            await _abandon(client)
            raise
        self._client = client
        return client

    def _clean(self, error: BaseException) -> str:
        text = str(error)
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    async def _request(self, subject: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request of the JetStream API. UpstreamLost, UpstreamMissing or
        UpstreamRefused."""
        client, (_, errors) = await self._connect(), _nats()
        try:
            reply = await client.request(
                f"{self._api}.{subject}", json.dumps(body).encode(), timeout=REQUEST_S
            )
            answer: dict[str, Any] = json.loads(reply.data)
        except errors.NoRespondersError:
            raise UpstreamLost(f"{self!r}: JetStream does not answer") from None
        except (OSError, TimeoutError, ValueError, errors.Error) as error:
            if "permissions" in f"{error} {self._error}".lower():
                raise UpstreamRefused(f"{self!r}: {self._error or self._clean(error)}") from None
            raise UpstreamLost(f"{self!r}: {self._clean(error) or type(error).__name__}") from None
        if "error" in answer:
            raise self._api_error(answer["error"])
        return answer

    def _api_error(self, error: dict[str, Any]) -> Exception:
        reason = f"{self!r}: {error.get('description', error)}"
        if error.get("err_code") == 10059:
            return UpstreamMissing(f"{self!r}: the bucket does not exist")
        if error.get("err_code") == 10037:
            return _NoMessage(reason)
        if error.get("err_code") == 10039:
            return UpstreamRefused(f"{self!r}: JetStream is not enabled for this account")
        return UpstreamLost(reason)

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None and not client.is_closed:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(2.0):
                    await client.close()

    # The seam.

    async def identify(self) -> Identity:
        """Identify the stream by its name, domain and creation time. UpstreamLost if it has no
        current leader."""
        info = await self._request(f"STREAM.INFO.{self._stream}", {})
        cluster = info.get("cluster") or {}
        if cluster.get("replicas"):
            behind = sum(not peer.get("current") for peer in cluster["replicas"])
            if not cluster.get("leader") or 2 * behind > len(cluster["replicas"]):
                raise UpstreamLost(f"{self!r}: the stream has no current leader")
        name = blake2b(f"nats\0{self._domain}\0{self._stream}".encode(), digest_size=NAME_BYTES)
        made = blake2b(str(info.get("created")).encode(), digest_size=INCARNATION_BYTES)
        last = int(info["state"]["last_seq"])
        origin = name.digest() + made.digest()
        return Identity(origin, WatchCursor.none(), WatchCursor.from_u64(last))

    async def recalls(self, position: WatchCursor, mark: bytes) -> bool | None:
        """True if the message at `position` was stored at the time in `mark`. None if it no longer
        exists."""
        subject = f"STREAM.MSG.GET.{self._stream}"
        try:
            answer = await self._request(subject, {"seq": position.as_u64() or 0})
        except _NoMessage:
            return None
        return _nanoseconds(answer["message"]["time"]).to_bytes(8, "big") == mark

    async def changes(self, after: WatchCursor, prefixes: Prefixes) -> AsyncIterator[Changes]:
        start = {"deliver_policy": "by_start_sequence", "opt_start_seq": (after.as_u64() or 0) + 1}
        async with contextlib.aclosing(self._consume(start, prefixes)) as pieces:
            async for piece in pieces:
                mark = b""
                if piece.last:
                    after, mark = WatchCursor.from_u64(piece.last), piece.mark
                yield Changes(piece.updates, after, piece.pending, mark)

    async def state(self, prefixes: Prefixes) -> AsyncIterator[Changes]:
        """One pass over the last message of each key. Complete up to its last position."""
        at, mark = (await self.identify()).last, b""
        start = {"deliver_policy": "last_per_subject"}
        async with contextlib.aclosing(self._consume(start, prefixes, once=True)) as pieces:
            async for piece in pieces:
                last = WatchCursor.from_u64(piece.last)
                if last >= at:
                    at, mark = last, piece.mark
                yield Changes(piece.updates, at, None, mark)

    async def revisions(self, prefixes: Prefixes) -> Revisions:
        """All live keys and their revisions, from one pass without values. Cost: 4.4 us a key."""
        at = (await self.identify()).last
        found: dict[str, bytes] = {}
        start = {"deliver_policy": "last_per_subject", "headers_only": True}
        async with contextlib.aclosing(self._consume(start, prefixes, once=True)) as pieces:
            async for piece in pieces:
                for update in piece.updates:
                    if type(update) is Put:
                        found[update.key] = update.version
                    else:
                        found.pop(update.key, None)
                if piece.last:
                    at = max(at, WatchCursor.from_u64(piece.last))
        return Revisions(found, at)

    async def _consume(
        self, start: dict[str, Any], prefixes: Prefixes, *, once: bool = False
    ) -> AsyncGenerator[_Piece, None]:
        """What a new consumer delivers, in pieces: with `once`, until nothing is pending; otherwise
        without end."""
        client = await self._connect()
        name = f"foldlog-{secrets.token_hex(8)}"
        config: dict[str, Any] = {
            "name": name,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": int(INACTIVE_S * 1e9),
            **start,
        }
        filters = _filters(self._subjects, prefixes)
        config |= _filter_config(filters, client.connected_server_version)
        body = {"stream_name": self._stream, "config": config}
        inbox = client.new_inbox()
        pull = _Pull(self, client, f"{self._api}.CONSUMER.MSG.NEXT.{self._stream}.{name}", inbox)
        subscription = await client.subscribe(
            f"{inbox}.*", pending_msgs_limit=0, pending_bytes_limit=0
        )
        # Replaces nats-py's queue, which costs a task switch or a timer per message.
        cast(Any, subscription)._pending_queue = pull
        try:
            made = await self._request(f"CONSUMER.CREATE.{self._stream}.{name}", body)
            if not once:
                yield _Piece([], 0, made.get("num_pending"))
            async with contextlib.aclosing(pull.pieces(once)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()
            if client.is_connected:  # best effort: the server removes idle consumers anyway
                with contextlib.suppress(Exception):
                    await client.publish(
                        f"{self._api}.CONSUMER.DELETE.{self._stream}.{name}",
                        b"",
                        client.new_inbox(),
                    )
                    await client.flush(1)

    def update_of(self, msg: Msg, sequence: int) -> Update:
        """The update in a message of the stream."""
        key = msg.subject[len(self._subjects) :]
        version = _new_bytes(VersionToken, sequence.to_bytes(8, "big"))  # 8 bytes: needs no check
        headers = msg.headers
        if headers:
            operation = headers.get(_OPERATION)
            if operation == "DEL":
                return Delete(key, version)
            if operation == "PURGE" or headers.get(_MARKER) is not None:
                return Purge(key, version)
        return Put(key, msg.data, version)


class _Piece(NamedTuple):
    updates: list[Update]
    last: int
    """The stream sequence of the last message; 0 if there was none."""
    pending: int | None
    mark: bytes = b""
    """The time when the last message was stored: nanoseconds, as 8 bytes."""
    size: int = 0
    """Bytes of values."""


def _joined(first: _Piece, second: _Piece) -> _Piece:
    if not second.last:
        return first
    size = first.size + second.size
    return second._replace(updates=[*first.updates, *second.updates], size=size)


class _NoMessage(UpstreamLost):
    pass


class _Pull:
    """Requests messages from a consumer, receives them, and checks that none is missing."""

    def __init__(self, kv: NatsKv, client: Client, subject: str, inbox: str) -> None:
        self._kv, self._client, self._subject, self._inbox = kv, client, subject, inbox
        self._waiting: deque[Msg] = deque()
        self._woken = asyncio.Event()
        # Open requests, oldest first: number -> messages that it may still deliver.
        self._open: dict[int, int] = {}
        self._number = 0
        self._brought: set[int] = set()  # requests that delivered something
        self._single = False  # request one message, without a limit on its size
        self._delivered = 0
        self._pending: int | None = None
        self._heard = time.monotonic()
        self._ended = False

    # The queue that nats-py puts messages into: it uses only these methods.

    def put_nowait(self, msg: Msg) -> None:
        self._waiting.append(msg)
        self._woken.set()

    def empty(self) -> bool:
        return not self._waiting

    def qsize(self) -> int:
        return len(self._waiting)

    async def pieces(self, once: bool) -> AsyncGenerator[_Piece, None]:
        """The messages in pieces. With `once`, they end when nothing is pending."""
        await self._ask(once)
        heard = self._heard = time.monotonic()
        held = _Piece([], 0, None)
        while True:
            if not self._waiting:
                await self._wait()
            piece = self._take()
            if once:  # nobody needs parts of a pass early: use fewer, larger pieces
                held = _joined(held, piece)
                piece = held
                if (
                    not self._ended
                    and len(held.updates) < PIECE_UPDATES
                    and held.size < PIECE_BYTES
                ):
                    await self._ask(once)
                    continue
                held = _Piece([], 0, None)
            if self._ended:
                if piece.updates:
                    yield piece
                return
            if piece.updates or (self._heard > heard and not once):  # silence proves nothing
                yield piece
            heard = self._heard
            await self._ask(once)

    async def _wait(self) -> None:
        self._woken.clear()
        lost = self._kv._lost
        try:
            async with asyncio.timeout(
                HEARTBEAT_S / 2
            ):  # not wait_for, which swallows cancellations
                await self._woken.wait()
        except TimeoutError:
            if lost is not None and lost.is_set():
                raise UpstreamLost(f"{self._kv!r}: the connection is lost") from None
            if time.monotonic() - self._heard > SILENCE_S:
                raise UpstreamLost(f"{self._kv!r}: no heartbeat for {SILENCE_S} s") from None

    async def _ask(self, once: bool) -> None:
        """Keep enough requests open. The server may send no more than they ask for."""
        while len(self._open) < (1 if self._single else OPEN_REQUESTS):
            self._number += 1
            count = 1 if self._single else REQUEST_MESSAGES
            request: dict[str, Any] = {"batch": count}
            if not self._single:
                request["max_bytes"] = REQUEST_BYTES
            if once:
                request["no_wait"] = True
            else:
                request["expires"] = int(EXPIRES_S * 1e9)
                request["idle_heartbeat"] = int(HEARTBEAT_S * 1e9)
            self._single = False
            self._open[self._number] = count
            await self._client.publish(
                self._subject, json.dumps(request).encode(), f"{self._inbox}.{self._number}"
            )

    def _take(self) -> _Piece:
        """The messages received, up to the size of a piece. Cost: 3 us a message, plus nats-py's
        own."""
        updates: list[Update] = []
        size, reply = 0, ""
        waiting, update_of = self._waiting, self._kv.update_of
        if waiting:
            self._heard = time.monotonic()
        counted = 0  # `updates` already subtracted from open requests
        while waiting and len(updates) < PIECE_UPDATES and size < PIECE_BYTES:
            msg = waiting.popleft()
            if not msg.reply.startswith("$JS.ACK."):
                self._count_down(len(updates) - counted)
                counted = len(updates)
                self._status(msg)
                continue
            reply = msg.reply
            tokens = reply.split(".")
            end = len(tokens) if len(tokens) < 12 else 11  # see `sequences_of`
            delivered = int(tokens[end - 3])
            if delivered != self._delivered + 1:
                raise UpstreamLost(
                    f"{self._kv!r}: message {delivered} of the consumer came after "
                    f"{self._delivered}"
                )
            self._delivered = delivered
            updates.append(update_of(msg, int(tokens[end - 4])))
            size += len(msg.data)
        self._count_down(len(updates) - counted)
        if not reply:
            return _Piece(updates, 0, self._pending if not waiting else None)
        _, last, stored_ns, self._pending = sequences_of(reply)
        pending = self._pending if not waiting else None
        return _Piece(updates, last, pending, stored_ns.to_bytes(8, "big"), size)

    def _count_down(self, messages: int) -> None:
        """Subtract `messages` from what open requests may still deliver. The server serves the
        oldest first."""
        while messages and self._open:
            number = next(iter(self._open))
            used = min(messages, self._open[number])
            messages -= used
            self._open[number] -= used
            self._brought.add(number)
            if not self._open[number]:
                del self._open[number]
                self._brought.discard(number)

    def _status(self, msg: Msg) -> None:
        """Handle a status: a heartbeat, or the end of a request."""
        headers = msg.headers or {}
        status, text = headers.get("Status", ""), headers.get("Description", "").lower()
        number = int(msg.subject.rpartition(".")[2])
        if status == "100":
            told = headers.get("Nats-Last-Consumer")
            if told is not None and int(told) > self._delivered:
                raise UpstreamLost(f"{self._kv!r}: messages up to {told} of the consumer are lost")
            self._pending = 0  # idle although requests are open: nothing is pending
            return
        brought = number in self._brought
        self._open.pop(number, None)
        self._brought.discard(number)
        if status == "404":
            self._ended = True
            self._pending = 0
        elif status == "409" and "message size exceeds" in text:
            self._single = not brought
        elif status != "408" and not (status == "409" and "batch completed" in text):
            raise UpstreamLost(f"{self._kv!r}: {status} {headers.get('Description', '')}")


_parsed: dict[bytes, dict[str, str]] = {}


async def _headers(raw: bytes | bytearray | None) -> dict[str, str] | None:
    """The headers of a message, with its status if it has one. Cached: most messages have the same
    headers."""
    if not raw:
        return None
    key = bytes(raw)
    headers = _parsed.get(key)
    if headers is None:
        first, *lines = key.decode("utf-8", "replace").split("\r\n")
        _, _, status = first.partition(" ")
        fields = (line.partition(":") for line in lines if line)
        headers = {name.strip(): value.strip() for name, _, value in fields}
        if status.strip():
            code, _, description = status.strip().partition(" ")
            headers |= {"Status": code, "Description": description.strip()}
        if len(_parsed) >= 256:
            _parsed.clear()
        _parsed[key] = headers
    return headers


def sequences_of(reply: str) -> tuple[int, int, int, int]:
    """(consumer sequence, stream sequence, time stored in ns, messages pending) from a message's
    reply subject.

    Tokens are counted from the end, because domains add some in front: ... stream sequence,
    consumer sequence, time, pending[, random].
    """
    tokens = reply.split(".")
    end = len(tokens) if len(tokens) < 12 else 11
    stream, consumer, stored_ns, pending = map(int, tokens[end - 4 : end])
    return consumer, stream, stored_ns, pending


def _nanoseconds(time_text: str) -> int:
    """A time in the server's notation, 2026-01-02T03:04:05.123456789Z, in nanoseconds since
    1970."""
    whole, _, fraction = time_text.rstrip("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp())
    return seconds * 1_000_000_000 + int(fraction.ljust(9, "0") or 0)


async def _abandon(client: Client) -> None:
    """Close a client that failed to connect; nats-py would leave its transport open."""
    with contextlib.suppress(Exception):
        await client.close()
    transport: Any = client._transport
    if transport is not None:
        with contextlib.suppress(Exception):
            transport.close()


def _filters(subjects: str, prefixes: Prefixes) -> list[str]:
    """Subject filters that cover all keys under `prefixes`, cut at the last complete token. None
    overlaps another."""
    stems = sorted({_stem(prefix) for prefix in prefixes} or {""})
    kept: list[str] = []
    for stem in stems:
        if not any(stem.startswith(other) for other in kept):
            kept.append(stem)
    return [f"{subjects}{stem}>" for stem in kept]


def _stem(prefix: str) -> str:
    stem: list[str] = []
    for token in prefix.split(".")[:-1]:
        if not token or re.search(r"[*>\s]", token):
            break
        stem.append(token + ".")
    return "".join(stem)


def _filter_config(filters: list[str], version: Any) -> dict[str, Any]:
    if len(filters) == 1:
        return {"filter_subject": filters[0]}
    if (version.major, version.minor) >= (2, 10):
        return {"filter_subjects": filters}
    return {"filter_subject": filters[0].split(".", 2)[0] + "." + filters[0].split(".")[1] + ".>"}


def _checked(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        _ = parts.port
    except ValueError as error:
        raise ValueError(f"not an address: {error}") from None
    if parts.scheme not in ("nats", "tls", "ws", "wss") or not parts.hostname:
        raise ValueError("an address is nats://HOST:PORT or tls://HOST:PORT")
    return url.strip()


def _bare(url: str) -> str:
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname}{port}"


def _nats() -> tuple[Any, Any]:
    try:
        import nats.aio.client
        import nats.errors
    except ImportError:
        raise UpstreamRefused("NatsKv needs nats-py: pip install 'foldlog[nats]'") from None
    return nats, nats.errors
