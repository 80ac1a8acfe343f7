"""Feeds to which a test publishes what it likes, without a store; and actors that are told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pykka
from actor_kit import cursor

from foldlog import FoldSnapshot, Put
from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.feeds import Feeds
from foldlog.actors.feeds.ring import Group
from foldlog.actors.feeds.subscription import Subscription
from foldlog.protocol.events import Event
from foldlog.protocol.updates import Batch, encode_batch


def batch_of(*keys: str) -> Batch:
    return encode_batch([Put(key, b"") for key in keys], cursor(1))


def group_of(fold: FoldSnapshot, *keys: str) -> Group:
    """A group that leads on from `fold`."""
    batch = batch_of(*keys)
    fold = fold.with_group([batch])
    return Group(fold, fold.seq, [batch])


class Publisher:
    """Publishes groups with the keys that a test names, each on top of the last."""

    def __init__(self, *subscribed: Bookmark) -> None:
        self.feeds = Feeds()
        self.fold = FoldSnapshot.empty()
        for bookmark in subscribed:
            self.feeds.add(bookmark)

    def prepare(self, *keys: str) -> tuple[FoldSnapshot, int, list[Batch]]:
        """What is to be published next."""
        batch = batch_of(*keys)
        self.fold = self.fold.with_group([batch])
        return self.fold, self.fold.seq, [batch]

    def publish(self, *keys: str) -> FoldSnapshot:
        self.feeds.publish(*self.prepare(*keys))
        return self.fold


def drained(subscription: Subscription) -> list[Event]:
    """All events that wait."""
    return list(iter(lambda: subscription.next(0.0), None))


class Listener(pykka.ThreadingActor):
    """Does with each message what the test wants, and then tells it `heard`."""

    use_daemon_thread = True

    def __init__(self, act: Callable[[Any], object], heard: Callable[[Any], object]) -> None:
        super().__init__()
        self.act, self.heard = act, heard

    def on_receive(self, message: Any) -> None:
        try:
            self.act(message)
        finally:
            self.heard(message)
