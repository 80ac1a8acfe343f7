"""What the store's own threads do when memory is short: wait, and try again."""

from __future__ import annotations

import time
from collections.abc import Callable

PAUSE_S = 0.05


def pause() -> None:
    """Let others release memory."""
    try:  # noqa: SIM105 - `suppress` takes memory
        time.sleep(PAUSE_S)
    except MemoryError:
        pass


def insist(step: Callable[[], object]) -> None:
    """Repeat a step until it has the memory that it needs."""
    while True:
        try:
            step()
            return
        except MemoryError:
            pause()
