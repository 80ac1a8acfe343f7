"""The dispatcher: one thread that serves all subscribed actors of a store or a follower.

It follows the ring, and looks up whom each group concerns. It serves these in turns, a few events
at a time, and never waits for any of them. So an actor that is slow or dead does not hold up the
others.

The thread runs while there is anyone to serve. It yields the interpreter often, since the writer
and the actors that it feeds need it, too.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

from foldlog.actors.base.threads import OwnThread, call_aside
from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.prefixes import PrefixIndex, listed
from foldlog.actors.feeds.ring import Cell, Group, Place, Ring
from foldlog.protocol.logger import log

CHECK_S = 1.0
"""How long it may take to notice, while no events come, that an actor is dead."""
EVENTS_A_TURN = 16
"""Events sent to one actor before the next one has its turn."""
GROUPS_A_LOOK = 64
"""Groups that are looked at together. The more, the later the first sleeper is woken."""
SLICE_S = 0.002
"""How long it works before it yields the interpreter."""
REST_SHARE = 1.0
"""It then rests for this share of the time that it worked."""
PAUSE_S = 0.001
"""It rests at least this long between two looks, so that it is woken for many groups at once."""


class Served(Protocol):
    """What the dispatcher serves. It calls it on its own thread only."""

    def serve(self, limit: int) -> bool:
        """Send up to `limit` events. True if there are more and there is room for them."""

    def check(self) -> None:
        """Notice that the actor is dead, or takes nothing any more."""

    def give_up(self, reason: str) -> None:
        """End it without being served."""

    def after_fork(self) -> None:
        """In a forked child: it is over, and its actor is not there to be told."""

    @property
    def is_over(self) -> bool:
        """True if there is nothing more to do for it."""


class Dispatcher:
    """See the module."""

    def __init__(self, ring: Ring, published: PrefixIndex) -> None:
        """`published` is the index that the publisher tells."""
        self._ring, self._published = ring, published
        self._reset()

    def _reset(self) -> None:
        self.index = PrefixIndex()
        """Wakes those that are served. The dispatcher tells it."""
        self._bookmark = Bookmark()
        self._joining: deque[Served] = deque()
        self._ready: deque[Served] = deque()
        """Those that may have something to send. May hold some twice."""
        self._served: dict[Served, None] = {}
        self._runner: dict[str, OwnThread] = {}
        """The claim of the thread that runs, under one key: taken and released in one step."""
        self._doubted: OwnThread | None = None
        """One that had not begun at the last look."""
        self._next_check = 0.0

    def add(self, served: Served) -> None:
        """Serve it. If no thread can be started, it is given up."""
        self._joining.append(served)
        if self._runner:
            self._bookmark.wake()
        else:
            call_aside(self._start, lambda error: self._not_started(served, error))

    def wake(self, served: Served) -> None:
        """It may have something to send, or is to end. Any thread may call it. Never blocks."""
        if served in self._served:  # else it is over, or is looked at once it has joined
            self._ready.append(served)
            self._bookmark.wake()

    def look_after(self) -> None:
        """Start the thread again if it died before its first line, or before it was started. Who
        publishes calls this now and then."""
        runner = self._runner.get("thread")
        if runner is None:
            if self._joining:
                call_aside(self._start, lambda error: None)  # later, then
        elif runner.has_begun:
            self._doubted = None
        elif runner is not self._doubted:
            self._doubted = runner
        elif runner.withdraw():
            self._release()

    def _claim(self, me: OwnThread) -> bool:
        """Claim to be the one that runs. False if there is another one: it is woken.

        Never in a caller's frame, which an interrupt could leave with the claim held.
        """
        if self._runner.setdefault("thread", me) is me:
            return True
        self._bookmark.wake()
        return False

    def _release(self) -> None:
        self._runner.pop("thread", None)

    def _start(self) -> None:
        """Start the thread, unless one runs."""
        thread = OwnThread("foldlog-dispatcher", lambda: self._run(thread), lambda: None)
        if not self._claim(thread):
            return
        try:
            thread.start()
        except BaseException as error:
            while True:
                for served in listed(self._joining):
                    self._not_started(served, error)
                self._release()
                # Some may have been added before that.
                if not self._joining or not self._claim(thread):
                    return

    def _not_started(self, served: Served, error: BaseException) -> None:
        """Give it up, unless a thread serves it that was started for another one."""
        try:
            self._joining.remove(served)
        except ValueError:
            return
        served.give_up(f"no thread could be started: {error}")

    def _run(self, me: OwnThread) -> None:
        """Serve, until there is nobody to serve. The thread was started with the claim. Called
        again if a MemoryError ends it."""
        while self._claim(me):
            try:
                self._ready.extend(self._served)  # if it is called again
                self._bookmark.place(self._ring, self._published)
                self.index.told = None
                self._serve_all()
            except BaseException:  # a mailbox of the user's may raise anything
                log.exception("the dispatcher failed")
                for served in (*listed(self._served), *listed(self._joining)):
                    served.give_up("the dispatcher failed")
                self._served.clear()
                self._joining.clear()
            finally:
                self._let_go()
                self._release()
            if not self._joining:  # else some were added before that
                return

    def _let_go(self) -> None:
        """Nobody is served: keep no group, no state and no actor."""
        self._bookmark.leave()
        self._bookmark.cell = Cell()
        self._ready.clear()
        self.index.told = None
        self.index.wake_all()

    def _serve_all(self) -> None:
        while True:
            while self._joining:
                served = self._joining.popleft()
                self._served[served] = None
                self._ready.append(served)
            if not self._served:
                return
            self._check_all()
            began = time.thread_time()
            followed = self._follow()
            if self._serve_ready() or followed:
                # More may come soon: look again after a rest, and only then wait to be woken.
                time.sleep(max((time.thread_time() - began) * REST_SHARE, PAUSE_S))
            elif not self._joining:
                self._bookmark.sleep(CHECK_S)

    def _follow(self) -> bool:
        """Wake those that the groups published since concern. True if there were any groups."""
        bookmark, before = self._bookmark, self._bookmark.cell
        bookmark.begin(0.0)
        while (source := bookmark.first()) is not None:
            if isinstance(source, Group):
                after = self.index.tell_run(source.run(GROUPS_A_LOOK))
            else:
                self.index.wake_all()
                self.index.told = after = Place(source.fold, source.next)
            bookmark.drop(after)
        return bookmark.cell is not before

    def _serve_ready(self) -> bool:
        """Serve those that are ready, in turns, for a while. True if there were any."""
        ready, until = self._ready, time.monotonic() + SLICE_S
        did = False
        while ready and time.monotonic() < until:
            served = ready.popleft()
            if served not in self._served:
                continue
            did = True
            if served.serve(EVENTS_A_TURN):
                ready.append(served)
            if served.is_over:
                self._served.pop(served, None)
        return did

    def _check_all(self) -> None:
        now = time.monotonic()
        if now < self._next_check:
            return
        self._next_check = now + CHECK_S
        for served in listed(self._served):
            served.check()
            if served.is_over:
                self._served.pop(served, None)

    def after_fork(self) -> None:
        """In a forked child, where the thread is not."""
        for served in (*self._served, *self._joining):
            served.after_fork()
        self._reset()
