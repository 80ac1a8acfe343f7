"""The health of a store: what each state and figure makes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, until

import foldlog
from foldlog import FollowerState, Put, Restart, State
from foldlog.actors.store.core import Config
from foldlog.health import Status, follower_health, store_health
from foldlog.testing import Fault, FaultyFiles, crash_at

ON_EACH_ENGINE = True

NOW = 1_000_000.0


@pytest.fixture
def stats(path: Path) -> foldlog.Stats:
    with foldlog.open(path) as store:
        return replace(store.stats(), unsynced_s=0.0)


CONFIG = Config(Path("x.log"), compact_threshold=1000)
RESTART = Restart("writer", "OSError: no", NOW - 5, 0.0)


@pytest.mark.parametrize(
    ("figures", "status", "reason"),
    [
        ({}, Status.READY, ""),
        ({"state": State.FAILED, "reason": "disk"}, Status.FAILED, "the store is failed: disk"),
        ({"state": State.CLOSING}, Status.FAILED, "the store is closing"),
        ({"state": State.FORKED}, Status.FAILED, "the store is forked"),
        ({"state": State.STARTING}, Status.DEGRADED, "the store is starting"),
        ({"state": State.RESTARTING, "reason": "x"}, Status.DEGRADED, "the store is restarting: x"),
        ({"restarts": (RESTART,)}, Status.DEGRADED, "1 restarts within 60 s, the last of writer"),
        ({"restarts": (RESTART._replace(at_unix_s=NOW - 61),)}, Status.READY, ""),
        ({"unsynced_s": 11.0, "seq": 9}, Status.DEGRADED, "9 batches have been waiting 11 s"),
        ({"unsynced_s": 9.0, "seq": 9}, Status.READY, ""),
        ({"mailbox_depth": 8001}, Status.DEGRADED, "8001 requests are waiting"),
        ({"mailbox_depth": 8000}, Status.READY, ""),
        ({"compaction_error": "x"}, Status.DEGRADED, "the log cannot be compacted: x"),
        ({"appended_bytes": 12_001, "base_bytes": 2000}, Status.DEGRADED, "12001 bytes were app"),
        ({"appended_bytes": 12_000, "base_bytes": 2000}, Status.READY, ""),
    ],
)
def test_each_figure_of_a_store_counts(
    stats: foldlog.Stats, figures: dict[str, Any], status: Status, reason: str
):
    health = store_health(replace(stats, **figures), CONFIG, NOW)
    assert health.status is status
    assert "; ".join(health.reasons).startswith(reason)
    assert (health.is_ready, health.is_serving) == (
        status is Status.READY,
        status is not Status.FAILED,
    )
    assert bool(health.reasons) is (status is not Status.READY)


def test_a_store_that_does_not_sync_is_not_late(stats: foldlog.Stats):
    late = replace(stats, unsynced_s=99.0)
    assert store_health(late, replace(CONFIG, sync="never"), NOW).is_ready
    slow = replace(CONFIG, sync_interval_s=30.0)
    assert store_health(late, slow, NOW).is_ready


@pytest.mark.parametrize(
    ("state", "delay_s", "status"),
    [
        (FollowerState.FOLLOWING, 0.0, Status.READY),
        (FollowerState.REPLACED, 0.0, Status.READY),
        (FollowerState.FOLLOWING, 11.0, Status.DEGRADED),
        (FollowerState.MISSING, 0.0, Status.DEGRADED),
        (FollowerState.FAILED, 0.0, Status.DEGRADED),
        (FollowerState.WAITING, 0.0, Status.FAILED),
        (FollowerState.CLOSED, 0.0, Status.FAILED),
    ],
)
def test_each_state_of_a_follower_counts(state: FollowerState, delay_s: float, status: Status):
    health = follower_health(state, "why", delay_s)
    assert (health.status, bool(health.reasons)) == (status, status is not Status.READY)


@pytest.mark.append_log("its file fails")
def test_a_store_is_ready_until_it_fails_and_again_once_it_is_reopened(path: Path):
    files = FaultyFiles()
    with foldlog.open(path, sync="never", max_restarts=0, files=files) as store:
        assert store.health().is_ready
        store.put("a", b"1")
        files.arm(Fault("sync", lasting=True))
        with pytest.raises(foldlog.StoreFailed):
            store.sync()
        health = store.health()
        assert (health.status, health.is_serving) == (Status.FAILED, False)
        assert health.reasons[0].startswith("the store is failed: ")
        files.disarm()
        store.reopen()
        assert store.health().is_serving
    assert store.health() == foldlog.Health(Status.FAILED, ("the store is closed",))


def test_a_restart_degrades_a_store_for_a_while(path: Path):
    with foldlog.open(path, step=crash_at("writer.before_write")) as store:
        store.put("a", b"1")
        until(lambda: store.state is State.RUNNING, "the writer is back")
        health = store.health()
        assert health.status is Status.DEGRADED
        assert "1 restarts within 60 s" in health.reasons[0]


def test_how_long_a_batch_waits_for_the_disk_is_told(path: Path):
    with foldlog.open(path, sync="never") as store:
        assert store.stats().unsynced_s == 0.0
        store.apply([Put("a", b"")], 1)
        first = store.stats().unsynced_s
        assert first > 0.0
        assert store.stats().unsynced_s > first
        store.sync()
        assert store.stats().unsynced_s == 0.0


@pytest.mark.append_log("it is followed")
def test_a_follower_is_ready_once_there_is_a_log(path: Path):
    with foldlog.follow(path) as follower:
        assert follower.health().status is Status.FAILED
        with foldlog.open(path) as store:
            version = store.put("a", b"")
            follower.wait_for(seq=version)
            until(lambda: follower.health().is_ready, "it follows")
            assert 0.0 <= follower.stats().delay_s < DEADLINE_S
    assert follower.health().status is Status.FAILED
