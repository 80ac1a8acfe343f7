"""The command `foldlog demo`: the whole life of a log on the Unicode character database."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from foldlog import AppendLogSnapshot, Put, VersionToken, WatchCursor
from foldlog.cli import demo, main, read
from foldlog.cli.demo import NEW, OLD, History, differences

SOME = range(0xF800, 0xFC00)
"""Holds ideographs that return and presentation forms that do not."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo, on a few code points only."""
    whole = demo.run
    monkeypatch.setattr(demo, "run", lambda folder: whole(folder, SOME))


def test_the_demo_folds_the_whole_database_and_leaves_its_files(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--dir", str(tmp_path / "work")])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("verified against a dict: ") == 2
    assert "get U+0041    LATIN CAPITAL LETTER A;" in result.stdout
    assert "get U+FB50    no entry" in result.stdout
    assert "range U+1F60: " in result.stdout
    assert "GREEK SMALL LETTER OMEGA WITH PSILI" in result.stdout
    assert {path.name for path in (tmp_path / "work").iterdir() if path.suffix != ".lock"} == {
        "unicode.log",
        "copy.log",
        "artifact",
    }


def test_the_demo_tells_what_was_skipped_after_the_restart(small: None) -> None:
    history = History(SOME)
    half = len(history.lines) // 2
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 0
    assert f"{half:,} changes in " in result.stdout
    assert f"{half:,} skipped; " in result.stdout
    assert (
        result.stdout.count(f"verified against a dict: {len(history.model):,} entries equal\n") == 2
    )


def test_the_demo_never_overwrites(small: None, tmp_path: Path) -> None:
    (tmp_path / "copy.log").write_bytes(b"precious")
    result = CliRunner().invoke(main, ["demo", "--dir", str(tmp_path)])
    assert (result.exit_code, result.stderr) == (
        2,
        f"foldlog: {tmp_path / 'copy.log'}: the demo never overwrites\n",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["copy.log"]


def test_the_demo_ends_with_1_when_the_log_and_the_dict_differ(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Wrong(History):
        def __init__(self, *args: object) -> None:
            super().__init__(SOME)
            self.model.popitem()

    monkeypatch.setattr(demo, "History", Wrong)
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 1
    assert "the log and the dict differ in 1 key: U+F" in result.stderr


def test_the_history_has_every_kind_of_change_and_two_lines_at_one_cursor() -> None:
    history = History(SOME)
    text = b"\n".join(history.lines)
    assert all(f'"op": "{op}"'.encode() in text for op in ("put", "delete", "purge"))
    assert all(count > 0 for _, count in history.steps)
    assert history.lines[-1].count(b'"cursor"') == 1
    cursors = [line.rsplit(b" ", 1)[1] for line in history.lines]
    assert len(set(cursors)) < len(cursors)
    assert OLD.version == 30200 < NEW.version
    assert "U+F900" in history.model
    assert "U+FB50" not in history.model


def test_a_difference_is_found_in_a_value_a_version_a_missing_and_an_extra_key(
    tmp_path: Path,
) -> None:
    model = {"a": ("1", 1), "b": ("1", 1), "c": ("1", 1), "d": ("1", 1)}
    one = VersionToken.from_u64(1)
    with AppendLogSnapshot.open(tmp_path / "x.log")[1] as snap:
        updates = [Put("a", b"1", one), Put("b", b"2", one), Put("c", b"1"), Put("e", b"1", one)]
        snap.apply(updates, WatchCursor.from_u64(1))
        assert list(differences(snap.snapshot(), model)) == ["b", "c", "e", "d"]
    assert list(differences(read.read_log(tmp_path / "x.log").loaded.fold, {"a": ("1", 1)})) == [
        "b",
        "c",
        "e",
    ]
