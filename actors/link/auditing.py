"""Audits: compare the fold with the upstream, both ways, and correct it.

An audit finds what no change told: deletes that were purged, keys that expired, values of another
past. It runs beside the tail, at attach and then at a pace that keeps to its budget. Keys that the
tail touches meanwhile are exempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from itertools import repeat
from operator import attrgetter
from typing import Any

from foldlog.actors.link.checking import check_changes, check_revisions
from foldlog.actors.link.intake import Intake, LinkConfig, Sink
from foldlog.actors.link.progress import Progress
from foldlog.actors.link.resuming import Audit, audit_delay_s, next_audit_s
from foldlog.actors.link.tail import Tail
from foldlog.protocol.logger import log
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Delete, KvEntry, Put, Update, fold_versions
from foldlog.protocol.upstream import (
    Changes,
    HasMarks,
    HasRevisions,
    HasState,
    Upstream,
    UpstreamLost,
)

BLOCKS = 8
"""Leaves compared before the loop is let run: a few milliseconds."""


def can_audit(upstream: Upstream) -> bool:
    """True if an upstream can tell what a mirror must hold."""
    return isinstance(upstream, HasRevisions) and isinstance(upstream, HasState)


class Auditor:
    """See the module. Used on the link's loop alone."""

    def __init__(
        self,
        upstream: Upstream,
        config: LinkConfig,
        sink: Sink,
        intake: Intake,
        tail: Tail,
        progress: Progress,
    ) -> None:
        self._upstream, self._config, self._sink = upstream, config, sink
        self._intake, self._tail, self._progress = intake, tail, progress

    async def run(self, delay_s: float) -> None:
        """Audit after `delay_s`, and then again and again."""
        config, tail, was_clean = self._config, self._tail, True
        while True:
            await asyncio.sleep(delay_s)
            await tail.until(lambda: tail.is_caught_up)
            spent = time.thread_time()
            is_clean = await self._audit()
            self._progress.audits += 1
            # What the tail did meanwhile counts too: rather too few audits than too many.
            cost_s = time.thread_time() - spent
            pace_s = audit_delay_s(cost_s, config.audit_budget, config.audit_interval_s)
            delay_s = next_audit_s(pace_s, is_clean=is_clean, was_clean=was_clean)
            was_clean = is_clean
            if is_clean:
                tail.is_audited, self._intake.accepted = True, False
                tail.show_live()

    async def _audit(self) -> bool:
        """Compare, and correct what differs. True if nothing did."""
        intake, tail = self._intake, self._tail
        tail.touched = set()
        try:
            with_values = intake.in_doubt
            found, position = await self._revisions(with_values)
            audit = Audit(found, tail.touched)
            await self._reached(position)
            async with intake.turn:  # everything received is applied
                fold = self._sink.snapshot()
            for number, block in enumerate(fold.blocks()):
                audit.compare(list(map(_key, block)), _versions(block, with_values))
                if number % BLOCKS == BLOCKS - 1:
                    await asyncio.sleep(0)
            suspects = audit.end().difference(intake.skipped)
            if suspects and await self._mend(suspects):
                return False
            if with_values:
                await self._vouch()
            else:
                await self._check_past()
            return True
        finally:
            tail.touched = None

    async def _reached(self, position: WatchCursor) -> None:
        """Wait until the tail is at a position of the upstream that an audit has seen. Changes that
        the tail has yet to receive would count as missing."""
        tail, intake, asked = self._tail, self._intake, time.monotonic()
        await tail.until(lambda: intake.position >= position or tail.drained_at > asked)

    async def _vouch(self) -> None:
        """All values are known to be the upstream's: record the position with its mark."""
        intake = self._intake
        async with intake.turn:
            intake.in_doubt = False
            if intake.mark and self._sink.keeps_marks:
                await intake.apply([], intake.position, intake.mark)

    async def _check_past(self) -> None:
        """UpstreamLost if the upstream no longer knows the position under its mark: it went back
        while the connection held, as a cluster can."""
        upstream, intake = self._upstream, self._intake
        if isinstance(upstream, HasMarks) and intake.mark and not intake.in_doubt:
            position, mark = intake.position, intake.mark
            if await upstream.recalls(position, mark) is False:
                raise UpstreamLost("the upstream no longer knows the position")

    async def _revisions(self, with_values: bool) -> tuple[Mapping[str, bytes], WatchCursor]:
        config, upstream = self._config, self._upstream
        if config.parse is not None or with_values:
            # Versions that are not the upstream's own, or that may have been assigned twice.
            return await self._state_versions(with_values)
        assert isinstance(upstream, HasRevisions)
        found = check_revisions(await upstream.revisions(config.prefixes))
        versions = found.versions
        if config.prefixes:
            versions = {k: v for k, v in versions.items() if k.startswith(config.prefixes)}
        return versions, found.position

    async def _state_versions(self, with_values: bool) -> tuple[dict[str, bytes], WatchCursor]:
        versions: dict[str, bytes] = {}
        position = WatchCursor.none()
        async with contextlib.aclosing(self._state()) as pieces:
            async for piece in pieces:
                updates = self._intake.wanted(piece.updates)
                fold_versions(versions, updates, version_and_value if with_values else None)
                position = piece.position
        return versions, position

    async def _state(self) -> AsyncGenerator[Changes, None]:
        upstream = self._upstream
        assert isinstance(upstream, HasState)
        pieces = upstream.state(self._config.prefixes)
        async with contextlib.AsyncExitStack() as stack:
            if inspect.isasyncgen(pieces):
                stack.push_async_callback(pieces.aclose)
            async for piece in pieces:
                yield check_changes(piece)
                await self._intake.rest()

    async def _mend(self, suspects: set[str]) -> bool:
        """Read the suspects again and fold what differs. True if anything did."""
        entries: dict[str, Put] = {}
        position = WatchCursor.none()
        async with contextlib.aclosing(self._state()) as pieces:
            async for piece in pieces:
                for update in self._intake.wanted(piece.updates):
                    if update.key in suspects:
                        if isinstance(update, Put):
                            entries[update.key] = update
                        else:
                            entries.pop(update.key, None)
                position = piece.position
        # A newer entry than the tail has seen would be followed by older ones.
        await self._reached(position)
        intake, progress = self._intake, self._progress
        async with intake.turn:
            fold, touched = self._sink.snapshot(), self._tail.touched or ()
            updates: list[Update] = []
            rewound = ""
            for key in sorted(suspects.difference(touched)):
                held, true = fold.get(key), entries.get(key)
                if true is None:
                    if held is not None:
                        updates.append(Delete(key))
                elif held != KvEntry(*true):
                    updates.append(true)
                    if held is not None and bytes(true.version) < bytes(held.version):
                        rewound = "the upstream went back: an audit found older entries"
            deleted = sum(type(update) is Delete for update in updates)
            intake.check_deletes(deleted, len(fold))
            if updates:
                log.info("%s: an audit mends %d entries", progress.name, len(updates))
                await intake.apply(updates, intake.position, intake.mark, rewound)
                progress.mended += len(updates)
                intake.accepted = False
        return bool(updates)


_key, _value = attrgetter("key"), attrgetter("value")


def _versions(block: list[KvEntry], with_values: bool) -> list[bytes]:
    # Not `entry.version`, which makes a token of each.
    versions: Iterable[Any] = map(tuple.__getitem__, block, repeat(2))
    return list(map(version_and_value, versions, map(_value, block)) if with_values else versions)


def version_and_value(version: bytes, value: object) -> bytes:
    """Of an entry. Equal, within this process, only for entries of the same version and value."""
    return version + hash(value).to_bytes(8, "big", signed=True)
