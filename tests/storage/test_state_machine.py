"""The engine against a plain dict, through every operation in any order; then with small limits.

With real limits a leaf holds at least 128 entries and a delta begins at 8192 changes, so a few
keys would never reach them. The second machine has limits of a handful: leaves split and join,
runs settle, pieces divide, windows slide.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from readback import read_back

import foldlog.protocol.updates
import foldlog.storage.fold.delta
import foldlog.storage.fold.leaf
import foldlog.storage.log.scan
from foldlog import (
    AppendLogSnapshot,
    Delete,
    FoldSnapshot,
    KvEntry,
    Purge,
    Put,
    VersionToken,
    WatchCursor,
)
from foldlog.storage.artifacts.artifact import read_manifest
from foldlog.storage.fold.base import EMPTY_BASE

pytestmark = pytest.mark.exhaustive


@pytest.fixture(autouse=True)
def _read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    read_back(monkeypatch)


KEYS = [
    "",
    *(f"{a}{b}" for a in "abc" for b in ["", *"0123456789"]),
    "a\0",
    "a\n",
    "é",
    "\ud7ff",
    "\ue000",
    "\U00010000",
    "\U0010ffff",
]
PREFIXES = ["", "a", "a1", "b", "c9", "d", "\ud7ff", "\U0010ffff"]
BOUNDS = [*KEYS, "a\ud800", "b5\U0010ffff", "c", "zz"]
EAGER, LAZY = 0, 10 * 1024 * 1024

keys = st.sampled_from(KEYS)
tokens = st.binary(max_size=10)
bounds = st.one_of(st.none(), st.sampled_from(BOUNDS))
values = st.one_of(st.binary(max_size=8), st.sampled_from([bytes(600), b"x" * 700]))
puts = st.builds(Put, keys, values, tokens.map(VersionToken))
removals = st.builds(lambda kind, key: kind(key), st.sampled_from([Delete, Purge]), keys)
batches = st.lists(st.one_of(puts, puts, removals), max_size=12)

Model = dict[str, tuple[bytes, bytes]]


def read(reader: Any, prefix: str = "") -> Model:
    found = {entry.key: (entry.value, bytes(entry.version)) for entry in reader.range(prefix)}
    assert list(found) == sorted(found)
    return found


def compare_range(
    reader: Any,
    model: Model,
    prefix: str,
    start: str | None,
    stop: str | None,
    limit: int | None,
    reverse: bool,
) -> None:
    """Every way to read a range gives what the dict holds there."""
    matching = [
        key
        for key in sorted(model, reverse=reverse)
        if key.startswith(prefix) and (start or "") <= key and (stop is None or key < stop)
    ]
    expected = [(key, *model[key]) for key in matching[:limit]]
    how: Any = {"start": start, "stop": stop, "limit": limit, "reverse": reverse}
    for found in (reader.range(prefix, **how), reader.iter_range(prefix, **how)):
        assert [(e.key, e.value, bytes(e.version)) for e in found] == expected
    under = sorted(key for key in model if key.startswith(prefix))
    assert list(reader.keys(prefix)) == under
    assert list(reader.items(prefix)) == [(key, model[key][0]) for key in under]


def compare_entries(reader: Any, model: Model, wanted: list[str]) -> None:
    found = reader.get_many(wanted)
    assert list(found) == [key for key in dict.fromkeys(wanted) if key in model]
    for key in wanted:
        entry = reader.get(key)
        assert (entry and (entry.value, bytes(entry.version))) == model.get(key)
        assert found.get(key) == entry
        assert (key in reader) == (key in model)


class FoldMachine(RuleBasedStateMachine):
    """One log, one dict."""

    snapshots = Bundle("snapshots")
    artifacts = Bundle("artifacts")

    @initialize(threshold=st.sampled_from([EAGER, 300, LAZY]))
    def start(self, threshold: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="foldlog-test-"))
        self.path = self.folder / "state.log"
        self.model: Model = {}
        self.cursor = WatchCursor.none()
        self.seq = 0
        self.names = 0
        self.threshold = threshold
        cursor, self.snap = AppendLogSnapshot.open(self.path, threshold)
        assert cursor.is_none

    def teardown(self) -> None:
        if hasattr(self, "snap"):
            self.snap.close()
            _, snap = AppendLogSnapshot.open(self.path)
            assert read(snap) == self.model
            assert snap.cursor() == self.cursor
            snap.close()
            shutil.rmtree(self.folder)

    def name(self) -> Path:
        self.names += 1
        return self.folder / f"made-{self.names}"

    @rule(batch=batches, cursor=tokens.map(WatchCursor))
    def apply(self, batch: list[Any], cursor: WatchCursor) -> None:
        self.seq += 1
        assert self.snap.apply(batch, cursor) == self.seq
        self.cursor = cursor
        for update in batch:
            if isinstance(update, Put):
                self.model[update.key] = update.value, bytes(update.version)
            else:
                self.model.pop(update.key, None)

    @rule(
        batch=batches,
        bad=st.sampled_from([Put("\ud800", b""), Put("a", "text"), Delete(None), "no update"]),
    )
    def apply_in_vain(self, batch: list[Any], bad: Any) -> None:
        with pytest.raises((TypeError, ValueError)):
            self.snap.apply([*batch, bad], WatchCursor.from_u64(666))

    @rule(key=st.one_of(keys, st.text(max_size=2)))
    def get(self, key: str) -> None:
        found = self.snap.get(key)
        assert (found and (found.value, bytes(found.version))) == self.model.get(key)

    @rule(prefix=st.sampled_from(PREFIXES))
    def range(self, prefix: str) -> None:
        expected = {key: value for key, value in self.model.items() if key.startswith(prefix)}
        assert read(self.snap, prefix) == expected
        streamed: list[KvEntry] = []
        self.snap.for_each_in_range(prefix, streamed.append)
        assert streamed == self.snap.range(prefix)

    @rule(
        prefix=st.sampled_from(PREFIXES),
        start=bounds,
        stop=bounds,
        limit=st.one_of(st.none(), st.integers(0, 12)),
        reverse=st.booleans(),
    )
    def range_within(
        self, prefix: str, start: str | None, stop: str | None, limit: int | None, reverse: bool
    ) -> None:
        compare_range(self.snap, self.model, prefix, start, stop, limit, reverse)

    @rule(wanted=st.lists(st.one_of(keys, st.text(max_size=2)), max_size=8))
    def get_many(self, wanted: list[str]) -> None:
        compare_entries(self.snap, self.model, wanted)

    @rule(
        held=snapshots,
        prefix=st.sampled_from(PREFIXES),
        start=bounds,
        stop=bounds,
        limit=st.one_of(st.none(), st.integers(0, 12)),
        reverse=st.booleans(),
        wanted=st.lists(keys, max_size=8),
    )
    def read_some_of_what_is_held(
        self,
        held: tuple[FoldSnapshot, Model, WatchCursor],
        prefix: str,
        start: str | None,
        stop: str | None,
        limit: int | None,
        reverse: bool,
        wanted: list[str],
    ) -> None:
        snapshot, model, _ = held
        compare_range(snapshot, model, prefix, start, stop, limit, reverse)
        compare_entries(snapshot, model, wanted)

    @rule()
    def compact(self) -> None:
        self.snap.compact()
        assert self.path.stat().st_size == self.snap._engine.log.position.offset
        assert self.snap._engine.is_compact

    @rule(threshold=st.sampled_from([EAGER, LAZY]))
    def close_and_reopen(self, threshold: int) -> None:
        self.snap.close()
        self.reopen(threshold)

    @rule(threshold=st.sampled_from([EAGER, LAZY]))
    def get_killed_and_reopen(self, threshold: int) -> None:
        self.snap._engine.log.abandon()
        self.reopen(threshold)

    def reopen(self, threshold: int) -> None:
        cursor, self.snap = AppendLogSnapshot.open(self.path, threshold)
        assert cursor == self.snap.cursor() == self.cursor
        assert self.snap.report.seq == self.seq
        assert self.snap.report.cut_bytes == 0

    @rule(target=snapshots)
    def hold(self) -> tuple[FoldSnapshot, Model, WatchCursor]:
        return self.snap.snapshot(), dict(self.model), self.cursor

    @rule(held=consumes(snapshots))
    def read_what_was_held(self, held: tuple[FoldSnapshot, Model, WatchCursor]) -> None:
        snapshot, model, cursor = held
        assert read(snapshot) == model
        assert len(snapshot) == len(model)
        assert snapshot.cursor() == cursor
        assert list(snapshot) == sorted(model)
        assert dict(snapshot.items("a")) == {
            key: value for key, (value, _) in model.items() if key.startswith("a")
        }
        for key in KEYS:
            assert (key in snapshot) == (key in model)

    @rule(target=artifacts)
    def export(self) -> tuple[Path, Model, WatchCursor]:
        dest = self.name()
        manifest = self.snap.export_to(dest)
        assert manifest.cursor == self.cursor
        assert read_manifest(dest) == manifest
        return dest, dict(self.model), self.cursor

    @rule(artifact=artifacts)
    def import_(self, artifact: tuple[Path, Model, WatchCursor]) -> None:
        source, model, cursor = artifact
        resume, snap = AppendLogSnapshot.import_artifact(source, self.name())
        with snap:
            assert resume == cursor
            assert read(snap) == model

    @precondition(lambda self: hasattr(self, "snap"))
    @invariant()
    def size_and_cursor_agree(self) -> None:
        assert len(self.snap) == len(self.model)
        assert self.snap.cursor() == self.cursor


def test_any_history_reads_as_a_dict_would():
    run_state_machine_as_test(
        FoldMachine, settings=settings(max_examples=20, stateful_step_count=40)
    )


def tiny_cache(fold: FoldSnapshot, limit_bytes: int) -> None:
    """In place of `limit_cache`: room for some entries and indexes, so that most are dropped."""
    if fold.base is not EMPTY_BASE:
        fold.base.cache.set_limit(min(limit_bytes, 20_000))


@pytest.fixture
def everything_small(monkeypatch):
    for module, name, value in [
        (foldlog.storage.fold.leaf, "MIN_ENTRIES", 2),
        (foldlog.storage.fold.leaf, "MAX_ENTRIES", 6),
        (foldlog.storage.fold.leaf, "_BOUNDARY_MASK", 3),
        (foldlog.storage.fold.leaf, "MAX_LEAF_BYTES", 900),
        (foldlog.storage.fold.delta, "PIECE_ENTRIES", 4),
        (foldlog.storage.fold.delta, "SETTLE_ENTRIES", 8),
        (foldlog.storage.fold.delta, "STEP_ENTRIES", 1),
        (foldlog.storage.fold.delta.EMPTY_DELTA, "settle_entries", 8),
        (foldlog.storage.fold.delta, "COLLECTED_ENTRIES", 16),
        (FoldSnapshot, "limit_cache", tiny_cache),
        (foldlog.protocol.updates, "SLICE", 3),
        (foldlog.protocol.updates, "_SMALL_BATCH", 4),
    ]:
        monkeypatch.setattr(module, name, value)
    assert "window_bytes" in foldlog.storage.log.scan.read_frames.__kwdefaults__
    monkeypatch.setitem(foldlog.storage.log.scan.read_frames.__kwdefaults__, "window_bytes", 64)


@pytest.mark.usefixtures("everything_small")
def test_any_history_reads_as_a_dict_would_with_leaves_runs_and_pieces_of_a_handful():
    run_state_machine_as_test(
        FoldMachine, settings=settings(max_examples=30, stateful_step_count=40)
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("everything_small")
def test_long_histories_read_as_a_dict_would():
    run_state_machine_as_test(
        FoldMachine, settings=settings(max_examples=600, stateful_step_count=100)
    )
