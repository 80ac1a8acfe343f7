"""A cluster of three NATS servers: its leader dies, and a majority is lost and comes back."""

from __future__ import annotations

import contextlib

import pytest
import servers
from upstream_kit import Loop, until

import foldlog
from foldlog import LinkState
from foldlog.upstreams import NatsKv

pytest.importorskip("nats", reason="nats-py is not installed: the extra `nats`")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


async def quiet(error: Exception) -> None:
    pass


class Cluster:
    """Three servers, and a bucket with three replicas."""

    def __init__(self, folder) -> None:
        self.servers = servers.nats_cluster(folder)
        for server in self.servers:
            server.start()
        self.loop = Loop()
        self.urls = [f"nats://127.0.0.1:{server.port}" for server in self.servers]

        def made() -> bool:
            with contextlib.suppress(Exception):
                self.do(lambda js: js.create_key_value(bucket="b", replicas=3))
                return True
            return False

        until(made, within_s=60)

    def do(self, call):
        """The result of a call of a JetStream, on a connection of its own."""
        import nats

        async def connected():
            client = await nats.connect(self.urls, error_cb=quiet, max_reconnect_attempts=3)
            try:
                return await call(client.jetstream(timeout=5))
            finally:
                await client.close()

        return self.loop.run(connected())

    def put(self, key: str, value: bytes) -> None:
        """Write, and again until it is acknowledged."""

        def written() -> bool:
            with contextlib.suppress(Exception):
                self.do(lambda js: js.publish(f"$KV.b.{key}", value))
                return True
            return False

        until(written, within_s=60)

    def leader(self) -> int:
        info = self.do(lambda js: js.stream_info("KV_b"))
        return int(info.cluster.leader.removeprefix("n"))

    def close(self) -> None:
        self.loop.close()
        for server in self.servers:
            server.kill()


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path / "cluster")
    yield cluster
    cluster.close()


def test_a_mirror_survives_the_death_of_leaders(cluster, path):
    cluster.put("k", b"0")
    with foldlog.mirror(path, NatsKv(",".join(cluster.urls), bucket="b")) as mirror:
        mirror.wait_synced(60)
        for turn in range(1, 4):
            leader = cluster.servers[cluster.leader()]
            leader.kill()
            cluster.put("k", b"%d" % turn)
            until(lambda: mirror.get("k").value == b"%d" % turn, within_s=60)  # noqa: B023
            leader.start()
        mirror.wait_synced(60)
        assert mirror.stats().link.resets == 0


def test_without_a_majority_nothing_is_believed_and_reads_go_on(cluster, path):
    cluster.put("k", b"0")
    with foldlog.mirror(path, NatsKv(",".join(cluster.urls), bucket="b")) as mirror:
        mirror.wait_synced(60)
        for server in cluster.servers[:2]:
            server.kill()
        until(lambda: mirror.link.state is not LinkState.LIVE)
        assert mirror.get("k").value == b"0"
        for server in cluster.servers[:2]:
            server.start()
        cluster.put("k", b"1")
        until(lambda: mirror.get("k").value == b"1", within_s=60)
        assert mirror.stats().link.resets == 0
