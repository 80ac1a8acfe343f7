"""One attachment of a link: from finding out who the upstream is to losing it.

Nothing of it survives but what the store holds. It decides where to resume (`resuming`), loads the
state or folds the difference to it, and then lets the tail and the audits run.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any

from foldlog.actors.link.auditing import Auditor, can_audit, version_and_value
from foldlog.actors.link.checking import check_changes, check_identity
from foldlog.actors.link.intake import HookFailed, Intake, LinkConfig, Sink
from foldlog.actors.link.progress import LinkState, Progress
from foldlog.actors.link.resuming import Held, Plan, Step, confirms, mark_of, plan, scoped_origin
from foldlog.actors.link.tail import Tail
from foldlog.protocol.tokens import WatchCursor
from foldlog.protocol.updates import Delete, KvEntry, Put, Update
from foldlog.protocol.upstream import (
    Changes,
    HasMarks,
    HasState,
    Identity,
    ResetHeld,
    Upstream,
    UpstreamLost,
    UpstreamRefused,
)
from foldlog.storage.fold.snapshot import FoldSnapshot

CONFIRM_S = 1.0
"""Delay between the two identity checks that confirm an upstream went back. A deposed leader has
stepped down by then."""


class Attachment:
    """See the module. Used once, on the link's loop."""

    def __init__(
        self, upstream: Upstream, config: LinkConfig, sink: Sink, intake: Intake, progress: Progress
    ) -> None:
        self._upstream, self._config, self._sink = upstream, config, sink
        self._intake, self._progress = intake, progress

    async def run(self) -> None:
        """Attach, and follow until something fails. Returns if the upstream ends its changes."""
        progress, intake = self._progress, self._intake
        progress.set(
            LinkState.ATTACHING, progress.reason if progress.state is LinkState.LOST else ""
        )
        progress.attaches += 1
        found, decided = await self._decide()
        fold = self._sink.snapshot()
        intake.origin, intake.mark = found.origin, mark_of(fold.origin, found.origin)
        if decided.step is Step.LOAD:
            await self._load(found)
        elif decided.step is Step.REPLACE:
            await self._replace(found, decided)
        progress.set(LinkState.CATCHING_UP)
        intake.position = self._sink.snapshot().cursor()
        await self._follow(resumed=decided.step is Step.RESUME)

    async def _follow(self, *, resumed: bool) -> None:
        config, intake, progress = self._config, self._intake, self._progress
        tail = Tail(self._upstream, config.prefixes, intake, progress)
        tail.is_audited = not resumed or not can_audit(self._upstream)
        tasks = {asyncio.create_task(_without_exits(tail.run()))}
        if can_audit(self._upstream):
            auditor = Auditor(self._upstream, config, self._sink, intake, tail, progress)
            delay_s = 0.0 if resumed else config.audit_interval_s
            tasks.add(asyncio.create_task(_without_exits(auditor.run(delay_s))))
        else:
            intake.accepted = False
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await _end(tasks)

    async def _decide(self) -> tuple[Identity, Plan]:
        found = await self._identify()
        decided = await self._recalled(self._plan(found), found)
        if decided.step is Step.HOLD:
            raise ResetHeld(decided.reason)
        if decided.rewound:
            await asyncio.sleep(CONFIRM_S)
            again = await self._identify()
            if not confirms(found, decided, again, await self._recalled(self._plan(again), again)):
                raise UpstreamLost("the upstream cannot confirm its identity")
            found = again
        return found, decided

    async def _recalled(self, decided: Plan, found: Identity) -> Plan:
        """The plan; another one if it is to resume and the upstream says that the position belongs
        to different changes."""
        self._intake.in_doubt = False
        if decided.step is not Step.RESUME or not isinstance(self._upstream, HasMarks):
            return decided
        fold = self._sink.snapshot()
        mark = mark_of(fold.origin, found.origin)
        known = await self._upstream.recalls(fold.cursor(), mark) if mark else None
        self._intake.in_doubt = known is None
        if known is False:
            return Plan(Step.REPLACE, "the upstream was restored from a copy", rewound=True)
        return decided

    async def _identify(self) -> Identity:
        has_marks = isinstance(self._upstream, HasMarks)
        found = check_identity(await self._upstream.identify(), has_marks=has_marks)
        return found._replace(origin=scoped_origin(bytes(found.origin), self._config.prefixes))

    def _plan(self, found: Identity) -> Plan:
        fold = self._sink.snapshot()
        held = Held(fold.origin, fold.cursor(), len(fold) == 0)
        return plan(held, found, accepted=self._intake.accepted)

    async def _state(self, found: Identity) -> AsyncGenerator[Changes, None]:
        """All live entries, by whichever means the upstream offers."""
        upstream, prefixes = self._upstream, self._config.prefixes
        if isinstance(upstream, HasState):
            pieces = upstream.state(prefixes)
        elif found.first.is_none:
            pieces = upstream.changes(WatchCursor.none(), prefixes)
        else:
            raise UpstreamRefused(
                "the upstream has neither the changes since the cursor nor a state to send"
            )
        async with contextlib.AsyncExitStack() as stack:
            if inspect.isasyncgen(pieces):
                stack.push_async_callback(pieces.aclose)
            if not isinstance(upstream, HasState) and found.last.is_none:
                return
            async for piece in pieces:
                yield check_changes(piece)
                await self._intake.rest()
                if not isinstance(upstream, HasState) and piece.position >= found.last:
                    return

    async def _load(self, found: Identity) -> None:
        """Load the state into a store that is empty or partly loaded. The cursor is written
        last."""
        self._progress.set(LinkState.CATCHING_UP, "loading")
        intake, none = self._intake, WatchCursor.none()
        position, mark = found.last, b""
        held = dict(_held(self._sink.snapshot()))
        live = len(held)
        async with contextlib.aclosing(self._state(found)) as pieces:
            async for piece in pieces:
                updates = intake.wanted(piece.updates)
                position, mark = piece.position, piece.mark
                if held:
                    updates = [u for u in updates if not _is_held(held.pop(u.key, None), u)]
                if updates:
                    await intake.apply(updates, none, mark)
        intake.check_deletes(len(held), live)
        await intake.apply([Delete(key) for key in held], position, mark)
        intake.accepted = False

    async def _replace(self, found: Identity, decided: Plan) -> None:
        """Fold the difference to the whole state as one batch."""
        self._progress.set(LinkState.CATCHING_UP, decided.reason)
        intake, state = self._intake, dict[str, Put]()
        position, mark = found.last, b""
        async with contextlib.aclosing(self._state(found)) as pieces:
            async for piece in pieces:
                for update in intake.wanted(piece.updates):
                    if isinstance(update, Put):
                        state[update.key] = update
                    else:
                        state.pop(update.key, None)
                position, mark = piece.position, piece.mark
        fold = self._sink.snapshot()
        updates = await asyncio.to_thread(_difference, fold, state)
        intake.check_deletes(sum(type(update) is Delete for update in updates), len(fold))
        await intake.apply(updates, position, mark, decided.reason if decided.rewound else "")
        self._progress.resets += 1
        intake.accepted = False


def _held(fold: FoldSnapshot) -> Iterable[tuple[str, bytes]]:
    return (
        (entry.key, version_and_value(entry.version, entry.value))
        for block in fold.blocks()
        for entry in block
    )


def _is_held(held: bytes | None, update: Update) -> bool:
    return isinstance(update, Put) and held == version_and_value(update.version, update.value)


def _difference(fold: FoldSnapshot, state: dict[str, Put]) -> list[Update]:
    updates: list[Update] = []
    for block in fold.blocks():
        for entry in block:
            true = state.pop(entry.key, None)
            if true is None:
                updates.append(Delete(entry.key))
            elif entry != KvEntry(*true):
                updates.append(true)
    updates += state.values()
    return updates


async def _without_exits(part: Coroutine[Any, Any, None]) -> None:
    """Run a part. An exit raised in a task would end the event loop, not only the task."""
    try:
        await part
    except (SystemExit, KeyboardInterrupt) as error:
        raise HookFailed(error) from error


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel the tasks and wait until they have ended. Repeats, since a client library may swallow
    a cancellation."""
    rest = {task for task in tasks if not task.done()}
    while rest:
        for task in rest:
            task.cancel()
        _, rest = await asyncio.wait(rest, timeout=0.5)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # mark it as retrieved
