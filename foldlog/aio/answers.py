"""Awaiting the writer's answers, and what became of those that were cancelled."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from math import inf
from typing import Any, Literal, TypeAlias

from foldlog.aio.bridge import bridge_here
from foldlog.protocol.errors import RequestTimeout
from foldlog.protocol.options import check_timeout

Outcome: TypeAlias = Literal["withdrawn", "done", "unknown"]
LOOK_S = 1.0
"""Between two looks for an answer: no memory may have been left to tell of it."""


def outcome(error: BaseException) -> Outcome | None:
    """What became of a call that was cancelled, or timed out by `asyncio.timeout`, as known at that
    moment.

    "withdrawn": it was not started, and never will be. "done": it was carried out. "unknown": the
    writer is processing it. None: the error does not come from a call on a store.
    """
    seen: BaseException | None = error
    while seen is not None:
        found: Outcome | None = getattr(seen, "_foldlog_outcome", None)
        if found is not None:
            return found
        seen = seen.__cause__ or seen.__context__
    return None


def note_outcome(error: asyncio.CancelledError, what: Outcome, note: str) -> None:
    error._foldlog_outcome = what  # type: ignore[attr-defined]
    error.add_note(f"foldlog: {note}")


def withdraw(future: Future[Any], error: asyncio.CancelledError) -> None:
    """The caller was cancelled: withdraw its request if it has not started, and note the
    outcome."""
    if future.cancel():
        note_outcome(error, "withdrawn", "the request was withdrawn before it started")
    elif future.done() and future.exception() is None:
        note_outcome(error, "done", "the request had already been carried out")
    elif future.done():
        note_outcome(error, "withdrawn", f"the request had already failed: {future.exception()}")
    else:
        note_outcome(error, "unknown", "the writer is processing the request and will carry it out")


async def settled(future: Future[Any], timeout_s: float = inf) -> None:
    """Wait until it is done, or `timeout_s` have passed."""
    loop, bridge = asyncio.get_running_loop(), bridge_here()
    waiter: asyncio.Future[None] = loop.create_future()
    deadline = loop.time() + timeout_s
    timer: asyncio.TimerHandle

    def settle() -> None:
        if not waiter.done():
            waiter.set_result(None)

    def look() -> None:
        nonlocal timer
        rest = deadline - loop.time()
        if rest <= 0 or future.done():
            settle()
        else:
            timer = loop.call_later(min(rest, LOOK_S), look)

    future.add_done_callback(lambda _: bridge.post(settle))
    timer = loop.call_later(min(timeout_s, LOOK_S), look)
    try:
        await waiter
    finally:
        timer.cancel()


async def answer(future: Future[Any], timeout_s: float) -> Any:
    """Await the writer's answer."""
    try:
        await settled(future, check_timeout(timeout_s))
    except asyncio.CancelledError as error:
        withdraw(future, error)
        raise
    if future.done():
        return future.result()
    if future.cancel():
        raise RequestTimeout(f"no answer within {timeout_s} s; the request was withdrawn")
    if future.done():  # it arrived at the last moment
        return future.result()
    raise RequestTimeout(f"no answer within {timeout_s} s; its outcome is unknown")
