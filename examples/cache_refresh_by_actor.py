"""A cache of rendered pages in an actor that receives changes, and renders only changed pages
again.

The actor subscribes to the store. It receives the state, then `Synced`, then each change, in order
and once. If it were too slow, it would receive `Lagged` and then the difference, which it can
handle like any other change. The same holds for `Rewound` from a follower.

    python examples/cache_refresh_by_actor.py
"""

from __future__ import annotations

import queue
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pykka

import foldlog
from foldlog import Changed, Delete, Ended, Put, Synced, WatchCursor

TIMEOUT_S = 30.0


class Show(NamedTuple):
    """Ask for a page. Reply: the page, or None if there is none."""

    name: str


class PageCache(pykka.ThreadingActor):
    """Renders a page on request, and caches it until its source changes."""

    use_daemon_thread = True

    def __init__(self, news: queue.SimpleQueue[str]) -> None:
        super().__init__()
        self._sources: dict[str, bytes] = {}
        self._pages: dict[str, str] = {}
        self._news = news
        self.rendered = 0

    def on_receive(self, message: Any) -> Any:
        if isinstance(message, Show):
            return self._show(message.name)
        if isinstance(message, Changed):
            self._refresh(message)
        elif isinstance(message, Synced):
            self._news.put(f"in step with the store, {len(self._sources)} pages")
        elif isinstance(message, Ended):
            self._news.put("the store was closed; what is cached is still served")
        return None

    def _show(self, name: str) -> tuple[str | None, int]:
        if name not in self._pages and name in self._sources:
            self._pages[name] = f"<h1>{self._sources[name].decode()}</h1>"
            self.rendered += 1
        return self._pages.get(name), self.rendered

    def _refresh(self, message: Changed) -> None:
        name = message.update.key.removeprefix("page/")
        was_cached = self._pages.pop(name, None) is not None
        if isinstance(message.update, Put):
            self._sources[name] = message.update.value
        else:
            self._sources.pop(name, None)
        if was_cached:
            self._news.put(f"{name} is out of date since {message.cursor.as_u64()}")


def main() -> None:
    news: queue.SimpleQueue[str] = queue.SimpleQueue()
    cache = PageCache.start(news)

    def show(name: str) -> None:
        page, rendered = cache.ask(Show(name), timeout=TIMEOUT_S)
        print(f"{name}: {page} ({rendered} rendered so far)")

    with tempfile.TemporaryDirectory() as folder:
        with foldlog.open(Path(folder) / "site.log") as store:
            store.apply(
                [Put("page/home", b"Home"), Put("page/about", b"About us"), Put("css/a", b"")],
                WatchCursor.from_u64(1),
            )
            store.subscribe(cache, "page/")
            print(news.get(timeout=TIMEOUT_S))
            for name in ("home", "about", "home", "about"):
                show(name)
            store.apply(
                [Put("page/home", b"Welcome"), Put("css/a", b"h1 {}")], WatchCursor.from_u64(2)
            )
            print(news.get(timeout=TIMEOUT_S))
            show("home")
            show("about")
            store.apply([Delete("page/about")], WatchCursor.from_u64(3))
            print(news.get(timeout=TIMEOUT_S))
            show("about")
        print(news.get(timeout=TIMEOUT_S))
        show("home")
    cache.stop()


if __name__ == "__main__":
    main()
