"""A link whose store is a fold in memory, driven in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, NamedTuple

import virtual_time
from scripted_upstream import Plain, at

from foldlog import FoldSnapshot, LinkState, Update
from foldlog.actors.link.intake import LinkConfig
from foldlog.actors.link.link import Link
from foldlog.actors.store.core import Restart
from foldlog.protocol.updates import Batch, encode_batch

ORIGIN = Plain.origin
DEADLINE_S = 100.0
"""Virtual."""


class Fed(NamedTuple):
    """A batch that a link gave to its store."""

    puts: dict[str, bytes]
    deletes: set[str]
    position: int | None
    origin: bytes
    rewound: str


class MemorySink:
    """Writes at once what it is fed, and keeps a note of it."""

    keeps_marks = True

    def __init__(self) -> None:
        self.fold = FoldSnapshot.empty()
        self.fed: list[Fed] = []
        self.restarts: list[Restart] = []
        self.error: BaseException | None = None
        """What a look at it raises."""

    def hold(self, updates: list[Update], cursor: Any, origin: bytes) -> None:
        """Begin with this."""
        self.fold = self.fold.with_group([encode_batch(updates, cursor, origin)])

    def snapshot(self) -> FoldSnapshot:
        if self.error is not None:
            raise self.error
        return self.fold

    def feed(self, batch: Batch, rewound: str) -> Future[int]:
        before, self.fold = self.fold, self.fold.with_group([batch])
        changed = {key for changes in batch.changes for key in changes}
        live = {key: self.fold.get(key) for key in changed}
        assert before.seq + 1 == self.fold.seq
        self.fed.append(
            Fed(
                {key: entry.value for key, entry in live.items() if entry is not None},
                {key for key, entry in live.items() if entry is None},
                batch.cursor.as_u64(),
                batch.origin,
                rewound,
            )
        )
        written: Future[int] = Future()
        written.set_result(self.fold.seq)
        return written

    def note_restart(self, restart: Restart) -> None:
        self.restarts.append(restart)

    @property
    def entries(self) -> dict[str, bytes]:
        return dict(self.fold.items())


def holding(upstream: Plain, position: int | None = None, origin: bytes = ORIGIN) -> MemorySink:
    """A sink that holds what the upstream has sent up to a position; None: all."""
    sink, updates = MemorySink(), upstream.updates[:position]
    sink.hold(updates, at(len(updates)), origin)
    return sink


class Driven(Link):
    """Notes the states that it enters, with their reasons."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.states: list[tuple[LinkState, str]] = []
        enter = self.progress.set

        def noted(state: LinkState, reason: str = "") -> None:
            self.states.append((state, reason))
            enter(state, reason)

        self.progress.set = noted  # type: ignore[method-assign]


async def reached(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, with a virtual deadline."""
    deadline = asyncio.get_running_loop().time() + DEADLINE_S
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "a condition did not come to hold"
        await asyncio.sleep(0.01)


def drive(
    sink: MemorySink, upstream: Any, script: Callable[[Driven], Awaitable[Any]], **config: Any
) -> Driven:
    """Run a link until `script` is through, and stop it. Returns it for what it noted."""

    async def main() -> Driven:
        link = Driven("virtual", sink, upstream, LinkConfig(**config))
        task = asyncio.create_task(link._main())
        try:
            await script(link)
        finally:
            link._stopping = True
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return link

    return virtual_time.run(main())


async def live(link: Driven) -> None:
    """A script: until the link is live."""
    await reached(lambda: link.state is LinkState.LIVE)


async def failed(link: Driven) -> None:
    """A script: until the link has failed."""
    await reached(lambda: link.state is LinkState.FAILED)
