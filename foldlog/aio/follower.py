"""The follower for event loops."""

from __future__ import annotations

from foldlog.actors.following.follower import FollowerState
from foldlog.aio.face import Face
from foldlog.aio.off_loop import OffLoop
from foldlog.follow import Follower, FollowerStats
from foldlog.health import Health


class AsyncFollower(Face[Follower]):
    """A follower for event loops. Reads are plain calls."""

    def __init__(self, follower: Follower, thread: OffLoop | None = None) -> None:
        """Wrap an open follower; `close` closes it. To open one, use `aio.follow`."""
        super().__init__(follower, thread)

    @property
    def follower(self) -> Follower:
        """The synchronous follower."""
        return self._opened

    @property
    def state(self) -> FollowerState:
        """The state of the log as the follower sees it."""
        return self._opened.state

    def stats(self) -> FollowerStats:
        """The follower's statistics. Cost: as `Follower.stats`."""
        return self._opened.stats()

    def health(self) -> Health:
        """Ready, degraded or failed, with reasons. Cost: microseconds."""
        return self._opened.health()
