"""The command `foldlog demo`: reads that go on, through crashes, a compaction and an export."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from foldlog import AppendLogSnapshot, KvEntry, Put, Store, VersionToken, WatchCursor
from foldlog.cli import demo, main, read
from foldlog.cli.unicode import NEW, OLD, History, differences

SOME = range(0xF800, 0xFC00)
"""Holds ideographs that return and presentation forms that do not."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo, on a few code points only."""
    whole = demo.run
    monkeypatch.setattr(demo, "run", lambda folder: whole(folder, SOME))


VERDICT = re.compile(
    r"^([\d,]+) reads, 0 stopped, 0 wrong; longest pause [\d,.]+ ms; 3 crashes healed$",
    re.MULTILINE,
)


def test_the_demo_ends_in_a_verdict_and_leaves_its_files(small: None, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--dir", str(tmp_path / "work")])
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.count("verified against a dict: ") == 2
    assert result.stdout.count("the writer crashes (") == 3
    assert "compacted meanwhile" in result.stdout
    assert "exported meanwhile" in result.stdout
    assert "the follower has batch " in result.stdout
    verdict = VERDICT.search(result.stdout)
    assert verdict
    assert int(verdict[1].replace(",", "")) > 0
    assert result.stdout.splitlines()[-1].startswith("Try next: ")
    assert max(map(len, result.stdout.splitlines())) < 80
    assert "\r" not in result.stdout
    assert {"unicode.log", "copy.log", "artifact"} <= {
        path.name for path in (tmp_path / "work").iterdir()
    }


def test_the_demo_tells_of_a_reader_that_got_a_wrong_answer(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "get", lambda store, key: KvEntry(key, b"wrong"))
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 1
    assert " 0 stopped, 0 wrong" not in result.stdout
    assert " 0 stopped, " in result.stdout


def test_the_demo_tells_of_a_reader_that_stopped(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: demo.ReaderThread) -> None:
        raise LookupError("stopped")

    monkeypatch.setattr(demo.ReaderThread, "_read", fail)
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == 1
    assert "0 reads, 3 stopped, 0 wrong" in result.stdout
    assert "LookupError('stopped')" in result.stderr


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
    assert "the store and the dict differ in 1 key: U+F" in result.stderr
    assert "the copy and the dict differ in 1 key: U+F" in result.stderr


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
