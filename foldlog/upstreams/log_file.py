"""Another foldlog log, written by this or another process, read through a follower. A position is
the sequence of a batch.

It is not the batch's cursor, because local writes do not change that. The log holds every change
since its last compaction. For a mirror that is further behind, the link folds the difference from
the state.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b

from foldlog.actors.following.follower import FollowerState
from foldlog.follow import Follower, follow
from foldlog.protocol.errors import CorruptLogError, InvalidFormatError
from foldlog.protocol.events import Changed, Synced
from foldlog.protocol.store import StrPath
from foldlog.protocol.tokens import NAME_BYTES, WatchCursor
from foldlog.protocol.updates import Put, Update
from foldlog.protocol.upstream import (
    Changes,
    Identity,
    Prefixes,
    UpstreamLost,
    UpstreamMissing,
    UpstreamRefused,
)
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.foldlog.replay import read_header
from foldlog.storage.handover import Latch
from foldlog.storage.log.backlog import batches_after_seq
from foldlog.storage.log.files import OS_FILES, ReadHandle, resolve

PIECE_UPDATES = 1000
PIECE_BYTES = 1024 * 1024
LOOK_S = 0.5
"""The longest wait for an event, in seconds: bounds how long a stop takes."""


class LogFile:
    """The foldlog log at `path`, which need not exist yet. A log in the Rust crate's format cannot
    be followed: UpstreamRefused."""

    def __init__(self, path: StrPath) -> None:
        name = os.fsdecode(path)
        if not name or "\0" in name:
            raise ValueError("the path of a log is not empty, and has no NUL")
        self.path = os.path.abspath(name)
        self._follower: Follower | None = None

    def __repr__(self) -> str:
        return f"LogFile({self.path!r})"

    async def identify(self) -> Identity:
        if self._follower is None:
            self._follower = await self._opened()
        return await asyncio.to_thread(self._identify, self._follower)

    async def _opened(self) -> Follower:
        """A follower of the log. If this call is cancelled, it is closed once it is open."""
        opened: list[Follower] = []  # whoever takes it out is to close it
        given_up = Latch()

        def open_on_thread() -> None:
            opened.append(self._open())
            if given_up.is_set():
                _close_last(opened)

        try:
            await asyncio.to_thread(open_on_thread)
        except BaseException:
            given_up.set()
            _close_last(opened)
            raise
        return opened.pop()

    def _open(self) -> Follower:
        with self._told():
            path = resolve(self.path)
            if not path.is_dir():
                ReadHandle(OS_FILES, path).close()  # a follower would wait for a missing log
            return follow(path)  # names what it refuses: a directory, another format

    def _identify(self, follower: Follower) -> Identity:
        with self._told():
            path = resolve(self.path)
            with ReadHandle(OS_FILES, path) as handle:
                header = read_header(handle)
            fold = follower.snapshot()
        if follower.state is not FollowerState.FOLLOWING or fold.seq < header.base_seq:
            raise UpstreamLost(f"{self.path}: the follower is {follower.state}")
        name = blake2b(b"log\0" + os.fsencode(path), digest_size=NAME_BYTES)
        return Identity(name.digest() + header.log_id, _at(header.base_seq), _at(fold.seq))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Raise what goes wrong as the link expects it."""
        try:
            yield
        except FileNotFoundError:
            raise UpstreamMissing(f"{self.path}: the log does not exist") from None
        except InvalidFormatError as error:
            raise UpstreamRefused(str(error)) from None
        except OSError as error:
            raise UpstreamLost(f"{self.path}: {error.strerror or error}") from None
        except CorruptLogError as error:
            raise UpstreamLost(str(error)) from None

    async def changes(self, after: WatchCursor, prefixes: Prefixes) -> AsyncIterator[Changes]:
        """The batches after `after`, then new ones as they arrive. UpstreamLost if a compaction has
        removed them."""
        follower = self._following()
        fold = follower.snapshot()
        seq = after.as_u64() or 0
        if seq > fold.seq:
            raise UpstreamLost(f"{self.path} ends at batch {fold.seq}, before {seq}")
        backlog = await asyncio.to_thread(batches_after_seq, fold, seq)
        if backlog is None:
            raise UpstreamLost(f"{self.path} does not reach back to batch {seq}")
        updates: list[Update] = []
        try:
            for seq, batch in backlog:
                updates += batch.updates()
                if len(updates) >= PIECE_UPDATES:
                    yield Changes(updates, _at(seq), fold.seq - seq)
                    updates = []
        except (OSError, CorruptLogError) as error:
            raise UpstreamLost(str(error)) from None
        yield Changes(updates, _at(fold.seq), 0)
        async for piece in self._live(follower, fold):
            yield piece

    async def _live(self, follower: Follower, fold: FoldSnapshot) -> AsyncIterator[Changes]:
        seq = fold.seq
        with follower.watch(since=fold) as watch:
            del fold
            updates: list[Update] = []
            size = 0
            while True:
                event = watch.next(0.0)
                if event is None:
                    if updates:
                        yield Changes(updates, _at(seq), 0)
                        updates, size = [], 0
                    else:
                        await asyncio.sleep(0)
                    event = await asyncio.to_thread(watch.next, LOOK_S)
                if isinstance(event, Changed):
                    full = len(updates) >= PIECE_UPDATES or size >= PIECE_BYTES
                    if full and event.seq != seq:  # never split a batch
                        yield Changes(updates, _at(seq))
                        updates, size = [], 0
                    seq = event.seq
                    updates.append(event.update)
                    size += len(event.update.value) if isinstance(event.update, Put) else 0
                elif isinstance(event, Synced):
                    seq = max(seq, event.seq)
                elif event is not None:
                    raise UpstreamLost(f"{self.path}: {event}")
                elif watch.ended is not None:
                    raise UpstreamLost(f"{self.path}: {watch.ended}")
                elif follower.state is not FollowerState.FOLLOWING:
                    raise UpstreamLost(
                        f"{self.path} is {follower.state}: {follower.stats().reason}"
                    )
                elif not updates:
                    yield Changes([], _at(seq), 0)

    async def state(self, prefixes: Prefixes) -> AsyncIterator[Changes]:
        fold = self._following().snapshot()
        try:
            for prefix in prefixes or ("",):
                for block in fold.blocks(prefix):
                    yield Changes([Put(*entry) for entry in block], _at(fold.seq))
        except (OSError, CorruptLogError) as error:
            raise UpstreamLost(str(error)) from None
        yield Changes([], _at(fold.seq), 0)

    def _following(self) -> Follower:
        if self._follower is None:
            raise UpstreamLost(f"{self.path} is not followed")
        return self._follower

    async def close(self) -> None:
        follower, self._follower = self._follower, None
        if follower is not None:
            await asyncio.to_thread(follower.close)


def _close_last(opened: list[Follower]) -> None:
    with suppress(IndexError):
        opened.pop().close()


def _at(seq: int) -> WatchCursor:
    return WatchCursor.from_u64(seq)
