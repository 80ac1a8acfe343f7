"""A cluster of three NATS servers, and a bucket in it that can be written while leaders die."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import servers
from gates import Gate
from upstream_kit import Loop, NatsSource, until

from foldlog.upstreams import NatsKv


class Cluster:
    """Three servers on loopback. The routes between them lead through gates."""

    def __init__(self, folder: Path) -> None:
        self._loop = Loop()
        self._gates: dict[frozenset[int], list[Gate]] = {}
        self.servers = servers.nats_cluster(folder, way=self._way)
        for server in self.servers:
            server.start()
        self.urls = [f"nats://127.0.0.1:{server.port}" for server in self.servers]

    @contextlib.contextmanager
    def paused(self, number: int) -> Iterator[None]:
        """A member that is stopped for a while: it neither answers nor closes its connections."""
        pid = self.servers[number].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def _way(self, number: int, peer: int, port: int) -> int:
        gate = Gate(self._loop, port)
        self._gates.setdefault(frozenset((number, peer)), []).append(gate)
        return gate.port

    @contextlib.contextmanager
    def apart(self, number: int) -> Iterator[None]:
        """A member that no other member reaches; clients reach it."""
        gates = [gate for pair, both in self._gates.items() if number in pair for gate in both]
        for gate in gates:
            gate.cut()
        try:
            yield
        finally:
            for gate in gates:
                gate.mend()

    def close(self) -> None:
        for server in self.servers:
            server.kill()
        for both in self._gates.values():
            for gate in both:
                gate.close()
        self._loop.close()


class ClusterSource(NatsSource):
    """A bucket with three replicas. Every write is repeated until it is acknowledged."""

    request_s = 1.0

    def __init__(self, cluster: Cluster, bucket: str = "b", **config: Any) -> None:
        self.cluster, self.urls = cluster, cluster.urls
        """`urls`: the members that a test writes to."""
        super().__init__(Path(), bucket, server=cluster.servers[0], replicas=3, **config)

    def connect(self) -> None:
        import nats

        async def quiet(error: Exception) -> None:
            pass

        def connected() -> bool:
            self.disconnect()
            with contextlib.suppress(Exception):
                options = {"error_cb": quiet, "connect_timeout": 1, "allow_reconnect": False}
                self.client = self.loop.run(nats.connect(self.urls, **options))
                return True
            return False

        until(connected, within_s=120)
        self.js = self.client.jetstream(timeout=self.request_s)

    def patiently(self, call: Any) -> Any:
        """The result of `call()`, tried again on a new connection until it succeeds."""
        result: list[Any] = []

        def done() -> bool:
            with contextlib.suppress(Exception):
                result.append(call())
                return True
            self.connect()
            return False

        until(done, within_s=120)
        return result[0]

    def create(self) -> None:
        self.patiently(super().create)

    def drop(self) -> None:
        """Delete the bucket."""

        def delete() -> None:
            answer = self.api(f"STREAM.DELETE.KV_{self.bucket}")
            assert answer.get("success") or answer["error"]["err_code"] == 10059, answer

        self.patiently(delete)

    def recreate(self) -> None:
        self.drop()
        self.create()

    def configure(self, **changes: Any) -> bool:
        accepted: bool = self.patiently(lambda: NatsSource.configure(self, **changes))
        return accepted

    def put(self, key: str, value: bytes) -> None:
        self.patiently(lambda: NatsSource.put(self, key, value))

    def delete(self, key: str) -> None:
        self.patiently(lambda: NatsSource.delete(self, key))

    def purge(self, key: str) -> None:
        self.patiently(lambda: NatsSource.purge(self, key))

    def forget(self) -> None:
        self.patiently(lambda: NatsSource.forget(self))

    def put_many(self, entries: dict[str, bytes]) -> None:
        for key, value in entries.items():
            self.put(key, value)

    def entries(self) -> dict[str, bytes]:
        found: dict[str, bytes] = self.patiently(lambda: NatsSource.entries(self))
        return found

    def leader(self) -> int:
        """The number of the server that leads the stream."""

        def ask() -> int:
            info = self.api(f"STREAM.INFO.KV_{self.bucket}")
            return int(info["cluster"]["leader"].removeprefix("n"))

        number: int = self.patiently(ask)
        return number

    def kill(self) -> None:
        """Kill the leader, and start it again once another leads."""
        number = self.leader()
        server = self.cluster.servers[number]
        server.kill()
        until(lambda: self.leader() != number, within_s=60)
        server.start()

    def upstream(self, **options: Any) -> NatsKv:
        return NatsKv(",".join(self.cluster.urls), bucket=self.bucket, **options)
