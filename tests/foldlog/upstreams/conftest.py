"""What the tests of upstreams share: one etcd, and a link that does not wait without need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from upstream_kit import EtcdSource, opened

from foldlog.actors.link import attachment
from foldlog.actors.link import link as link_module
from foldlog.upstreams import etcd as etcd_upstream


@pytest.fixture(autouse=True)
def _hasty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait a second for what a single server on loopback confirms at once, nor between the
    restarts of a link. Clusters, which have leaders to depose, are left to the long campaigns."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(attachment, "CONFIRM_S", 0.05)
        monkeypatch.setattr(etcd_upstream, "LOOK_S", 0.05)
        monkeypatch.setattr(link_module.random, "uniform", lambda low, high: 0.0)


@pytest.fixture(scope="session")
def _etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdSource]:
    """One for all tests: it takes a second to start."""
    with opened(EtcdSource(tmp_path_factory.mktemp("etcd"))) as source:
        yield source


@pytest.fixture
def etcd(_etcd: EtcdSource) -> EtcdSource:
    """A running etcd without any keys."""
    _etcd.clear()
    return _etcd
