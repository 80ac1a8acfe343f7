"""foldlog: a local, always-hot, durable copy of shared state, fed by a stream of updates.

protocol <- storage <- actors <- foldlog        imports never run the other way

store.py       open, Store: a store for all threads of a process
follow.py      follow, Follower: a reader of another process's log
mirror.py      mirror, Mirror: a store that a link keeps in step with an upstream
upstreams/     NATS buckets, etcd prefixes, other logs
views.py       a mapping of decoded values; codecs.py decodes
derive.py      a structure of the program's own, kept in step
aio/           stores, followers and mirrors for asyncio
health.py      ready, degraded or failed; metrics.py: OpenTelemetry
watched.py     what stores and followers share; waiting.py waits for a position
life_cycle.py  how stores end without a `with` block
testing/       faults, for tests of programs that use foldlog
cli/           the command `foldlog`
version.py     the version
"""

from typing import TYPE_CHECKING, Any

from foldlog import upstreams
from foldlog.actors.feeds.delivery import Delivery
from foldlog.actors.feeds.watch import Watch
from foldlog.actors.following.follower import FollowerState
from foldlog.actors.link.progress import LinkState, LinkStats
from foldlog.actors.store.core import Restart, State, Stats
from foldlog.codecs import Codec
from foldlog.derive import Derived, DerivedState, derive
from foldlog.follow import Follower, FollowerStats, follow
from foldlog.health import Health, Status
from foldlog.mirror import Mirror, MirrorStats, mirror
from foldlog.protocol.engine import OpenReport
from foldlog.protocol.errors import (
    ArtifactInvalidError,
    Backpressure,
    CorruptLogError,
    CursorExpired,
    CursorRegressed,
    DecodeError,
    EncodeError,
    FoldlogError,
    ForeignFileError,
    ForkedStore,
    InvalidFormatError,
    KeyExists,
    KeyOutsideView,
    LogAccessError,
    LogChangedError,
    LogPoisonedError,
    LogRegressedError,
    ReentrantCall,
    RequestTimeout,
    StoreClosed,
    StoreFailed,
    StoreLocked,
    VersionMismatch,
    WriterCrashed,
)
from foldlog.protocol.events import Changed, Ended, Event, Lagged, Rewound, Synced
from foldlog.protocol.messages import Apply, Compact, Export, Get, Page, Range, RangePage
from foldlog.protocol.store import SnapshotStore
from foldlog.protocol.tokens import VersionToken, WatchCursor
from foldlog.protocol.updates import Delete, KvEntry, Purge, Put, Update
from foldlog.protocol.upstream import (
    MirrorReadOnly,
    ResetHeld,
    Upstream,
    UpstreamError,
    UpstreamLost,
    UpstreamMissing,
    UpstreamOversize,
    UpstreamRefused,
)
from foldlog.storage.artifacts.artifact import ArtifactFile, ExportManifest
from foldlog.storage.difference import diff
from foldlog.storage.engines.append_log import AppendLogSnapshot
from foldlog.storage.engines.rocksdb import RocksDbSnapshot
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.store import Store, open
from foldlog.version import __version__
from foldlog.views import Decoded, MutableView, Removed, Undecodable, View, ViewWatch, view

if TYPE_CHECKING:
    from foldlog import aio as aio
    from foldlog import metrics as metrics

__all__ = [
    "AppendLogSnapshot",
    "Apply",
    "ArtifactFile",
    "ArtifactInvalidError",
    "Backpressure",
    "Changed",
    "Codec",
    "Compact",
    "CorruptLogError",
    "CursorExpired",
    "CursorRegressed",
    "DecodeError",
    "Decoded",
    "Delete",
    "Delivery",
    "Derived",
    "DerivedState",
    "EncodeError",
    "Ended",
    "Event",
    "Export",
    "ExportManifest",
    "FoldSnapshot",
    "FoldlogError",
    "Follower",
    "FollowerState",
    "FollowerStats",
    "ForeignFileError",
    "ForkedStore",
    "Get",
    "Health",
    "InvalidFormatError",
    "KeyExists",
    "KeyOutsideView",
    "KvEntry",
    "Lagged",
    "LinkState",
    "LinkStats",
    "LogAccessError",
    "LogChangedError",
    "LogPoisonedError",
    "LogRegressedError",
    "Mirror",
    "MirrorReadOnly",
    "MirrorStats",
    "MutableView",
    "OpenReport",
    "Page",
    "Purge",
    "Put",
    "Range",
    "RangePage",
    "ReentrantCall",
    "Removed",
    "RequestTimeout",
    "ResetHeld",
    "Restart",
    "Rewound",
    "RocksDbSnapshot",
    "SnapshotStore",
    "State",
    "Stats",
    "Status",
    "Store",
    "StoreClosed",
    "StoreFailed",
    "StoreLocked",
    "Synced",
    "Undecodable",
    "Update",
    "Upstream",
    "UpstreamError",
    "UpstreamLost",
    "UpstreamMissing",
    "UpstreamOversize",
    "UpstreamRefused",
    "VersionMismatch",
    "VersionToken",
    "View",
    "ViewWatch",
    "Watch",
    "WatchCursor",
    "WriterCrashed",
    "__version__",
    "derive",
    "diff",
    "follow",
    "mirror",
    "open",
    "upstreams",
    "view",
]


def __getattr__(name: str) -> Any:
    """Import on first access what needs asyncio or an extra: a store needs neither."""
    if name not in ("aio", "metrics"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return import_module(f"foldlog.{name}")
