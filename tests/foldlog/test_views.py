"""Typed views: decoded once, in key order, wrong only where a value is."""

from __future__ import annotations

import gc
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
from actor_kit import DEADLINE_S

import foldlog
from foldlog import (
    AppendLogSnapshot,
    Decoded,
    DecodeError,
    EncodeError,
    FoldlogError,
    KeyOutsideView,
    Lagged,
    MutableView,
    Put,
    Removed,
    StoreClosed,
    Synced,
    Undecodable,
    View,
    WatchCursor,
)

ON_EACH_ENGINE = True

msgspec = pytest.importorskip("msgspec")
pydantic = pytest.importorskip("pydantic")


class Route(msgspec.Struct, frozen=True):  # type: ignore[misc, name-defined]
    host: str
    weight: int = 1


class Flag(pydantic.BaseModel):  # type: ignore[misc, name-defined]
    percent: int


class Counting:
    """A codec of text that counts, and refuses what says "bad"."""

    def __init__(self) -> None:
        self.decoded: list[bytes] = []

    def encode(self, value: str) -> bytes:
        if "bad" in value:
            raise LookupError("this is bad")
        return value.encode()

    def decode(self, raw: bytes) -> str:
        self.decoded.append(raw)
        if b"bad" in raw:
            raise LookupError("this is bad")
        return raw.decode()


@pytest.mark.parametrize(
    ("codec", "value", "raw"),
    [
        ("json", {"a": [1, None, "é"]}, '{"a":[1,null,"é"]}'.encode()),
        ("msgpack", {"a": b"\0", 1: "x"}, None),
        ("raw", b"\0\xff", b"\0\xff"),
        ("pickle", {1, 2}, None),
        (Route, Route("10.0.0.1", 3), b'{"host":"10.0.0.1","weight":3}'),
        (Flag, Flag(percent=5), b'{"percent":5}'),
        (Counting(), "text", b"text"),
        (msgspec.json, [1], b"[1]"),
    ],
)
def test_each_codec_gives_back_what_was_assigned(path: Path, codec: Any, value: Any, raw: Any):
    with foldlog.open(path) as store:
        view = foldlog.view(store, codec)
        view["k"] = value
        assert view["k"] == value
        assert type(view["k"]) is type(value)
        assert raw is None or store.get("k").value == raw
        assert view["k"] is view["k"], "decoded once"


@pytest.mark.parametrize("codec", ["yaml", "", None, 3, int, object()])
def test_what_is_no_codec_is_refused_at_once(path: Path, codec: Any):
    with foldlog.open(path) as store, pytest.raises((TypeError, ValueError), match="codec"):
        foldlog.view(store, codec)


@pytest.mark.parametrize(
    ("codec", "bad"),
    [
        ("json", float("nan")),
        ("json", object()),
        ("msgpack", object()),
        ("raw", "text"),
        ("pickle", threading.Lock()),
        (Route, object()),
        (Counting(), "bad"),
    ],
)
def test_a_value_that_does_not_encode_is_a_typed_error_and_nothing_is_stored(
    path: Path, codec: Any, bad: Any
):
    with foldlog.open(path) as store:
        view = foldlog.view(store, codec)
        with pytest.raises(EncodeError) as caught:
            view["k"] = bad
        assert caught.value.key == "k"
        assert caught.value.__cause__ is caught.value.cause
        assert (len(store), store.snapshot().seq) == (0, 0)


def test_a_codec_that_makes_no_bytes_stores_nothing(path: Path):
    class Text:
        def encode(self, value: str) -> Any:
            return value

        def decode(self, raw: bytes) -> str:
            return ""

    with foldlog.open(path) as store:
        with pytest.raises(EncodeError, match="made str, not bytes"):
            foldlog.view(store, Text())["k"] = "x"
        assert len(store) == 0


@pytest.mark.parametrize(
    ("codec", "raw"),
    [
        ("json", b"{"),
        ("json", b"NaN"),
        ("json", b"\xff"),
        ("json", b"[" * 100_000),
        ("msgpack", b"\xc1"),
        ("msgpack", b"\x93\x01"),
        ("msgpack", b"\x01\x01"),
        ("pickle", b"nonsense"),
        (Route, b'{"host": 1}'),
        (Flag, b'{"percent": "many"}'),
        (Counting(), b"bad"),
    ],
)
def test_a_value_that_does_not_decode_is_an_error_for_its_key_alone(
    path: Path, codec: Any, raw: bytes
):
    with foldlog.open(path) as store:
        view = foldlog.view(store, codec)
        store.apply([Put("b", raw, foldlog.VersionToken.from_u64(9))], 1)
        with pytest.raises(DecodeError) as caught:
            view["b"]
        assert (caught.value.key, int(caught.value.version)) == ("b", 9)
        assert isinstance(caught.value.cause, Exception)
        assert "b" in view
        assert list(view) == ["b"]


def test_iterating_over_values_goes_on_behind_one_that_does_not_decode(path: Path):
    with foldlog.open(path) as store:
        store.apply([Put("a", b"1"), Put("b", b"bad"), Put("c", b"3")], 1)
        view = foldlog.view(store, Counting())
        assert (view["a"], view["c"], len(view)) == ("1", "3", 3)
        values = iter(view.values())
        assert next(values) == "1"
        with pytest.raises(DecodeError):
            next(values)
        assert list(values) == ["3"]
        with pytest.raises(DecodeError):
            dict(view.items())


def test_each_entry_that_changed_is_decoded_once_however_often_it_is_read(path: Path):
    """Also across compactions, evictions from the store's cache, iterators, snapshots, watches."""
    codec = Counting()
    with foldlog.open(path) as store:
        store.apply([Put(f"{n:03}", b"v%d" % n) for n in range(300)], 1)
        view = foldlog.view(store, codec)
        for _ in range(3):
            for key in view:
                assert view[key] == f"v{int(key)}"
            assert len(list(view.items())) == 300
            store.compact()
            store.put("000", b"v0")  # the same bytes: nothing to decode
            before = view.snapshot()
            assert before["299"] is view["299"]
        assert len(codec.decoded) == 300
        store.put("007", b"changed")
        with view.watch() as watch:
            told = [watch.next(DEADLINE_S) for _ in range(301)]
        assert told[7].value == "changed"
        assert told[7].value is view["007"]
        assert codec.decoded[300:] == [b"changed"]


def test_what_was_removed_does_not_pile_up_among_the_decoded(path: Path):
    """A program whose keys come and go: each is read once; its decoded value must go too."""
    with foldlog.open(path, sync="never") as store:
        view = foldlog.view(store, "raw")
        view["stays"] = b"x"
        for number in range(3000):
            key = f"session/{number}"
            store.apply([Put(key, b"x"), *[foldlog.Delete(f"session/{number - 1}")]], number)
            assert view[key] == b"x"
            assert view["stays"] == b"x"
        assert len(view._values.by_key) <= 300
        assert len(view._values._sweep) <= 300


def test_a_view_of_a_prefix_has_its_keys_in_order_and_no_others(path: Path):
    with foldlog.open(path) as store:
        view = foldlog.view(store, "raw", "b/")
        for key in ("c", "b/2", "a", "b/1", "b"):
            store.put(key, b"x")
        assert list(view) == list(view.keys()) == ["b/1", "b/2"]
        assert list(reversed(view)) == ["b/2", "b/1"]
        assert (len(view), "b/1" in view, "a" in view, 3 in view) == (2, True, False, False)
        store.put("b/3", b"x")
        assert (len(view), view.get("a"), view.get("b/9", b"no")) == (3, None, b"no")
        assert view == {"b/1": b"x", "b/2": b"x", "b/3": b"x"}


def test_a_key_outside_of_the_prefix_is_refused_typed_and_nothing_is_stored(path: Path):
    with foldlog.open(path) as store:
        store.put("a", b"x")
        view = foldlog.view(store, "raw", "b/")
        for use in (
            lambda: view["a"],
            lambda: view.__setitem__("a", b"y"),
            lambda: view.__delitem__("a"),
            lambda: view.pop("a"),
        ):
            with pytest.raises(KeyOutsideView) as caught:
                use()
            assert isinstance(caught.value, FoldlogError)
        assert store.get("a").value == b"x"
        for bad in (1, None, b"b/"):
            with pytest.raises(TypeError):
                view[bad]  # type: ignore[index]
        with pytest.raises(TypeError):
            view[[]]  # type: ignore[index]


def test_a_view_over_a_store_is_a_mutable_mapping(path: Path):
    with foldlog.open(path) as store:
        view = foldlog.view(store, "json", "n/")
        assert isinstance(view, MutableView)
        view.update({"n/a": 1, "n/b": 2})
        assert view.setdefault("n/c", 3) == 3
        assert view.pop("n/a") == 1
        del view["n/b"]
        for key in ("n/a", "n/b"):
            with pytest.raises(KeyError):
                del view[key]
        store.put("other", b"")
        view.clear()
        assert list(store) == ["other"]


@pytest.mark.append_log("it is followed")
@pytest.mark.parametrize("kind", ["engine", "follower", "snapshot"])
def test_a_view_over_what_only_reads_is_read_only(path: Path, kind: str):
    with foldlog.open(path) as store:
        store.put("a", b"1")
        if kind == "follower":
            with foldlog.follow(path) as follower:
                view = foldlog.view(follower, "json")
                assert (type(view), view["a"]) == (View, 1)
                version = store.put("a", b"2")
                follower.wait_for(seq=version)
                assert view["a"] == 2
        elif kind == "snapshot":
            view = foldlog.view(store.snapshot(), "json")
            store.put("a", b"2")
            assert (type(view), view["a"]) == (View, 1)
            with pytest.raises(TypeError):
                view.watch()
    if kind == "engine":
        with AppendLogSnapshot.open(path)[1] as engine:
            assert foldlog.view(engine, "json")["a"] == 1


@pytest.mark.append_log("RocksDB's snapshots end")
def test_a_snapshot_of_a_view_does_not_change_and_shares_what_was_decoded(path: Path):
    codec = Counting()
    with foldlog.open(path) as store:
        view = foldlog.view(store, codec)
        view["a"], view["b"] = "1", "2"
        assert view["a"] == "1"
        before = view.snapshot()
        assert before["a"] is view["a"]
        view["a"] = "3"
        del view["b"]
        assert dict(before.items()) == {"a": "1", "b": "2"}
        assert dict(view.items()) == {"a": "3"}
        assert codec.decoded == [b"1", b"2", b"3"]
        assert not isinstance(before, MutableView)
    assert before["b"] == "2", "it outlives its store"


def test_a_view_on_a_closed_store_says_so(path: Path):
    store = foldlog.open(path)
    view = foldlog.view(store, "raw")
    view["a"] = b"1"
    assert view["a"] == b"1"
    store.close()
    for use in (
        lambda: view["a"],
        lambda: view["b"],
        lambda: "a" in view,
        lambda: len(view),
        lambda: list(view),
        lambda: view.items(),
        view.snapshot,
        view.watch,
        lambda: view.__setitem__("a", b""),
        lambda: view.__delitem__("a"),
    ):
        with pytest.raises(StoreClosed):
            use()


def test_a_watch_tells_decoded_changes_and_outlives_a_value_that_is_broken(path: Path):
    with foldlog.open(path) as store:
        view = foldlog.view(store, Route, "r/")
        view["r/a"] = Route("1")
        with view.watch() as watch:
            assert watch.next(DEADLINE_S) == Decoded(
                "r/a", Route("1"), foldlog.VersionToken.from_u64(1), WatchCursor.none(), 1
            )
            assert isinstance(watch.next(DEADLINE_S), Synced)
            store.apply([Put("r/b", b"{"), Put("x", b"")], 5)
            view["r/c"] = Route("3")
            del view["r/a"]
            broken, put, removed = (watch.next(DEADLINE_S) for _ in range(3))
            assert isinstance(broken, Undecodable)
            assert (broken.key, broken.error.key, int(broken.cursor)) == ("r/b", "r/b", 5)
            assert (put.key, put.value) == ("r/c", Route("3"))
            assert isinstance(removed, Removed)
            assert watch.next(0.0) is None
        assert watch.ended
        assert next(watch, None) is None


def test_a_watch_of_a_view_that_falls_behind_is_told_so(path: Path, monkeypatch: Any):
    monkeypatch.setattr("foldlog.actors.feeds.ring.RING_GROUPS", 4)
    with foldlog.open(path) as store:
        view = foldlog.view(store, "raw")
        with view.watch() as watch:
            watch.next(DEADLINE_S)
            for number in range(20):
                view["k"] = b"%d" % number
            events = [watch.next(DEADLINE_S) for _ in range(3)]
    assert isinstance(events[0], Lagged)
    assert events[1].value == b"19"
    assert isinstance(events[2], Synced)


def test_errors_of_views_pickle(path: Path):
    for error in (
        DecodeError("k", b"\1", ValueError("x")),
        EncodeError("k", ValueError("x")),
        KeyOutsideView("k", "p"),
    ):
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.key) == (str(error), "k")


def test_a_view_keeps_its_store_from_being_dropped(path: Path):
    view = foldlog.view(foldlog.open(path), "raw")
    gc.collect()
    view["a"] = b"1"
    view._source.close()


class Struck(Exception):
    """The soft time limit of a task queue, say, that its signal handler raises."""


class StruckOnce(Counting):
    """As if the handler ran within the codec's next call."""

    def __init__(self) -> None:
        super().__init__()
        self.strikes = [Struck()]

    def encode(self, value: str) -> bytes:
        while self.strikes:
            raise self.strikes.pop()
        return super().encode(value)

    def decode(self, raw: bytes) -> str:
        while self.strikes:
            raise self.strikes.pop()
        return super().decode(raw)


def test_what_a_signal_handler_raises_within_a_codec_says_nothing_of_the_value(open_store: Any):
    """A good value counted as one that cannot be decoded or encoded, and the limit was lost."""
    store, codec = open_store(), StruckOnce()
    with pytest.raises(Struck):
        foldlog.view(store, codec)["a"] = "good"
    store.put("a", b"good")
    codec.strikes.append(Struck())
    with pytest.raises(Struck):
        foldlog.view(store, codec)["a"]
    with foldlog.view(store, codec).watch() as watch:
        codec.strikes.append(Struck())
        with pytest.raises(Struck):
            watch.next(DEADLINE_S)
        event = watch.next(DEADLINE_S)
        assert (event.key, event.value) == ("a", "good")
    codec.strikes.append(Struck())
    with pytest.raises(EncodeError):
        foldlog.view(store, codec)["a"] = "bad"
