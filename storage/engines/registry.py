"""The table of engines that a store can be opened with."""

from __future__ import annotations

from collections.abc import Callable

from foldlog.protocol.engine import Seat
from foldlog.protocol.store import Backend
from foldlog.storage.engines.append_log.seat import LogSeat
from foldlog.storage.engines.options import EngineOptions
from foldlog.storage.engines.rocksdb.seat import RocksDbSeat

SEATS: dict[Backend, Callable[[EngineOptions], Seat]] = {
    "append-log": LogSeat,
    "rocksdb": RocksDbSeat,
}
"""By the value of `backend=`."""
