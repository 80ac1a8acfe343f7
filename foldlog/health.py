"""The health of a store or a follower, derived from its statistics: for readiness probes and
whoever is on call."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from foldlog.actors.following.follower import FollowerState
from foldlog.actors.store.core import Config, State, Stats

UNSYNCED_S = 10.0
"""How long batches may wait to be synced before the store is degraded; at least five sync
intervals."""
MAILBOX_PART = 0.8
"""How full the mailbox may be, as a fraction."""
LOG_FACTOR = 4
"""Appended bytes may reach this many times (base + compact_threshold). Compaction starts at once
times that."""
DELAY_S = 10.0
"""How far behind its log a follower may be, in seconds."""


class Status(enum.StrEnum):
    """What a probe needs to know, from good to bad."""

    READY = "ready"
    DEGRADED = "degraded"
    """It serves, but somebody should look."""
    FAILED = "failed"
    """It does not do its job: writes are refused, or there is nothing to read."""


@dataclass(frozen=True, slots=True)
class Health:
    """A verdict with its reasons."""

    status: Status
    reasons: tuple[str, ...] = ()
    """In plain words; empty if it is ready."""

    @property
    def is_ready(self) -> bool:
        """True if there is nothing to report."""
        return self.status is Status.READY

    @property
    def is_serving(self) -> bool:
        """True unless it has failed. Answer a readiness probe with this, so that a slow disk does
        not take an instance out of service."""
        return self.status is not Status.FAILED


def store_health(stats: Stats, config: Config, now_unix_s: float) -> Health:
    """The health of a store with these statistics at `now_unix_s`."""
    if stats.state in (State.FAILED, State.CLOSING, State.CLOSED, State.FORKED):
        reason = f": {stats.reason}" if stats.reason else ""
        return Health(Status.FAILED, (f"the store is {stats.state}{reason}",))
    reasons = []
    if stats.state is not State.RUNNING:
        reasons.append(
            f"the store is {stats.state}" + (f": {stats.reason}" if stats.reason else "")
        )
    recent = [r for r in stats.restarts if now_unix_s - r.at_unix_s < config.restart_window_s]
    if recent:
        reasons.append(
            f"{len(recent)} restarts within {config.restart_window_s:.0f} s,"
            f" the last of {recent[-1].actor}: {recent[-1].reason}"
        )
    if config.sync != "never" and stats.unsynced_s > max(UNSYNCED_S, 5 * config.sync_interval_s):
        lag = stats.seq - stats.synced_seq
        reasons.append(f"{lag} batches have been waiting {stats.unsynced_s:.0f} s to be synced")
    if stats.mailbox_depth > MAILBOX_PART * config.mailbox_batches:
        reasons.append(f"{stats.mailbox_depth} requests are waiting for the writer")
    if stats.compaction_error:
        reasons.append(f"the log cannot be compacted: {stats.compaction_error}")
    if stats.appended_bytes > LOG_FACTOR * (stats.base_bytes + config.compact_threshold):
        reasons.append(f"{stats.appended_bytes} bytes were appended since the last compaction")
    return Health(Status.DEGRADED if reasons else Status.READY, tuple(reasons))


def follower_health(state: FollowerState, reason: str, delay_s: float) -> Health:
    """The health of a follower that is in `state`, for `reason`, and `delay_s` behind its log."""
    if state is FollowerState.CLOSED:
        return Health(Status.FAILED, ("the follower is closed",))
    if state is FollowerState.WAITING:
        return Health(Status.FAILED, ("there is no log to follow yet, so nothing to read",))
    reasons = []
    if state in (FollowerState.MISSING, FollowerState.FAILED):
        reasons.append(f"the log is {state}" + (f": {reason}" if reason else ""))
    if delay_s > DELAY_S:
        reasons.append(f"the last batch was seen {delay_s:.0f} s after it was written")
    return Health(Status.DEGRADED if reasons else Status.READY, tuple(reasons))
