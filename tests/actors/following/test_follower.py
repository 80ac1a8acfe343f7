"""The follower's thread, run by hand: whom it tells of what it read."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S, batch, cursor
from interrupts import RunsOut, points

import foldlog
from foldlog import AppendLogSnapshot, Changed, Synced
from foldlog.actors.feeds.subscription import Subscription
from foldlog.actors.following.follower import FollowerState, FollowerThread
from foldlog.protocol.errors import LogChangedError
from foldlog.protocol.options import CACHE_BYTES
from foldlog.storage.log.files import OS_FILES
from foldlog.storage.log.tail import Advance, Jump


@pytest.fixture
def snap(path: Path) -> Iterator[AppendLogSnapshot]:
    with AppendLogSnapshot.open(path)[1] as snap:
        yield snap


class Polled:
    """A follower's thread that is not started, and who subscribes while it polls."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.thread = FollowerThread(path, OS_FILES, 0.5, CACHE_BYTES.default)
        self.thread._poll()
        self.subscriptions: list[Subscription] = []
        self.steps: list[Any] = []
        self.subscribing = False
        poll = self.thread._tail.poll

        def polled() -> Advance | Jump | None:
            step = poll()
            self.steps.append(step)
            if self.subscribing:
                self.subscribe()
            return step

        monkeypatch.setattr(self.thread._tail, "poll", polled)

    def subscribe(self) -> None:
        feeds, thread = self.thread.feeds, self.thread
        self.subscriptions.append(Subscription(feeds, lambda: thread.snapshot, "shared/", None))

    def told(self) -> list[Any]:
        """The cursors of what the last subscriber was told."""
        told: list[object] = []
        while event := self.subscriptions[-1].next(0.0):
            assert isinstance(event, Changed | Synced), event
            told.append((type(event).__name__, int(event.cursor)))
        return told


@pytest.fixture
def polled(path: Path, snap: AppendLogSnapshot, monkeypatch: pytest.MonkeyPatch) -> Polled:
    return Polled(path, monkeypatch)


def apply(snap: AppendLogSnapshot, *numbers: int) -> None:
    for number in numbers:
        snap.apply(batch(number), cursor(number))


def changes_of(*numbers: int) -> list[Any]:
    """What a subscriber is told of batches: each changes a few shared keys."""
    return [
        ("Changed", number)
        for number in numbers
        for update in batch(number)
        if update.key.startswith("shared/")
    ]


def test_batches_are_kept_only_for_subscribers(polled: Polled, snap: AppendLogSnapshot):
    apply(snap, 1, 2)
    polled.thread._poll()
    assert polled.steps[-1].batches is None
    polled.subscribe()
    apply(snap, 3, 4)
    polled.thread._poll()
    assert len(polled.steps[-1].batches) == 2
    told = polled.told()
    assert told[-len(changes_of(3, 4)) :] == changes_of(3, 4)
    polled.subscriptions[-1].close()
    apply(snap, 5)
    polled.thread._poll()
    assert polled.steps[-1].batches is None
    assert polled.thread.snapshot.range() == snap.range("")


def test_who_subscribes_during_a_poll_is_told_of_each_batch_that_it_found(
    polled: Polled, snap: AppendLogSnapshot
):
    """Nobody was subscribed when the poll began, so that it kept no batches; the one who came
    meanwhile holds the state from before it, and would have missed the steps in between."""
    polled.subscribing = True
    apply(snap, 1, 2, 3)
    polled.thread._poll()
    assert polled.steps[-1].batches is None
    assert polled.told() == [("Synced", 0), *changes_of(1, 2, 3)]


def test_batches_that_cannot_be_read_again_are_told_as_a_difference(
    polled: Polled, snap: AppendLogSnapshot, monkeypatch: pytest.MonkeyPatch
):
    def broken() -> None:
        raise LogChangedError(snap.report.path, "cut meanwhile")

    monkeypatch.setattr(polled.thread._tail, "batches_again", broken)
    polled.subscribing = True
    apply(snap, 1, 2, 3)
    polled.thread._poll()
    assert polled.thread.snapshot.range() == snap.range("")
    polled.thread._poll()
    assert polled.thread.state is FollowerState.FOLLOWING
    assert [event for event in polled.told() if event[0] == "Changed"] == changes_of(3)


@pytest.mark.parametrize(
    "stride", [7, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["some", "all"]
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_follower_outlives_a_memory_error_at_any_point_of_its_thread(
    path, snap, monkeypatch, stride
):
    """Its thread ended, and it served what it had for ever, as a follower that is in step."""
    run, count = FollowerThread._run, 0
    for number in points(stride, first=2):  # the first is outside of all that it guards
        strike = RunsOut(number)

        def struck(self: FollowerThread, strike: RunsOut = strike) -> None:
            sys.setprofile(strike)
            run(self)

        monkeypatch.setattr(FollowerThread, "_run", struck)
        with foldlog.follow(path, poll_interval_s=0.01) as follower:
            for _ in range(2):
                count += 1
                snap.apply(batch(count), cursor(count))
                follower.wait_for(cursor(count), DEADLINE_S)
            assert follower.get("shared/0").value == b"%d" % count
        if not strike.fired:
            break
    assert number > 1
