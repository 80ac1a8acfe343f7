"""The table of the engines that a store can be opened with."""

from __future__ import annotations

from collections.abc import Callable

from foldlog.protocol.engine import Seat
from foldlog.storage.engines.append_log.seat import LogSeat
from foldlog.storage.engines.options import EngineOptions

SEATS: dict[str, Callable[[EngineOptions], Seat]] = {
    "append-log": LogSeat,
}
"""By the name that `backend=` gives."""
