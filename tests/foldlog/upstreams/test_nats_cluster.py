"""A cluster of three NATS servers: leaders die, members are paused or cut off, a majority is lost
and comes back."""

from __future__ import annotations

import pytest
from nats_cluster import Cluster, ClusterSource
from upstream_kit import opened, same, until

import foldlog
from foldlog import LinkState
from foldlog.upstreams import NatsKv

pytest.importorskip("nats", reason="nats-py is not installed: the extra `nats`")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    # The test's own clients: nats-py leaves connections to members that do not answer open.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def cluster(tmp_path):
    with opened(Cluster(tmp_path / "cluster")) as cluster:
        yield cluster


@pytest.fixture
def source(cluster):
    with opened(ClusterSource(cluster)) as source:
        source.put("k", b"0")
        yield source


def in_step(mirror, source) -> None:
    until(lambda: same(mirror, source), within_s=60)
    mirror.wait_synced(60)
    assert mirror.stats().link.resets == 0


def test_a_mirror_survives_the_death_of_leaders(source, path):
    with foldlog.mirror(path, source.upstream()) as mirror:
        mirror.wait_synced(60)
        for turn in range(1, 4):
            leader = source.cluster.servers[source.leader()]
            leader.kill()
            source.put("k", b"%d" % turn)
            until(lambda: mirror.get("k").value == b"%d" % turn, within_s=60)  # noqa: B023
            leader.start()
        in_step(mirror, source)


def test_without_a_majority_nothing_is_believed_and_reads_go_on(source, path):
    with foldlog.mirror(path, source.upstream()) as mirror:
        mirror.wait_synced(60)
        for server in source.cluster.servers[:2]:
            server.kill()
        until(lambda: mirror.link.state is not LinkState.LIVE)
        assert mirror.get("k").value == b"0"
        for server in source.cluster.servers[:2]:
            server.start()
        source.put("k", b"1")
        in_step(mirror, source)


def test_a_leader_that_is_paused_is_let_go_of(source, path):
    """It keeps its connections, and does not answer: only silence tells."""
    with foldlog.mirror(path, source.upstream()) as mirror:
        mirror.wait_synced(60)
        with source.cluster.paused(source.leader()):
            source.put("k", b"1")
            until(lambda: mirror.get("k").value == b"1", within_s=60)
        source.put("k", b"2")
        in_step(mirror, source)


@pytest.mark.parametrize("is_leader", [True, False])
def test_a_mirror_of_a_member_that_is_cut_off_does_not_stay_live(source, path, is_leader):
    """Its only server reaches no other, which go on without it. What it says is not the bucket any
    more."""
    number = source.leader() if is_leader else (source.leader() + 1) % 3
    others = [url for each, url in enumerate(source.cluster.urls) if each != number]
    alone = NatsKv(source.cluster.urls[number], bucket=source.bucket)
    with foldlog.mirror(path, alone) as mirror:
        mirror.wait_synced(60)
        with source.cluster.apart(number):
            source.urls = others
            source.connect()
            source.put("k", b"1")
            source.put("new", b"1")
            until(lambda: mirror.link.state is not LinkState.LIVE, within_s=60)
            assert mirror.get("k").value == b"0"
        in_step(mirror, source)
        source.put("k", b"2")
        in_step(mirror, source)
