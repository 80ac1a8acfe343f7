"""Two actors that use a store only by message: to read, to write and to receive changes.

`Stock` takes orders: it asks the store's readers for entries, and its writer to apply updates.
`Display` subscribes to a prefix and receives each change as it happens.

    python examples/actors_by_message.py
"""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import pykka

import foldlog
from foldlog import Apply, Changed, Ended, Get, Put, RangePage, Synced, WatchCursor

TIMEOUT_S = 30.0


class Order(NamedTuple):
    """Order `count` of an item. Reply: how many are left, or None if there were too few."""

    item: str
    count: int
    number: int


class Stock(pykka.ThreadingActor):
    """Sells what is in stock. Its references stay valid when the store's actors are restarted."""

    use_daemon_thread = True

    def __init__(self, reader: pykka.ActorRef[Any], writer: pykka.ActorRef[Any]) -> None:
        super().__init__()
        self._reader, self._writer = reader, writer

    def on_receive(self, message: Any) -> Any:
        assert isinstance(message, Order)
        entry = self._reader.ask(Get(f"stock/{message.item}"), timeout=TIMEOUT_S)
        left = (int(entry.value) if entry else 0) - message.count
        if left < 0:
            return None
        updates = [
            Put(f"stock/{message.item}", b"%d" % left),
            Put(f"order/{message.number}", message.item.encode()),
        ]
        self._writer.ask(Apply(updates, WatchCursor.from_u64(message.number)), timeout=TIMEOUT_S)
        return left


class Display(pykka.ThreadingActor):
    """Shows what it receives, in order: the state, Synced, then each change."""

    use_daemon_thread = True

    def __init__(self, until: int) -> None:
        super().__init__()
        self._until = until
        self.shown: dict[str, bytes] = {}
        self.synced = threading.Event()
        self.complete = threading.Event()
        self.over = threading.Event()

    def on_receive(self, message: Any) -> None:
        if isinstance(message, Changed):
            if isinstance(message.update, Put):
                self.shown[message.update.key] = message.update.value
            else:
                self.shown.pop(message.update.key, None)
            if message.cursor == WatchCursor.from_u64(self._until):
                self.complete.set()
        elif isinstance(message, Synced):
            self.synced.set()
        elif isinstance(message, Ended):
            self.over.set()


def main(path: Path) -> None:
    with foldlog.open(path) as store:
        store.writer.ask(
            Apply([Put("stock/apple", b"10"), Put("stock/pear", b"3")], WatchCursor.from_u64(1)),
            timeout=TIMEOUT_S,
        )
        stock = Stock.start(store.reader, store.writer)
        display = Display.start(until=7)
        events = display.proxy()
        synced, complete, over = (
            event.get(timeout=TIMEOUT_S) for event in (events.synced, events.complete, events.over)
        )
        store.subscribe(display, "stock/")
        assert synced.wait(TIMEOUT_S)
        print("the display shows", events.shown.get(timeout=TIMEOUT_S))
        for number, (item, count) in enumerate(
            [("apple", 4), ("pear", 2), ("pear", 2), ("apple", 5), ("plum", 1), ("pear", 1)], 2
        ):
            left = stock.ask(Order(item, count, number), timeout=TIMEOUT_S)
            print(f"order {number}: {count} {item}:", "refused" if left is None else f"{left} left")
        assert complete.wait(TIMEOUT_S)
        print("the display shows", events.shown.get(timeout=TIMEOUT_S))
        page = store.reader.ask(RangePage("order/", limit=2), timeout=TIMEOUT_S)
        print("orders:", [entry.key for entry in page.entries], "and more" if page.next else "")
    assert over.wait(TIMEOUT_S)
    print("the display's subscription has ended")
    stock.stop(timeout=TIMEOUT_S)
    display.stop(timeout=TIMEOUT_S)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder) / "stock.log")
