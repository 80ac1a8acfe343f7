"""The contract that every store keeps, as a typing protocol. Code written against it works with any
store."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from foldlog.protocol.tokens import CursorLike, WatchCursor
from foldlog.protocol.updates import KvEntry, Update

StrPath: TypeAlias = str | os.PathLike[str]
FormatName: TypeAlias = Literal["foldlog", "slipstream-v2"]
"""The file formats: foldlog's own, and that of the Rust crate `beyond-slipstream`."""
Backend: TypeAlias = Literal["append-log", "rocksdb"]
"""The engines: an append-only log whose fold is in memory and in its file, and a RocksDB
database."""


@runtime_checkable
class SnapshotStore(Protocol):
    """A durable fold of a stream of updates: the last write of each key wins, deletes remove."""

    def apply(self, updates: Iterable[Update], cursor: CursorLike) -> int:
        """Atomically fold the updates and advance the cursor. Returns the batch's sequence."""

    def get(self, key: str) -> KvEntry | None:
        """The live entry of `key`; None if it is absent or deleted."""

    def range(self, prefix: str) -> list[KvEntry]:
        """All live entries under `prefix`, ascending by key."""

    def for_each_in_range(self, prefix: str, f: Callable[[KvEntry], Any]) -> None:
        """`range`, streamed without buffering the matches. An error from `f` stops the scan and
        propagates."""

    def cursor(self) -> WatchCursor:
        """The last applied, persisted cursor; the none-cursor if nothing was applied yet."""

    def export_to(self, dest_dir: StrPath) -> Any:
        """Write a transferable artifact at `dest_dir`, which must not exist. Returns its
        manifest."""

    def close(self) -> None:
        """Close the store. Closing twice is fine."""
