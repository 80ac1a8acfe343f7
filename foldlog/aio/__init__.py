"""Asynchronous versions of the store, follower and mirror, for programs that run on an event loop.

Reads are plain calls, since they never wait. Calls that wait for the writer are awaited: the
request goes into the writer's mailbox, and the answer comes back through the loop's
`call_soon_threadsafe`, with one wake-up for answers that arrive together. Work that may read or
decode for long (opening, closing, starting and reading a watch) runs on one thread kept for it by
each store. There is no second engine, and no thread per call.

A store may be used from several loops in several threads. A watch belongs to the loop that first
reads it.

    bridge.py     from any thread to a loop
    answers.py    awaiting the writer, and what became of a cancelled call
    off_loop.py   the thread for work off the loop
    opening.py    opening off the loop
    face.py       what stores and followers share
    store.py  mirror.py  follower.py  watch.py  view.py
"""

from __future__ import annotations

from foldlog.aio.answers import outcome
from foldlog.aio.follower import AsyncFollower
from foldlog.aio.mirror import AsyncMirror
from foldlog.aio.opening import Opening, opener
from foldlog.aio.store import AsyncStore
from foldlog.aio.view import AsyncView, view
from foldlog.aio.watch import AsyncWatch
from foldlog.follow import follow as follow_log
from foldlog.mirror import mirror as open_mirror
from foldlog.store import open as open_store

__all__ = [
    "AsyncFollower",
    "AsyncMirror",
    "AsyncStore",
    "AsyncView",
    "AsyncWatch",
    "Opening",
    "follow",
    "mirror",
    "open",
    "outcome",
    "view",
]

open = opener(
    open_store,
    AsyncStore,
    """`foldlog.open`, off the loop.

    Use `async with aio.open(path) as store`, or `store = await aio.open(path)`.
    If cancelled, it leaves nothing open.
    """,
)
follow = opener(
    follow_log,
    AsyncFollower,
    """`foldlog.follow`, off the loop.

    Use `async with aio.follow(path) as follower`, or await it.
    If cancelled, it leaves nothing open.
    """,
)
mirror = opener(
    open_mirror,
    AsyncMirror,
    """`foldlog.mirror`, off the loop.

    Use `async with aio.mirror(path, upstream) as mirror`, or await it.
    If cancelled, it leaves nothing open.
    """,
)
