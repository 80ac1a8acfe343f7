"""Sleepers are woken by changes under their prefix, and by nothing else."""

from __future__ import annotations

import random

import pytest
from counting import calls_of
from feeds_kit import Publisher, drained, group_of

from foldlog import FoldSnapshot
from foldlog.actors.feeds import ring as ring_module
from foldlog.actors.feeds.bookmark import Bookmark
from foldlog.actors.feeds.prefixes import PrefixIndex
from foldlog.actors.feeds.ring import Group, Place, Ring
from foldlog.actors.feeds.subscription import Subscription
from foldlog.protocol.events import Changed, Event, Lagged


class Published(Publisher):
    """With sleepers."""

    def sleeper(self, prefix: str, woken: list[str]) -> Bookmark:
        bookmark = Bookmark(prefix, lambda: woken.append(prefix))
        self.feeds.add(bookmark)
        bookmark.join()
        return bookmark


@pytest.fixture
def published() -> Published:
    published = Published(Bookmark())  # so that there is a place before the first group of a test
    published.publish("first")
    return published


def test_only_those_whose_prefix_is_touched_are_woken_and_once(published: Published):
    woken: list[str] = []
    for prefix in ("", "a", "a/", "a/1", "a/1/long", "b", "unchanged"):
        published.sleeper(prefix, woken)
    published.publish("a/1", "b2")
    published.publish("a/1", "b2")
    assert sorted(woken) == ["", "a", "a/", "a/1", "b"]


def test_a_state_reached_by_unknown_steps_wakes_all(published: Published):
    woken: list[str] = []
    for prefix in ("a", "b"):
        published.sleeper(prefix, woken)
    published.feeds.jump(published.fold)
    assert sorted(woken) == ["a", "b"]


def test_a_group_that_does_not_follow_the_last_one_wakes_all(published: Published):
    """What came between may have changed anything."""
    woken: list[str] = []
    published.sleeper("a", woken)
    published.prepare("a")
    published.publish("unrelated")
    assert woken == ["a"]


def test_one_that_left_is_not_woken_and_not_kept(published: Published):
    woken: list[str] = []
    gone = published.sleeper("a", woken)
    published.feeds.remove(gone)
    admitted = published.sleeper("b", woken)
    published.publish("other")
    published.feeds.remove(admitted)
    published.publish("a", "b")
    assert woken == []
    index = published.feeds._index
    assert not index._parked
    assert not index._joined
    assert not index._left


def test_watches_that_come_and_go_while_nothing_is_published_leave_nothing(published: Published):
    for _ in range(100):
        published.feeds.remove(published.sleeper("a", []))
    assert not published.feeds._index._joined
    assert not published.feeds._index._left


def test_one_that_sleeps_through_more_than_the_ring_holds_has_missed_nothing(
    published: Published, monkeypatch: pytest.MonkeyPatch
):
    """Nothing under its prefix was changed: it must not be told that it lagged."""
    monkeypatch.setattr(ring_module, "RING_GROUPS", 4)
    bookmark = published.sleeper("a", [])
    for number in range(20):
        published.publish(f"b{number}")
    assert len(bookmark) == 0
    published.publish("a1")
    bookmark.begin(0.0)
    place = bookmark.first()
    assert isinstance(place, Place)
    assert place.fold.seq == published.fold.seq - 1, "all but the last are skipped in one step"
    bookmark.drop(place)
    assert isinstance(bookmark.first(), Group)


def test_a_group_that_came_just_before_the_sleeper_lay_down_is_not_skipped(published: Published):
    """Found by the tests of aio: a spot taken after a group was told of knows nothing of it."""
    bookmark = Bookmark("a")
    published.feeds.add(bookmark)
    published.publish("a1")
    bookmark.join()
    published.publish("b")
    bookmark.begin(0.0)
    group = bookmark.first()
    assert isinstance(group, Group)
    assert group.touches("a")


@pytest.mark.parametrize("seed", range(20))
def test_groups_told_together_wake_the_same_sleepers_at_the_same_places_as_one_by_one(seed: int):
    chance = random.Random(seed)
    ring, groups = Ring(), [group_of(FoldSnapshot.empty(), "first")]
    while len(groups) < 12:
        fold = groups[-1].fold
        if chance.random() < 0.1:  # what came between is not told
            fold = group_of(fold, "a/unseen").fold
        groups.append(group_of(fold, chance.choice(["a/1", "b", "c"]), "d"))
    places = [ring.append(group) for group in groups]
    prefixes = chance.sample(["", "a", "a/", "b", "c", "x", "y/long"], 3)

    def told(split: int) -> list[tuple[str, bool, Place | None]]:
        """What becomes of sleepers, if the first groups are told one by one."""
        index = PrefixIndex()
        index.tell(groups[0], places[0])
        spots = [index.join(prefix, lambda: None) for prefix in prefixes]
        for group, place in zip(groups[1:split], places[1:split], strict=True):
            index.tell(group, place)
        if split < len(groups):
            assert index.tell_run(groups[split].run(100)) == places[-1]
        assert index.told == places[-1]
        return [(spot.prefix, spot.released, spot.before) for spot in spots]

    assert groups[3].run(4) == groups[3:7]
    assert told(1) == told(6) == told(len(groups))


def test_groups_that_touch_no_prefix_are_looked_at_together(monkeypatch: pytest.MonkeyPatch):
    """2,000 actors sleep, and nothing concerns them: the dispatcher looked for each group, and had
    the interpreter for a tenth of what the writer's work takes."""
    ring, groups = Ring(), [group_of(FoldSnapshot.empty(), "first")]
    while len(groups) < 20:
        groups.append(group_of(groups[-1].fold, f"k{len(groups)}"))
    places = [ring.append(group) for group in groups]
    index = PrefixIndex()
    index.tell(groups[0], places[0])
    spots = [index.join(f"{number}/", lambda: None) for number in range(100)]
    looks = calls_of(monkeypatch, PrefixIndex, "_touched")
    index.tell_run(groups[1:])
    assert len(looks) == 1
    assert not any(spot.released for spot in spots)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_order_of_joining_reading_and_publishing_each_change_is_told_once(
    published: Published, monkeypatch: pytest.MonkeyPatch, seed: int
):
    monkeypatch.setattr(ring_module, "RING_GROUPS", 1000)
    chance = random.Random(seed)
    prefixes = ["", "a", "ab", "b", "c/"]
    subscriptions = [
        Subscription(published.feeds, lambda: published.fold, prefix, published.fold)
        for prefix in prefixes
    ]
    told: list[list[Event]] = [[] for _ in prefixes]
    keys: list[str] = []

    def read(number: int) -> None:
        told[number] += drained(subscriptions[number])

    for _ in range(300):
        number = chance.randrange(len(prefixes))
        what = chance.choice(["publish", "publish", "read", "join", "recheck"])
        if what == "publish":
            keys.append(chance.choice(["a", "abc", "b/1", "c/2", "d"]) + str(len(keys)))
            published.publish(keys[-1])
        elif what == "read":
            read(number)
        elif what == "join":
            subscriptions[number].bookmark.join()
        else:  # sleeps, and looks again for no reason
            read(number)
            subscriptions[number].bookmark.join()
    for number, prefix in enumerate(prefixes):
        read(number)
        assert not any(isinstance(event, Lagged) for event in told[number])
        assert [event.update.key for event in told[number] if isinstance(event, Changed)] == [
            key for key in keys if key.startswith(prefix)
        ]
