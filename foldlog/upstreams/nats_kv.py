"""A bucket of NATS JetStream KV, as an upstream. Uses nats-py only for the connection: its own
watch drops messages that it cannot buffer.

    nats_kv.py          the bucket: its identity, changes, state, revisions
    nats_pull.py        reads a consumer by pull requests, and proves that nothing is missing
    nats_wire.py        decodes messages in runs
    nats_bulk.py        decodes large reads, in a few calls
    nats_connection.py  connects, asks the API, and explains failures

Everything is read through pull consumers: named, ephemeral, in memory, without acknowledgements.
Sequences alone do not reveal every missed change: deletes may be purged, keys may expire silently,
and a stream may be restored from a backup. The link's audits find these through `revisions`.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from hashlib import blake2b
from typing import Any, cast

from foldlog.protocol.tokens import NAME_BYTES, WatchCursor
from foldlog.protocol.updates import UpdateColumns, fold_versions
from foldlog.protocol.upstream import (
    Changes,
    Identity,
    Prefixes,
    Revisions,
    UpstreamLost,
)
from foldlog.upstreams.checking import check_texts, check_tls
from foldlog.upstreams.nats_connection import Connection, NoMessage, bare, checked_url
from foldlog.upstreams.nats_pull import Pass, Piece, Pull
from foldlog.upstreams.nats_wire import nanoseconds

INACTIVE_S = 10.0
"""The server removes a consumer that was idle for this long, such as one left by a killed
client."""
INCARNATION_BYTES = 8
_DOMAIN = re.compile(r"[^\s.*>]+")
_BUCKET = re.compile(r"[A-Za-z0-9_-]+")


class NatsKv:
    """The bucket `bucket` of the JetStream at `url` (nats://HOST:PORT or tls://HOST:PORT; separate
    several with commas).

    `user` and `password`, `token`, `credentials` (a file) and `tls` (an ssl.SSLContext) are passed
    to nats-py; the user may also be part of the URL. With tls:// or `tls`, nothing is sent to a
    server without TLS: UpstreamRefused. `credentials` need nkeys (`nats-py[nkeys]`). `domain`: the
    JetStream domain. Secrets never appear in a repr, a reason or a log. ValueError for an invalid
    address or bucket name.
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
        check_texts(
            url=url,
            user=user,
            password=password,
            token=token,
            credentials=credentials,
            domain=domain,
        )
        check_tls(tls)
        if domain and not _DOMAIN.fullmatch(domain):  # a token of subjects
            raise ValueError("a domain has no blanks, dots or wildcards")
        self._servers = [checked_url(each) for each in url.split(",")]
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
        self._connection: Connection | None = None

    def __repr__(self) -> str:
        hosts = ",".join(bare(server) for server in self._servers)
        return f"NatsKv({hosts!r}, bucket={self.bucket!r})"

    async def identify(self) -> Identity:
        """Connect, and identify the stream by its name, domain and creation time. UpstreamLost if
        it has no current leader."""
        if self._connection is not None and self._connection.is_lost:
            await self.close()
        if self._connection is None:
            connection = Connection(repr(self), self._servers, self._options, self._api)
            await connection.open()
            self._connection = connection
        return await self._identity()

    def _connected(self) -> Connection:
        """The connection of this attachment. Never a new one: what was received on the old one may
        belong to a server that went back since."""
        if self._connection is None:
            raise UpstreamLost(f"{self!r} is not connected")
        self._connection.check()
        return self._connection

    async def _identity(self) -> Identity:
        info = await self._connected().request(f"STREAM.INFO.{self._stream}", {})
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
            answer = await self._connected().request(subject, {"seq": position.as_u64() or 0})
        except NoMessage:
            return None
        return _mark(nanoseconds(answer["message"]["time"])) == mark

    async def changes(self, after: WatchCursor, prefixes: Prefixes) -> AsyncIterator[Changes]:
        start = {"deliver_policy": "by_start_sequence", "opt_start_seq": (after.as_u64() or 0) + 1}
        async with contextlib.aclosing(self._consume(start, prefixes)) as pieces:
            async for piece in pieces:
                mark = b""
                if piece.last:
                    after, mark = WatchCursor.from_u64(piece.last), _mark(piece.stored_ns)
                yield Changes(piece.updates, after, piece.pending, mark)

    async def state(self, prefixes: Prefixes) -> AsyncIterator[Changes]:
        """One pass over the last message of each key. Complete up to its last position."""
        at, mark = (await self._identity()).last, b""
        start = {"deliver_policy": "last_per_subject"}
        async with contextlib.aclosing(self._consume(start, prefixes, upto=at)) as pieces:
            async for piece in pieces:
                last = WatchCursor.from_u64(piece.last)
                if last >= at:
                    at, mark = last, _mark(piece.stored_ns)
                yield Changes(piece.updates, at, None, mark)

    async def revisions(self, prefixes: Prefixes) -> Revisions:
        """All live keys and their revisions, from one pass without values. Cost: about 3 us a
        key."""
        at = (await self._identity()).last
        found: dict[str, bytes] = {}
        start = {"deliver_policy": "last_per_subject", "headers_only": True}
        async with contextlib.aclosing(self._consume(start, prefixes, upto=at)) as pieces:
            async for piece in pieces:
                fold_versions(found, piece.updates)
                if piece.last:
                    at = max(at, WatchCursor.from_u64(piece.last))
        return Revisions(found, at)

    async def _consume(
        self, start: dict[str, Any], prefixes: Prefixes, *, upto: WatchCursor | None = None
    ) -> AsyncGenerator[Piece, None]:
        """What a new consumer delivers, in pieces: with `upto`, one pass that is complete up to
        that position; otherwise without end."""
        connection = self._connected()
        client = connection.client
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
        pull = Pull(connection, f"CONSUMER.MSG.NEXT.{self._stream}.{name}", inbox, self._subjects)
        subscription = await client.subscribe(f"{inbox}.*")
        sid = str(cast(Any, subscription)._id).encode()
        connection.wire.receivers[sid] = pull.receiver
        try:
            made = await connection.request(f"CONSUMER.CREATE.{self._stream}.{name}", body)
            only: Pass | None = None
            if upto is None:
                yield Piece(UpdateColumns([], [], []), pending=made.get("num_pending"))
            else:
                only = Pass(
                    upto.as_u64() or 0,
                    lambda: self._where(connection, name),
                    drops_oversize=_is_before_2_10(client.connected_server_version),
                )
            async with contextlib.aclosing(pull.pieces(only)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            pull.close()
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()
            connection.wire.receivers.pop(sid, None)
            if client.is_connected:  # best effort: the server removes idle consumers anyway
                with contextlib.suppress(Exception):
                    delete = f"CONSUMER.DELETE.{self._stream}.{name}"
                    await connection.tell(delete, b"", client.new_inbox())
                    await client.flush(1)

    async def _where(self, connection: Connection, consumer: str) -> tuple[int, int]:
        """The messages that a consumer has sent, and the stream sequence it has reached."""
        info = await connection.request(f"CONSUMER.INFO.{self._stream}.{consumer}", {})
        return int(info["delivered"]["consumer_seq"]), int(info["delivered"]["stream_seq"])

    async def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


def _mark(stored_ns: int) -> bytes:
    """What a position is recognized by: when its message was stored."""
    return stored_ns.to_bytes(8, "big")


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
    if _is_before_2_10(version):
        root, name, _ = filters[0].split(".", 2)
        return {"filter_subject": f"{root}.{name}.>"}
    return {"filter_subjects": filters}


def _is_before_2_10(version: Any) -> bool:
    return (version.major, version.minor) < (2, 10)
