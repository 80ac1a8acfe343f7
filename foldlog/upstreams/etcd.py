"""The keys under a prefix of etcd (3.4 or newer), through its JSON gateway over HTTP. Needs no
client library.

A position is a revision. Several changes may share one; etcd sends them in one answer, so positions
are always complete. The state is read at one revision, page by page. etcd refuses a watch from
before a compaction and names the compacted revision; the link then folds the difference from the
state.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Iterator
from hashlib import blake2b
from typing import Any
from urllib.parse import unquote, urlsplit

from foldlog.protocol.tokens import NAME_BYTES, VersionToken, WatchCursor
from foldlog.protocol.updates import Delete, Put, Update
from foldlog.protocol.upstream import (
    Changes,
    Identity,
    Prefixes,
    Revisions,
    UpstreamError,
    UpstreamLost,
    UpstreamRefused,
)
from foldlog.upstreams.checking import check_texts, check_tls
from foldlog.upstreams.http_json import HttpError, Stream, post, stream

PAGE_KEYS = 5_000
LOOK_S = 1.0
"""How often to ask for the revision while no change arrives: bounds how long a dead server goes
unnoticed."""
REQUEST_S = 10.0
_UNAUTHENTICATED, _PERMISSION_DENIED, _INVALID = 16, 7, 3


class Etcd:
    """The keys that start with `prefix` in the etcd at `url` (http://HOST:PORT or
    https://HOST:PORT). "" selects all keys.

    `user` and `password` may also be part of the URL. `tls`: an ssl.SSLContext for https. Secrets
    never appear in a repr, a reason or a log. ValueError if `url` is not such an address.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "",
        user: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        check_texts(url=url, prefix=prefix, user=user, password=password)
        check_tls(tls)
        try:
            parts = urlsplit(url)
            port = parts.port
            host = parts.hostname if parts.scheme in ("http", "https") else None
        except ValueError:
            host = None
        if not host:  # shows nothing of it, because it may contain a password
            raise ValueError("an address is http://HOST:PORT or https://HOST:PORT")
        self._host, self._port = host, port or 2379
        self._tls = tls or (ssl.create_default_context() if parts.scheme == "https" else None)
        self.prefix = prefix
        self._user = user or (unquote(parts.username) if parts.username else None)
        self._password = password or unquote(parts.password or "")
        self._token = ""
        self._compacted = 0
        """The compacted revision reported when a watch was refused; 0 if none."""

    def __repr__(self) -> str:
        scheme = "https" if self._tls else "http"
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"Etcd('{scheme}://{host}:{self._port}', prefix={self.prefix!r})"

    async def identify(self) -> Identity:
        """The cluster and its revision, as agreed by a majority of its members."""
        with self._understood():
            if self._user and not self._token:
                body = {"name": self._user, "password": self._password}
                self._token = str((await self._post("/v3/auth/authenticate", body))["token"])
            header = (await self._range({"limit": 1, "keys_only": True}))["header"]
            cluster = int(header["cluster_id"]).to_bytes(8, "big")
            last = WatchCursor.from_u64(int(header["revision"]))
        name = blake2b(f"etcd\0{self.prefix}".encode(), digest_size=NAME_BYTES).digest()
        first = WatchCursor.from_u64(max(self._compacted - 1, 0))
        return Identity(name + cluster, first, last)

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        """UpstreamLost for JSON that no gateway sends: a proxy, or another server at the address,
        may answer for a time."""
        try:
            yield
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError):
            raise UpstreamLost(f"{self!r}: the answer is not that of an etcd") from None

    async def changes(self, after: WatchCursor, prefixes: Prefixes) -> AsyncIterator[Changes]:
        at = after.as_u64() or 0
        create = {**self._keys(), "start_revision": at + 1}
        watch = await self._stream("/v3/watch", {"create_request": create})
        unsettled = 0  # a revision without a change so far: perhaps one of other keys
        try:
            line: asyncio.Task[Any] = asyncio.ensure_future(watch.next())
            while True:
                done, _ = await asyncio.wait({line}, timeout=LOOK_S)
                if not done:
                    revision = await self._revision()
                    in_step = revision <= max(at, unsettled) and not line.done()
                    unsettled = revision
                    yield Changes([], WatchCursor.from_u64(at), 0 if in_step else None)
                    continue
                with self._understood():
                    events = self._events(line.result())
                line = asyncio.ensure_future(watch.next())
                if events:
                    at = max(at, events[-1].version.as_u64() or 0)
                    yield Changes(events, WatchCursor.from_u64(at), 0)
        except HttpError as error:
            raise UpstreamLost(f"{self!r}: {error}") from None
        finally:
            line.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await line
            watch.close()

    def _events(self, answer: Any) -> list[Update]:
        if answer is None:
            raise UpstreamLost(f"{self!r}: the watch ended")
        if "error" in answer:
            raise self._error(answer["error"])
        result = answer.get("result", {})
        if result.get("canceled"):
            self._compacted = int(result.get("compact_revision", 0))
            reason = result.get("cancel_reason") or f"compacted at {self._compacted}"
            raise UpstreamLost(f"{self!r}: the watch was cancelled: {reason}")
        return [self._update(event) for event in result.get("events", ())]

    def _update(self, event: dict[str, Any]) -> Update:
        kv = event["kv"]
        version = VersionToken.from_u64(int(kv["mod_revision"]))
        if event.get("type") == "DELETE":
            return Delete(self._key(kv), version)
        return Put(self._key(kv), base64.b64decode(kv.get("value", "")), version)

    def _key(self, kv: dict[str, Any]) -> str:
        raw = base64.b64decode(kv.get("key", ""))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise UpstreamRefused(f"{self!r}: key {raw[:80]!r} is not UTF-8") from None

    async def state(self, prefixes: Prefixes) -> AsyncIterator[Changes]:
        """All keys, at one revision."""
        async for kvs, revision in self._pages({}):
            with self._understood():
                updates = [self._update({"kv": kv}) for kv in kvs]
            yield Changes(updates, WatchCursor.from_u64(revision))

    async def revisions(self, prefixes: Prefixes) -> Revisions:
        """All live keys and their revisions, read without values."""
        found: dict[str, bytes] = {}
        at = 0
        async for kvs, revision in self._pages({"keys_only": True}):
            at = revision
            with self._understood():
                for kv in kvs:
                    found[self._key(kv)] = VersionToken.from_u64(int(kv["mod_revision"]))
        return Revisions(found, WatchCursor.from_u64(at))

    async def _pages(self, options: dict[str, Any]) -> AsyncIterator[tuple[list[Any], int]]:
        body, after = {"limit": PAGE_KEYS, **options}, b""
        while True:
            answer = await self._range(body)
            with self._understood():
                revision = int(body.get("revision") or answer["header"]["revision"])
                WatchCursor.from_u64(revision)
                kvs = list(answer.get("kvs", []))
                more = bool(kvs and answer.get("more"))
                last = base64.b64decode(kvs[-1]["key"]) if more else b""
                if more and last <= after:
                    raise ValueError("the pages do not move on")
            yield kvs, revision
            if not more:
                return
            after, body["revision"], body["key"] = last, revision, _b64(last + b"\0")

    async def _revision(self) -> int:
        answer = await self._range({"limit": 1, "keys_only": True})
        with self._understood():
            return int(answer["header"]["revision"])

    def _keys(self) -> dict[str, str]:
        raw = self.prefix.encode()
        end = raw[:-1] + bytes((raw[-1] + 1,)) if raw else b"\0"  # no byte of UTF-8 is 0xff
        return {"key": _b64(raw or b"\0"), "range_end": _b64(end)}

    async def _range(self, options: dict[str, Any]) -> dict[str, Any]:
        return await self._post("/v3/kv/range", {**self._keys(), **options})

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with asyncio.timeout(REQUEST_S):
                answer: dict[str, Any] = await post(
                    self._host, self._port, path, body, self._token, self._tls
                )
        except HttpError as error:
            raise self._http_error(error) from None
        except (OSError, TimeoutError, EOFError, UnicodeError) as error:
            raise UpstreamLost(f"{self!r}: {str(error) or type(error).__name__}") from None
        return answer

    async def _stream(self, path: str, body: dict[str, Any]) -> Stream:
        try:
            async with asyncio.timeout(REQUEST_S):
                return await stream(self._host, self._port, path, body, self._token, self._tls)
        except HttpError as error:
            raise self._http_error(error) from None
        except (OSError, TimeoutError, EOFError, UnicodeError) as error:
            raise UpstreamLost(f"{self!r}: {str(error) or type(error).__name__}") from None

    def _http_error(self, error: HttpError) -> UpstreamError:
        with contextlib.suppress(ValueError, RecursionError):
            answer = json.loads(error.body)
            if isinstance(answer, dict):
                return self._error(answer)
        if error.status in (401, 403):  # of a proxy: etcd says more
            return UpstreamRefused(f"{self!r}: {error}")
        return UpstreamLost(f"{self!r}: {error}")

    def _error(self, answer: dict[str, Any]) -> UpstreamError:
        code = answer.get("code", answer.get("grpc_code"))
        reason = f"{self!r}: {answer.get('message') or answer.get('error') or answer}"
        if code == _UNAUTHENTICATED and self._token and "invalid auth token" in reason:
            self._token = ""  # it has expired
            return UpstreamLost(reason)
        refused = code in (_UNAUTHENTICATED, _PERMISSION_DENIED, _INVALID)
        if refused or "authentication is not enabled" in reason:
            return UpstreamRefused(reason)
        return UpstreamLost(reason)

    async def close(self) -> None:
        """Do nothing: only watches stay open between requests, and their readers close them."""


def _b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
