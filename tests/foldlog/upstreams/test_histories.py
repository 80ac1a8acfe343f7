"""Random histories of a bucket, with the server and the client dying in between: at rest, the
mirror is equal to it.

A sample runs each time; `pytest -m slow -rP tests/foldlog/upstreams` runs more for some minutes,
and prints their count. `python tests/kits/histories.py --count 1000` runs as many as asked for.
"""

from __future__ import annotations

import shutil
import time

import histories
import pytest
from nats_cluster import Cluster

CAMPAIGN_S = 240.0


def test_a_mirror_is_equal_to_its_bucket_after_a_random_history(tmp_path, path):
    histories.run(tmp_path / "nats", path, seed=1)


def campaign(tmp_path, cluster=None) -> int:
    """Histories until the time is over; how many."""
    deadline, seed = time.monotonic() + CAMPAIGN_S, 100
    while time.monotonic() < deadline and seed < 1100:
        folder = tmp_path / str(seed)
        folder.mkdir()
        histories.run(folder / "nats", folder / "state.log", seed, cluster)
        shutil.rmtree(folder)
        seed += 1
    return seed - 100


@pytest.mark.slow
@pytest.mark.timeout(CAMPAIGN_S + 90)
def test_a_mirror_is_equal_to_its_bucket_after_every_random_history(tmp_path):
    print(f"{campaign(tmp_path)} random histories, 0 of them wrong at rest")


@pytest.mark.slow
@pytest.mark.timeout(CAMPAIGN_S + 120)
def test_a_mirror_is_equal_to_a_bucket_of_a_cluster_after_every_random_history(tmp_path):
    cluster = Cluster(tmp_path / "cluster")
    try:
        print(f"{campaign(tmp_path, cluster)} histories in a cluster, 0 of them wrong at rest")
    finally:
        cluster.close()
