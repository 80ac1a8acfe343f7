"""What a link reports: its state, with the reason, and its statistics. Written by the link's
thread, read by any thread."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass

from foldlog.protocol.logger import log
from foldlog.storage.handover import Bell


class LinkState(enum.StrEnum):
    """What a link is doing."""

    ATTACHING = "attaching"
    CATCHING_UP = "catching up"
    """Attached; missed changes are still to arrive or to be audited."""
    LIVE = "live"
    """Equal to the upstream, as of the last confirmation."""
    LOST = "lost"
    """The upstream or the store is unavailable (`reason`); the link will attach again soon."""
    FAILED = "failed"
    """Given up (`reason`). A held reset resumes with `accept_reset()`."""
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class LinkStats:
    """The statistics of a link at one moment."""

    state: LinkState
    reason: str
    lag: int | None
    """Updates waiting upstream; None if unknown."""
    staleness_s: float
    """Since the upstream last confirmed that no updates wait; infinite if it never did."""
    updates: int
    """Received and applied since the mirror was opened."""
    attaches: int
    audits: int
    mended: int
    """Entries that audits found wrong and corrected."""
    resets: int
    skipped: int
    """Entries over the limits that the mirror omits."""


class Progress:
    """The present values. Each is replaced whole; only `set` and `fail` notify."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.changed = Bell()
        """Rung at each change of state."""
        self.state = LinkState.ATTACHING
        self.reason = ""
        self.error: Exception | None = None
        """Why it is FAILED."""
        self.behind: int | None = None
        self.confirmed_at = -float("inf")
        """When the upstream last confirmed that no updates wait, on the monotonic clock."""
        self.updates = self.attaches = self.audits = self.mended = self.resets = self.skipped = 0
        self._logged = ""

    def set(self, state: LinkState, reason: str = "") -> None:
        """Enter a state, and log it."""
        if state is self.state and reason == self.reason:
            return
        level = log.warning if state in (LinkState.LOST, LinkState.FAILED) else log.info
        if not reason or reason != self._logged:  # log a repeated failure once, not each retry
            level("%s: link %s%s", self.name, state, f": {reason}" if reason else "")
        self._logged = reason
        self.state, self.reason = state, reason
        self.changed.ring()

    def fail(self, error: Exception) -> None:
        """Enter FAILED."""
        self.error = error
        self.set(LinkState.FAILED, str(error))

    @property
    def staleness_s(self) -> float:
        """Seconds since `confirmed_at`; infinite if the upstream never confirmed."""
        return time.monotonic() - self.confirmed_at

    def stats(self) -> LinkStats:
        """The statistics at this moment."""
        return LinkStats(
            self.state,
            self.reason,
            self.behind,
            self.staleness_s,
            self.updates,
            self.attaches,
            self.audits,
            self.mended,
            self.resets,
            self.skipped,
        )
