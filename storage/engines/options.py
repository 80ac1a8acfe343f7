"""The options of an engine that is opened for writing."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from foldlog.protocol.options import OnDamage
from foldlog.protocol.store import FormatName
from foldlog.storage.log.files import Files


class EngineOptions(NamedTuple):
    """See `foldlog.open`."""

    path: Path
    """Absolute, with links resolved."""
    format: FormatName | None
    on_damage: OnDamage
    sync_each: bool
    cache_bytes: int
    files: Files
