"""The mirror for event loops."""

from __future__ import annotations

import asyncio

from foldlog.aio.off_loop import OffLoop
from foldlog.aio.store import AsyncStore
from foldlog.mirror import Mirror
from foldlog.protocol.errors import RequestTimeout
from foldlog.protocol.options import check_timeout
from foldlog.waiting import WAIT_TIMEOUT_S

LINK_CHECK_S = 0.02
"""Between two checks of whether a mirror is synced."""


class AsyncMirror(AsyncStore):
    """A mirror for event loops: an `AsyncStore` that only its upstream writes. Other writes raise
    MirrorReadOnly."""

    def __init__(self, mirror: Mirror, thread: OffLoop | None = None) -> None:
        """Wrap an open mirror; `close` closes it. To open one, use `aio.mirror`."""
        super().__init__(mirror, thread)
        self._mirror = mirror

    @property
    def mirror(self) -> Mirror:
        """The synchronous mirror, with its link and statistics."""
        return self._mirror

    async def wait_synced(self, timeout_s: float | None = WAIT_TIMEOUT_S) -> None:
        """`Mirror.wait_synced`, awaited."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + check_timeout(timeout_s)
        while True:
            try:
                self._mirror.wait_synced(0.0)
                return
            except RequestTimeout:
                if loop.time() >= deadline:
                    raise
            await asyncio.sleep(LINK_CHECK_S)
