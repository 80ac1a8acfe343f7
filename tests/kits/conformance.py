"""The contract of `SnapshotStore`, written once for every kind of store.

A kind joins by adding a row to `KINDS` in `test_conformance.py`: its name, and how it opens and
imports. Nothing here relies on more than the contract, except for `compact`, which a kind may lack.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from foldlog import (
    Delete,
    KvEntry,
    Purge,
    Put,
    SnapshotStore,
    StoreClosed,
    VersionToken,
    WatchCursor,
)


class Kind(NamedTuple):
    """One kind of store."""

    name: str
    open: Callable[[Path], Any]
    """Create or resume the store at a path."""
    open_eager: Callable[[Path], Any]
    """The same, with a threshold so low that it compacts all the time."""
    import_artifact: Callable[[Path, Path], Any]
    """(artifact, destination) -> the store that was imported."""


U64_MAX = 2**64 - 1
TOKENS = [bytes(range(255, 255 - length, -1)) for length in range(11)] + [
    b"\0" * length for length in range(1, 11)
]
STRANGE_KEYS = [
    "",
    "\0",
    "\0\0",
    "\n",
    "a\nb",
    " ",
    "a",
    "a\0",
    "ab",
    "é",
    "e\u0301",
    "\x7f",
    "\x80",
    "\xff",
    "\u07ff",
    "\u0800",
    "\ud7ff",
    "\ue000",
    "\ufffd",
    "\uffff",
    "\U00010000",
    "\U0001f600",
    "\U0010ffff",
    "\U0010ffff\U0010ffff",
    "a\U0010ffff",
    "x" * 65_535,
]


def cursor(number: int) -> WatchCursor:
    return WatchCursor.from_u64(number)


def version(number: int) -> VersionToken:
    return VersionToken.from_u64(number)


def entries(store: SnapshotStore) -> dict[str, bytes]:
    return {entry.key: entry.value for entry in store.range("")}


class StoreConformance:
    """Derive from this, and give it a `kind` fixture."""

    @pytest.fixture
    def store(self, kind: Kind, path: Path) -> Iterator[SnapshotStore]:
        store = kind.open(path)
        yield store
        store.close()

    @pytest.fixture
    def reopen(
        self, kind: Kind, path: Path, store: SnapshotStore
    ) -> Iterator[Callable[[], SnapshotStore]]:
        """Closes the store, and opens it again."""
        opened = [store]

        def reopen() -> SnapshotStore:
            opened[-1].close()
            opened.append(kind.open(path))
            return opened[-1]

        yield reopen
        opened[-1].close()

    # A new store.

    def test_a_new_store_keeps_the_protocol(self, store):
        assert isinstance(store, SnapshotStore)

    def test_a_new_store_is_empty_and_has_the_none_cursor(self, store):
        assert store.cursor() == WatchCursor.none()
        assert store.cursor().is_none
        assert store.range("") == []
        assert store.get("") is None
        assert store.get("absent") is None

    def test_an_empty_store_reopens_empty_with_the_none_cursor(self, reopen):
        store = reopen()
        assert store.cursor().is_none
        assert store.range("") == []

    # Folding.

    def test_a_put_is_read_back_with_its_version(self, store):
        store.apply([Put("k", b"v", version(9))], cursor(1))
        assert store.get("k") == KvEntry("k", b"v", version(9))
        assert type(store.get("k")) is KvEntry
        assert type(store.get("k").version) is VersionToken

    def test_the_last_write_wins_within_a_batch(self, store):
        store.apply(
            [Put("k", b"1", version(1)), Put("k", b"2", version(2)), Put("k", b"3", version(3))],
            cursor(3),
        )
        assert store.get("k") == KvEntry("k", b"3", version(3))

    def test_the_last_write_wins_across_batches(self, store):
        for number in range(1, 6):
            store.apply([Put("k", b"%d" % number, version(number))], cursor(number))
        assert store.get("k") == KvEntry("k", b"5", version(5))

    def test_an_older_version_that_comes_later_wins_all_the_same(self, store):
        store.apply([Put("k", b"new", version(9))], cursor(9))
        store.apply([Put("k", b"old", version(1))], cursor(10))
        assert store.get("k") == KvEntry("k", b"old", version(1))

    @pytest.mark.parametrize("removal", [Delete, Purge])
    def test_a_removed_key_is_gone(self, store, removal):
        store.apply([Put("a", b"1"), Put("b", b"2")], cursor(1))
        store.apply([removal("a", version(2))], cursor(2))
        assert store.get("a") is None
        assert entries(store) == {"b": b"2"}

    @pytest.mark.parametrize("removal", [Delete, Purge])
    def test_removing_what_is_not_there_is_fine_and_moves_the_cursor(self, store, removal):
        store.apply([removal("never")], cursor(1))
        assert store.get("never") is None
        assert store.range("") == []
        assert store.cursor() == cursor(1)

    @pytest.mark.parametrize("removal", [Delete, Purge])
    def test_order_within_a_batch_decides_between_put_and_removal(self, store, removal):
        store.apply([Put("a", b"1"), removal("a"), removal("b"), Put("b", b"2")], cursor(1))
        assert entries(store) == {"b": b"2"}

    @pytest.mark.parametrize("removal", [Delete, Purge])
    def test_a_removed_key_stays_gone_after_reopening_and_can_come_back(
        self, store, reopen, removal
    ):
        store.apply([Put("a", b"1"), Put("b", b"2")], cursor(1))
        store.apply([removal("a")], cursor(2))
        store = reopen()
        assert entries(store) == {"b": b"2"}
        store.apply([Put("a", b"3")], cursor(3))
        assert entries(store) == {"a": b"3", "b": b"2"}
        store = reopen()
        assert entries(store) == {"a": b"3", "b": b"2"}

    def test_any_iterable_of_updates_is_taken_once(self, store):
        store.apply((Put(key, b"v") for key in "cab"), cursor(1))
        store.apply(iter([Delete("a")]), cursor(2))
        assert [entry.key for entry in store.range("")] == ["b", "c"]

    def test_sequences_grow_by_one_for_each_batch(self, store):
        numbers = [store.apply([Put("k", b"%d" % n)], cursor(n)) for n in range(1, 6)]
        assert numbers == list(range(numbers[0], numbers[0] + 5))

    def test_a_read_value_cannot_be_changed_through_what_was_given(self, store):
        updates = [Put("k", b"v")]
        store.apply(updates, cursor(1))
        updates[0] = Put("k", b"other")
        found = store.range("")
        found.clear()
        assert entries(store) == {"k": b"v"}

    # Keys and values.

    def test_an_empty_value_is_an_entry(self, store, reopen):
        store.apply([Put("k", b"")], cursor(1))
        assert store.get("k") == KvEntry("k", b"", VersionToken.unknown())
        store = reopen()
        assert store.get("k") == KvEntry("k", b"", VersionToken.unknown())
        assert store.range("k") == [KvEntry("k", b"", VersionToken.unknown())]

    def test_strange_keys_round_trip_and_range_in_code_point_order(self, store, reopen):
        shuffled = STRANGE_KEYS[:]
        random.Random(7).shuffle(shuffled)
        store.apply([Put(key, b"%d" % len(key)) for key in shuffled], cursor(1))
        for _ in range(2):
            assert [entry.key for entry in store.range("")] == sorted(STRANGE_KEYS)
            for key in STRANGE_KEYS:
                assert store.get(key) == KvEntry(key, b"%d" % len(key), VersionToken.unknown()), (
                    ascii(key[:20])
                )
                under = [entry.key for entry in store.range(key)]
                assert under == [
                    other for other in sorted(STRANGE_KEYS) if other.startswith(key)
                ], ascii(key[:20])
            store = reopen()

    @pytest.mark.parametrize(
        "edge",
        [
            "\U0010ffff",
            "\ud7ff",
            "\ue000",
            "\x7f",
            "\xff",
            "\uffff",
            "a\U0010ffff",
            "\U0010ffff\U0010ffff",
        ],
    )
    def test_a_prefix_ends_where_its_last_character_has_no_plain_successor(self, store, edge):
        inside = [edge, edge + "\0", edge + "a", edge + "\ud7ff", edge + "\U0010ffff"]
        outside = ["", "a", "\0", "b", edge[:-1] + "~", "\U0010fffe", "\ue001", "\U00010000"]
        outside = [key for key in outside if not key.startswith(edge)]
        store.apply([Put(key, b"v") for key in {*inside, *outside}], cursor(1))
        assert [entry.key for entry in store.range(edge)] == sorted(inside)

    def test_a_lone_surrogate_names_no_key(self, store):
        store.apply([Put("\ud7ff", b"1"), Put("\ue000", b"2")], cursor(1))
        assert store.get("\ud800") is None
        assert store.range("\udfff") == []

    def test_values_of_every_small_byte_and_of_a_mebibyte_round_trip(self, store, reopen):
        large = random.Random(3).randbytes(1024 * 1024)
        values = {f"k{n}": bytes([n]) for n in range(256)} | {
            "large": large,
            "zeros": bytes(1024 * 1024),
            "log": b"\x89FLG\r\n\x1a\n",
        }
        store.apply([Put(key, value) for key, value in values.items()], cursor(1))
        assert entries(store) == values
        store = reopen()
        assert entries(store) == values
        assert store.get("large").value == large

    # Tokens.

    def test_versions_of_every_length_round_trip(self, store, reopen):
        store.apply(
            [Put(f"k{n:02}", b"v", VersionToken(token)) for n, token in enumerate(TOKENS)],
            cursor(1),
        )
        for _ in range(2):
            assert [bytes(entry.version) for entry in store.range("k")] == TOKENS
            assert [bytes(store.get(f"k{n:02}").version) for n in range(len(TOKENS))] == TOKENS
            store = reopen()

    def test_a_cursor_of_any_length_resumes(self, store, reopen):
        for token in TOKENS:
            store.apply([Put("k", b"v")], WatchCursor(token))
            assert store.cursor() == WatchCursor(token)
            store = reopen()
            assert bytes(store.cursor()) == token
            assert type(store.cursor()) is WatchCursor

    def test_a_stream_revision_and_a_versionstamp_come_back_unchanged(self, store, reopen):
        for number in (0, 1, 255, 2**32, 2**63, U64_MAX):
            stamp = VersionToken(number.to_bytes(10, "big"))
            updates = [Put("u64", b"", version(number)), Put("stamp", b"", stamp)]
            store.apply(updates, cursor(number))
            store = reopen()
            assert store.cursor().as_u64() == number
            assert store.get("u64").version.as_u64() == number
            assert store.get("stamp").version == stamp
            assert store.get("stamp").version.as_u64() is None

    def test_a_cursor_may_stand_still_go_back_or_return_to_none(self, store, reopen):
        for number in (5, 5, 3):
            store.apply([Put("k", b"%d" % number)], cursor(number))
            assert store.cursor() == cursor(number)
        store.apply([Put("k", b"none")], WatchCursor.none())
        assert store.cursor().is_none
        store = reopen()
        assert store.cursor().is_none
        assert store.get("k").value == b"none"

    # The cursor and the data move as one.

    def test_a_batch_without_updates_moves_the_cursor_durably(self, store, reopen):
        store.apply([Put("k", b"v")], cursor(1))
        store.apply([], cursor(2))
        assert store.cursor() == cursor(2)
        assert entries(store) == {"k": b"v"}
        store = reopen()
        assert store.cursor() == cursor(2)
        assert entries(store) == {"k": b"v"}

    def test_a_cursor_alone_makes_a_store(self, store, reopen):
        store.apply([], cursor(7))
        store = reopen()
        assert store.cursor() == cursor(7)
        assert store.range("") == []

    @pytest.mark.parametrize(
        ("bad", "error"),
        [
            (Put("k", "text"), TypeError),
            (Put("k", bytearray(b"v")), TypeError),
            (Put(b"k", b"v"), TypeError),
            (Put("\ud800", b"v"), ValueError),
            (Put("k", b"v", b"raw"), TypeError),
            (Put("x" * 65_536, b"v"), ValueError),
            (Delete(7), TypeError),
            (Purge("\udfff"), ValueError),
            (("k", b"v"), TypeError),
            (None, TypeError),
        ],
    )
    def test_a_bad_update_amid_a_batch_leaves_nothing_of_the_batch(self, store, reopen, bad, error):
        store.apply([Put("a", b"1")], cursor(1))
        with pytest.raises(error):
            store.apply([Put("a", b"2"), Put("b", b"2"), bad, Put("c", b"2")], cursor(2))
        assert entries(store) == {"a": b"1"}
        assert store.cursor() == cursor(1)
        store.apply([Put("c", b"3")], cursor(3))
        store = reopen()
        assert entries(store) == {"a": b"1", "c": b"3"}
        assert store.cursor() == cursor(3)

    @pytest.mark.parametrize(
        "bad", [None, b"\0\0\0\0\0\0\0\1", True, 1.0, "1", VersionToken.from_u64(1)]
    )
    def test_what_is_no_cursor_is_refused(self, store, bad):
        with pytest.raises(TypeError):
            store.apply([Put("k", b"v")], bad)
        assert store.get("k") is None
        assert store.cursor().is_none

    def test_an_iterable_that_fails_half_way_leaves_nothing(self, store):
        def updates() -> Iterator[Put]:
            yield Put("a", b"1")
            raise LookupError("the source broke off")

        with pytest.raises(LookupError, match="broke off"):
            store.apply(updates(), cursor(1))
        assert store.range("") == []
        assert store.cursor().is_none

    # Ranges.

    def test_a_range_takes_exactly_the_keys_under_its_prefix(self, store):
        keys = ["", "a", "a/", "a/1", "a/10", "a/2", "a0", "b/1", "á/1", "A/1"]
        store.apply([Put(key, key.encode()) for key in reversed(keys)], cursor(1))
        assert [entry.key for entry in store.range("a/")] == ["a/", "a/1", "a/10", "a/2"]
        assert [entry.key for entry in store.range("a/1")] == ["a/1", "a/10"]
        assert [entry.key for entry in store.range("")] == sorted(keys)
        assert store.range("a/3") == []
        assert store.range("zz") == []
        assert all(
            type(entry) is KvEntry and entry.value == entry.key.encode()
            for entry in store.range("")
        )

    def test_streaming_gives_what_a_range_gives(self, store):
        store.apply([Put(f"k{n:04}", b"%d" % n) for n in range(1500)], cursor(1))
        seen: list[KvEntry] = []
        assert store.for_each_in_range("k1", seen.append) is None
        assert seen == store.range("k1")
        assert len(seen) == 500

    def test_an_error_of_the_callback_stops_the_scan_and_propagates(self, store, reopen):
        store.apply([Put(f"k{n:04}", b"v") for n in range(1500)], cursor(1))
        for _ in range(2):
            seen: list[str] = []

            def stop_at_the_fourth(entry: KvEntry, seen: list[str] = seen) -> None:
                seen.append(entry.key)
                if len(seen) == 4:
                    raise LookupError("enough")

            with pytest.raises(LookupError, match="enough"):
                store.for_each_in_range("k0", stop_at_the_fourth)
            assert seen == ["k0000", "k0001", "k0002", "k0003"]
            assert len(store.range("")) == 1500
            store = reopen()

    def test_a_scan_sees_one_state_though_its_callback_writes(self, store):
        store.apply([Put(f"k{n:03}", b"old") for n in range(600)], cursor(1))
        seen: list[KvEntry] = []

        def write(entry: KvEntry) -> None:
            if not seen:
                store.apply([Put("k500", b"new"), Delete("k501"), Put("k500a", b"new")], cursor(2))
            seen.append(entry)

        store.for_each_in_range("k", write)
        assert [entry.key for entry in seen] == [f"k{n:03}" for n in range(600)]
        assert {entry.value for entry in seen} == {b"old"}
        assert store.get("k500").value == b"new"
        assert store.get("k501") is None

    @pytest.mark.parametrize("bad", [None, 7, b"k", ["k"]])
    def test_a_key_or_prefix_of_another_type_is_a_type_error(self, store, bad):
        store.apply([Put("k", b"v")], cursor(1))
        with pytest.raises(TypeError):
            store.get(bad)
        with pytest.raises(TypeError):
            store.range(bad)
        with pytest.raises(TypeError):
            store.for_each_in_range(bad, print)

    # Much at once, and for long.

    def test_a_batch_of_9_000_updates_is_folded_as_one(self, store, reopen):
        store.apply([Put(f"k{n:05}", b"%d" % n, version(n)) for n in range(9_000)], cursor(1))
        mixed = [
            Delete(f"k{n:05}") if n % 3 else Put(f"k{n:05}", b"again") for n in range(0, 9_000, 2)
        ]
        store.apply(mixed * 2, cursor(2))
        expected = {f"k{n:05}": b"%d" % n for n in range(9_000)}
        for update in mixed:
            if isinstance(update, Delete):
                del expected[update.key]
            else:
                expected[update.key] = update.value
        for _ in range(2):
            assert entries(store) == expected
            assert store.get("k08999") == KvEntry("k08999", b"8999", version(8_999))
            assert store.get("k00002") is None
            assert store.cursor() == cursor(2)
            store = reopen()

    @pytest.mark.parametrize("eager", [False, True], ids=["default threshold", "always compacting"])
    def test_a_random_history_folds_as_a_dict_does(self, kind, path, eager):
        rng = random.Random(20_26)
        open_store = kind.open_eager if eager else kind.open
        expected: dict[str, tuple[bytes, bytes]] = {}
        store = open_store(path)
        for number in range(1, 121):
            batch: list[Any] = []
            for _ in range(rng.choice([0, 1, 1, 2, 10, 60])):
                key = f"{rng.choice('ab')}/{rng.randrange(150)}"
                if rng.random() < 0.6:
                    token = rng.randbytes(rng.randrange(11))
                    batch.append(Put(key, rng.randbytes(rng.randrange(40)), VersionToken(token)))
                    expected[key] = batch[-1].value, token
                else:
                    batch.append(rng.choice([Delete, Purge])(key))
                    expected.pop(key, None)
            store.apply(batch, cursor(number))
            if number % 30 == 0:
                store.close()
                store = open_store(path)
            probe = f"a/{rng.randrange(150)}"
            found = store.get(probe)
            assert (found and (found.value, bytes(found.version))) == expected.get(probe)
            assert store.cursor() == cursor(number)
        for prefix in ("", "a/", "b/1", "c"):
            found = {
                entry.key: (entry.value, bytes(entry.version)) for entry in store.range(prefix)
            }
            assert found == {
                key: value for key, value in expected.items() if key.startswith(prefix)
            }
            assert list(found) == sorted(found)
        store.close()

    def test_compaction_changes_nothing_that_a_reader_can_see(self, store, reopen):
        if not hasattr(store, "compact"):
            pytest.skip("this kind does not compact on demand")
        store.apply([Put(f"k{n:04}", b"%d" % n, version(n)) for n in range(2000)], cursor(1))
        store.apply([Delete(f"k{n:04}") for n in range(0, 2000, 3)], cursor(2))
        before = store.range("")
        store.compact()
        assert store.range("") == before
        assert store.cursor() == cursor(2)
        assert store.get("k0000") is None
        assert store.get("k0001") == KvEntry("k0001", b"1", version(1))
        store.compact()
        store.apply([Put("k0000", b"back")], cursor(3))
        store = reopen()
        assert store.range("") == [KvEntry("k0000", b"back", VersionToken.unknown()), *before]
        assert store.cursor() == cursor(3)

    # Artifacts.

    def test_an_artifact_carries_state_versions_and_cursor_to_another_store(
        self, kind, store, tmp_path
    ):
        store.apply(
            [
                Put(key, b"v", VersionToken(TOKENS[n % len(TOKENS)]))
                for n, key in enumerate(STRANGE_KEYS)
            ],
            cursor(4),
        )
        store.apply([Delete("a")], cursor(5))
        store.export_to(tmp_path / "artifact")
        imported = kind.import_artifact(tmp_path / "artifact", tmp_path / "other.log")
        assert imported.range("") == store.range("")
        assert imported.cursor() == cursor(5)
        imported.apply([Put("only", b"there")], cursor(6))
        assert store.get("only") is None
        imported.close()
        again = kind.open(tmp_path / "other.log")
        assert again.get("only").value == b"there"
        assert again.cursor() == cursor(6)
        again.close()

    def test_an_empty_store_exports_and_imports(self, kind, store, tmp_path):
        store.export_to(tmp_path / "artifact")
        imported = kind.import_artifact(tmp_path / "artifact", tmp_path / "other.log")
        assert imported.range("") == []
        assert imported.cursor().is_none
        imported.close()

    def test_an_export_is_the_state_of_its_moment(self, kind, store, tmp_path):
        store.apply([Put("k", b"then")], cursor(1))
        store.export_to(tmp_path / "artifact")
        store.apply([Put("k", b"now")], cursor(2))
        imported = kind.import_artifact(tmp_path / "artifact", tmp_path / "other.log")
        assert entries(imported) == {"k": b"then"}
        assert imported.cursor() == cursor(1)
        imported.close()

    def test_one_artifact_imports_many_times(self, kind, store, tmp_path):
        store.apply([Put("k", b"v")], cursor(1))
        store.export_to(tmp_path / "artifact")
        for name in ("one.log", "two.log"):
            imported = kind.import_artifact(tmp_path / "artifact", tmp_path / name)
            assert entries(imported) == {"k": b"v"}
            imported.close()

    @pytest.mark.parametrize("taken_by", ["folder", "file", "full folder", "dangling link"])
    def test_an_export_never_overwrites(self, store, tmp_path, taken_by):
        dest = tmp_path / "artifact"
        if taken_by == "file":
            dest.write_bytes(b"mine")
        elif taken_by == "dangling link":
            dest.symlink_to(tmp_path / "nowhere")
        else:
            dest.mkdir()
            if taken_by == "full folder":
                (dest / "mine").write_bytes(b"mine")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(FileExistsError):
            store.export_to(dest)
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("taken_by", ["store", "folder", "empty file", "dangling link"])
    def test_an_import_never_overwrites(self, kind, store, path, tmp_path, taken_by):
        store.apply([Put("k", b"v")], cursor(1))
        store.export_to(tmp_path / "artifact")
        dest = tmp_path / "dest.log"
        if taken_by == "store":
            dest = path
        elif taken_by == "folder":
            dest.mkdir()
        elif taken_by == "empty file":
            dest.write_bytes(b"")
        else:
            dest.symlink_to(tmp_path / "nowhere")
        with pytest.raises(FileExistsError):
            kind.import_artifact(tmp_path / "artifact", dest)
        assert entries(store) == {"k": b"v"}
        assert not (tmp_path / "nowhere").exists()
        assert dest.is_symlink() == (taken_by == "dangling link")

    # The end.

    def test_closing_twice_is_fine(self, store):
        store.close()
        store.close()

    @pytest.mark.parametrize("seen", [False, True], ids=["empty", "with entries"])
    def test_everything_after_close_raises_store_closed(self, store, tmp_path, seen):
        if seen:
            store.apply([Put("k", b"v")], cursor(1))
            store.get("k")
        store.close()
        for use in (
            lambda: store.apply([Put("k", b"v")], cursor(1)),
            lambda: store.apply(None, None),
            lambda: store.get("k"),
            lambda: store.range(""),
            lambda: store.for_each_in_range("", print),
            lambda: store.cursor(),
            lambda: store.export_to(tmp_path / "artifact"),
        ):
            with pytest.raises(StoreClosed):
                use()
        assert not (tmp_path / "artifact").exists()

    def test_a_store_closes_with_its_block(self, kind, path):
        with kind.open(path) as store:
            store.apply([Put("k", b"v")], cursor(1))
        with pytest.raises(StoreClosed):
            store.get("k")
        with kind.open(path) as store:
            assert entries(store) == {"k": b"v"}

    def test_many_openings_in_a_row_give_the_same(self, reopen):
        for number in range(1, 8):
            store = reopen()
            assert entries(store) == {f"k{n}": b"v" for n in range(1, number)}
            assert store.cursor() == (cursor(number - 1) if number > 1 else WatchCursor.none())
            store.apply([Put(f"k{number}", b"v")], cursor(number))
