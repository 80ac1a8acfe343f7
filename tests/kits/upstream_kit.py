"""Upstreams that a test can write to, of every kind, behind one face; and what their mirrors must
look like."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import servers

import foldlog
from foldlog.upstreams import Etcd, LogFile, NatsKv

DEADLINE_S = 60.0


def until(
    condition: Callable[[], object],
    what: Callable[[], str] = lambda: "a condition did not come to hold",
    within_s: float = DEADLINE_S,
) -> None:
    """Wait until `condition` holds, with a deadline, at which `what()` says what is the case."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.005)


class Loop:
    """An event loop in a thread, for clients that need one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_S)

    def close(self) -> None:
        async def end_tasks() -> None:
            rest = asyncio.all_tasks() - {asyncio.current_task()}
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        self.run(end_tasks())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()


class Source(Protocol):
    """An upstream, as a test writes to it."""

    def put(self, key: str, value: bytes) -> None: ...
    def delete(self, key: str) -> None: ...
    def entries(self) -> dict[str, bytes]:
        """All that is live, in key order."""

    def upstream(self) -> Any:
        """A new upstream of the product."""

    def forget(self) -> None:
        """Drop the history: no client can be told what it missed."""

    def kill(self) -> None:
        """End the server at once, and start it again."""

    def close(self) -> None: ...


class NatsSource:
    """A bucket of a real NATS server."""

    request_s = DEADLINE_S

    def __init__(
        self,
        folder: Path,
        bucket: str = "b",
        *,
        server: servers.Server | None = None,
        server_config: str = "",
        leg: str = "",
        client: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        """`server`: one that runs already, and goes on; `server_config`, `leg`: of one of its own;
        `client`: options of the test's own connection."""
        pytest.importorskip("nats", reason="nats-py is not installed: the extra `nats`")
        self._is_own = server is None
        self.server = server or servers.nats(folder, config=server_config, leg=leg)
        if self._is_own:
            self.server.start()
        self.bucket, self._config, self._client_options = bucket, config, client or {}
        self.loop = Loop()
        self.client: Any = None
        try:
            self.connect()
            self.create()
        except BaseException:
            self.loop.close()
            if self._is_own:
                self.server.kill()
            raise

    @property
    def url(self) -> str:
        scheme = "tls" if "tls" in self._client_options else "nats"
        return f"{scheme}://127.0.0.1:{self.server.port}"

    def disconnect(self) -> None:
        """End the connection, if there is one: nats-py would go on with it."""
        client, self.client = self.client, None
        if client is not None:
            with contextlib.suppress(Exception):
                self.loop.run(client.close())

    def connect(self) -> None:
        """Connect anew."""
        import nats

        self.disconnect()
        options = {"allow_reconnect": False, "connect_timeout": int(DEADLINE_S)}
        options |= {"error_cb": _quiet, **self._client_options}
        self.client = self.loop.run(nats.connect(self.url, **options))
        self.js = self.client.jetstream(timeout=self.request_s)

    def create(self) -> None:
        self.loop.run(self.js.create_key_value(bucket=self.bucket, **self._config))

    def recreate(self) -> None:
        self.loop.run(self.js.delete_key_value(self.bucket))
        self.create()

    def api(self, subject: str, **body: Any) -> dict[str, Any]:
        """The answer of the JetStream API, which may hold an `error`."""

        async def ask() -> Any:
            payload = json.dumps(body).encode()
            return await self.client.request(f"$JS.API.{subject}", payload, timeout=self.request_s)

        answer: dict[str, Any] = json.loads(self.loop.run(ask()).data)
        return answer

    def configure(self, **changes: Any) -> bool:
        """Change the stream's configuration. False if this server refuses."""
        config = self.api(f"STREAM.INFO.KV_{self.bucket}")["config"] | changes
        return "error" not in self.api(f"STREAM.UPDATE.KV_{self.bucket}", **config)

    def put(self, key: str, value: bytes) -> None:
        self.loop.run(self.js.publish(f"$KV.{self.bucket}.{key}", value))

    def put_many(self, entries: dict[str, bytes]) -> None:
        async def publish() -> None:
            for key, value in entries.items():
                await self.client.publish(f"$KV.{self.bucket}.{key}", value)
            await self.client.flush(int(DEADLINE_S))

        self.loop.run(publish())

    def put_for(self, key: str, value: bytes, ttl_s: int) -> None:
        """Write a message that the server removes after a while, on a stream that allows it."""
        headers = {"Nats-TTL": f"{ttl_s}s"}
        self.loop.run(self.js.publish(f"$KV.{self.bucket}.{key}", value, headers=headers))

    def delete(self, key: str) -> None:
        headers = {"KV-Operation": "DEL"}
        self.loop.run(self.js.publish(f"$KV.{self.bucket}.{key}", b"", headers=headers))

    def purge(self, key: str) -> None:
        headers = {"KV-Operation": "PURGE", "Nats-Rollup": "sub"}
        self.loop.run(self.js.publish(f"$KV.{self.bucket}.{key}", b"", headers=headers))

    def entries(self) -> dict[str, bytes]:
        return {key: msg.data or b"" for key, msg in self._last() if not _is_removal(msg)}

    def _last(self) -> list[tuple[str, Any]]:
        """The last message of each key, in key order."""
        return self.loop.run(self._read_last())  # type: ignore[no-any-return]

    async def _read_last(self) -> list[tuple[str, Any]]:
        from nats.js.errors import NotFoundError

        found: list[tuple[str, Any]] = []

        async def read(subject: str) -> None:
            with contextlib.suppress(NotFoundError):  # it has expired since
                msg = await self.js.get_last_msg(f"KV_{self.bucket}", subject)
                found.append((subject.split(".", 2)[2], msg))

        info = await self.js.stream_info(f"KV_{self.bucket}", subjects_filter=">")
        subjects = list(info.state.subjects or ())
        for first in range(0, len(subjects), 100):
            await asyncio.gather(*map(read, subjects[first : first + 100]))
        return sorted(found, key=lambda last: last[0])

    def consumers(self) -> int:
        info = self.loop.run(self.js.stream_info(f"KV_{self.bucket}"))
        count: int = info.state.consumer_count
        return count

    def upstream(self, **options: Any) -> NatsKv:
        return NatsKv(self.url, bucket=self.bucket, **options)

    def forget(self) -> None:
        """As `purge_deletes` does. That of nats-py waits for ever if a message expires meanwhile."""
        for key, msg in self._last():
            if _is_removal(msg):
                self.api(f"STREAM.PURGE.KV_{self.bucket}", filter=f"$KV.{self.bucket}.{key}")

    def kill(self) -> None:
        self.disconnect()
        self.server.kill()
        self.server.start()
        self.connect()

    def close(self) -> None:
        self.disconnect()
        self.loop.close()
        if self._is_own:
            self.server.kill()


def _is_removal(msg: Any) -> bool:
    return bool((msg.headers or {}).keys() & {"KV-Operation", "Nats-Marker-Reason"})


async def _quiet(error: Exception) -> None:
    pass


class EtcdSource:
    """A real etcd."""

    def __init__(self, folder: Path) -> None:
        self.server = servers.etcd(folder)
        self.server.start()
        until(self._is_ready)

    def _is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            self._post("kv/range", {"key": _b64("x")})
            return True
        return False

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.server.port}/v3/{path}", json.dumps(body).encode()
        )
        with urllib.request.urlopen(request, timeout=DEADLINE_S) as answer:
            fields: dict[str, Any] = json.load(answer)
        return fields

    def put(self, key: str, value: bytes) -> None:
        self._post("kv/put", {"key": _b64(key), "value": base64.b64encode(value).decode()})

    def put_together(self, entries: dict[str, bytes]) -> None:
        """Several changes at one revision."""
        success = [
            {"requestPut": {"key": _b64(key), "value": base64.b64encode(value).decode()}}
            for key, value in entries.items()
        ]
        self._post("kv/txn", {"success": success})

    def delete(self, key: str) -> None:
        self._post("kv/deleterange", {"key": _b64(key)})

    def clear(self) -> None:
        """Delete all keys, for the next test."""
        self._post("kv/deleterange", {"key": _b64("\0"), "range_end": _b64("\0")})

    def entries(self) -> dict[str, bytes]:
        answer = self._post("kv/range", {"key": _b64("\0"), "range_end": _b64("\0")})
        return {
            base64.b64decode(kv["key"]).decode(): base64.b64decode(kv.get("value", ""))
            for kv in answer.get("kvs", ())
        }

    def upstream(self) -> Etcd:
        return Etcd(f"http://127.0.0.1:{self.server.port}")

    def forget(self) -> None:
        revision = self._post("kv/range", {"key": _b64("x")})["header"]["revision"]
        self._post("kv/compaction", {"revision": revision, "physical": True})

    def kill(self) -> None:
        self.server.kill()
        self.server.start()
        until(self._is_ready)

    def close(self) -> None:
        self.server.kill()


def _b64(text: str) -> str:
    return base64.b64encode(text.encode()).decode("ascii")


class LogSource:
    """A foldlog log."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.path = folder / "source.log"
        self.store = foldlog.open(self.path)

    def put(self, key: str, value: bytes) -> None:
        self.store.put(key, value)

    def delete(self, key: str) -> None:
        self.store.delete(key)

    def entries(self) -> dict[str, bytes]:
        return dict(self.store.snapshot().items())

    def upstream(self) -> LogFile:
        return LogFile(self.path)

    def forget(self) -> None:
        self.store.compact()

    def kill(self) -> None:
        self.store.close()
        self.store = foldlog.open(self.path)

    def close(self) -> None:
        self.store.close()


@contextlib.contextmanager
def opened(source: Any) -> Iterator[Any]:
    """The source, closed at the end."""
    try:
        yield source
    finally:
        source.close()


def mirrored(path: Path, upstream: Any, **options: Any) -> foldlog.Mirror:
    """A mirror that is in step."""
    mirror = foldlog.mirror(path, upstream, **options)
    try:
        mirror.wait_synced(30)
    except BaseException:
        mirror.close()
        raise
    return mirror


def same(mirror: foldlog.Mirror, source: Any) -> bool:
    """Whether the mirror holds what its upstream does."""
    return dict(mirror.snapshot().items()) == source.entries()
