"""`foldlog top`, and what the other commands print for programs and on terminals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_kit import COMMAND, run, told

import foldlog
from foldlog import AppendLogSnapshot, Delete, Put, WatchCursor
from foldlog.cli import main
from foldlog.cli.show import rate_text
from foldlog.cli.top import Picture, Watcher, base_end, rows_of
from foldlog.storage.log.files import OS_FILES, ReadHandle


@pytest.fixture
def log(path: Path) -> Path:
    """A log at cursor 3, with a base of two entries and one batch behind it."""
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1"), Put("b", b"2")], WatchCursor.from_u64(2))
        snap.compact()
        snap.apply([Put("c", b"3")], WatchCursor.from_u64(3))
    return path


def wait_for(follower: foldlog.Follower, cursor: int) -> None:
    follower.wait_for(WatchCursor.from_u64(cursor), timeout_s=60)


def test_a_picture_tells_state_sizes_and_who_writes(log: Path) -> None:
    with foldlog.follow(log) as follower:
        picture = Watcher(follower).look(0.0)
    assert (picture.state, picture.reason) == ("following", "")
    assert (picture.sequence, picture.cursor, picture.entries) == (2, 3, 3)
    assert picture.size_bytes == log.stat().st_size
    assert picture.base_bytes == told("info", log)["base_bytes"]
    assert picture.appended_bytes == picture.size_bytes - picture.base_bytes
    assert (picture.locked, picture.writer_pid) == (False, None)
    assert (picture.batches_per_s, picture.last_change) == (None, None)
    assert picture.written_unix_s == log.stat().st_mtime


def test_pictures_tell_the_rate_the_last_change_and_the_writer(log: Path) -> None:
    with foldlog.follow(log) as follower, foldlog.open(log) as store:
        watcher = Watcher(follower)
        watcher.look(100.0)
        for n in range(4, 14):
            store.apply([Put("d", b"%d" % n)], WatchCursor.from_u64(n))
        wait_for(follower, 13)
        picture = watcher.look(102.0)
        assert (picture.batches_per_s, picture.last_change) == (5.0, "put d")
        assert (picture.locked, picture.writer_pid) == (True, os.getpid())
        store.apply([Delete("d")], WatchCursor.from_u64(14))
        wait_for(follower, 14)
        assert watcher.look(103.0).last_change == "delete d"
        assert watcher.look(200.0).batches_per_s == 0.0  # what was long ago counts no more


def test_a_picture_after_a_compaction_tells_the_new_base(log: Path) -> None:
    with foldlog.follow(log) as follower, AppendLogSnapshot.open(log)[1] as snap:
        watcher = Watcher(follower)
        first = watcher.look(1.0)
        snap.apply([Put("x" * 100, b"v" * 1000)], WatchCursor.from_u64(4))
        wait_for(follower, 4)
        snap.compact()
        second = watcher.look(2.0)
    assert first.base_bytes is not None
    assert second.base_bytes is not None
    assert second.base_bytes > first.base_bytes + 1000
    assert second.appended_bytes == 0


def test_a_log_that_is_missing_or_gone_makes_a_picture(path: Path) -> None:
    with foldlog.follow(path) as follower:
        picture = Watcher(follower).look(0.0)
    assert picture.state == "waiting"
    assert (picture.size_bytes, picture.base_bytes, picture.written_unix_s) == (None, None, None)
    assert dict(rows_of(picture, 0.0))["size"] == "-"


def test_the_base_of_a_file_whose_frames_do_not_lead_to_its_end_is_unknown(log: Path) -> None:
    raw = bytearray(log.read_bytes())
    raw[60] ^= 1
    log.write_bytes(raw)
    assert base_end(ReadHandle(OS_FILES, log)) is None


def test_top_once_prints_one_picture_and_changes_nothing(log: Path) -> None:
    before = {file: file.read_bytes() for file in log.parent.iterdir()}
    lines = dict(
        line.split(maxsplit=1)
        for line in run("top", log, "--once").stdout.splitlines()
        if "last" not in line
    )
    shown = [lines[name] for name in ("state", "entries", "cursor", "writer")]
    assert shown == ["following", "3", "3", "none"]
    facts = told("top", log, "--once")
    assert tuple(facts) == Picture._fields
    assert facts["sequence"] == 2
    assert {file: file.read_bytes() for file in log.parent.iterdir()} == before


def test_top_once_of_a_log_that_is_missing_is_misuse(path: Path) -> None:
    result = run("top", path, "--once")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"foldlog: {path}: No such file or directory\n"
    assert list(path.parent.iterdir()) == []


def test_top_into_a_pipe_prints_picture_after_picture_until_the_reader_leaves(log: Path) -> None:
    command = (*COMMAND, "top", str(log), "--json", "--interval", "0.05")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        pictures = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
    assert [picture["batches_per_s"] for picture in pictures] == [None, 0.0, 0.0]


def test_top_on_a_terminal_is_live_and_ctrl_c_ends_it_quietly(log: Path) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    env.pop("NO_COLOR", None)
    command = (*COMMAND, "top", str(log), "--interval", "0.05")
    try:
        with subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=env
        ) as process:
            os.close(theirs)
            try:
                shown = b""
                while shown.count(b"snapshot") < 3:
                    shown += os.read(ours, 65_536)
                process.send_signal(signal.SIGINT)
                with contextlib.suppress(OSError):
                    while piece := os.read(ours, 65_536):
                        shown += piece
                assert process.stderr is not None
                assert process.stderr.read() == b""
            except BaseException:
                process.kill()  # or leaving the block would wait for it
                raise
    finally:
        os.close(ours)
    assert process.returncode == 130
    assert b"\x1b[32mfollowing" in shown  # green
    assert shown.rstrip().endswith(b"\x1b[?25h")  # the cursor is visible again


def test_the_writing_commands_tell_programs_what_they_did_as_json(
    log: Path, tmp_path: Path
) -> None:
    changes = tmp_path / "changes"
    changes.write_text(
        '{"op": "put", "key": "d", "value": "4", "cursor": 4}\n'
        '{"op": "delete", "key": "a", "cursor": 5}\n'
    )
    applied = told("apply", log, changes)
    expected = {"applied": 2, "batches": 1, "skipped": 0, "cursor": 5, "interrupted": False}
    assert applied | expected == applied
    before = log.stat().st_size
    compacted = told("compact", log)
    after = log.stat().st_size
    # `apply` compacted what it found when it opened the log, and appended behind that.
    assert compacted == {
        "path": str(log),
        "compacted": True,
        "size_before_bytes": before,
        "size_bytes": after,
        "entries": 3,
    }
    exported = told("export", log, tmp_path / "artifact")
    imported = told("import", tmp_path / "artifact", tmp_path / "copy.log")
    assert (exported.pop("dest_dir"), exported.pop("entries")) == (str(tmp_path / "artifact"), 3)
    assert imported.pop("dest") == str(tmp_path / "copy.log")
    assert imported == exported
    assert exported["cursor"] == 5
    assert exported["size_bytes"] == sum(file["size"] for file in exported["files"])
    assert re.fullmatch("[0-9a-f]{64}", exported["files"][0]["blake3"])
    theirs = tmp_path / "theirs.snap"
    converted = told("convert", log, theirs, "--to", "slipstream-v2")
    expected = {"from": "foldlog", "to": "slipstream-v2", "entries": 3, "cursor": 5}
    assert converted | expected == converted
    assert converted["size_bytes"] == theirs.stat().st_size


@pytest.mark.parametrize("name", sorted(set(main.commands) - {"demo"}))
def test_every_command_but_the_demo_speaks_json(name: str) -> None:
    assert "--json" in run(name, "--help").stdout


def test_the_page_of_the_command_line_names_every_command() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "reference" / "cli.md").read_text(
        encoding="utf-8"
    )
    assert [name for name in main.commands if f"`foldlog {name}" not in page] == []
    assert "..." not in run("--help").stdout.partition("Commands:")[2]  # sentences are whole


def test_rates_are_told_in_the_unit_of_what_is_counted() -> None:
    assert rate_text(3_456_000, "bytes") == "3.5 MB/s"
    assert rate_text(12_000.4, "entries") == "12,000 entries/s"
    assert (rate_text(5, ""), rate_text(None, "bytes")) == ("5/s", "")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_come_for_the_three_shells(shell: str) -> None:
    env = {**os.environ, "_FOLDLOG_COMPLETE": f"{shell}_source"}
    code = "import sys; sys.argv[0] = 'foldlog'; from foldlog.cli import main; main()"
    done = subprocess.run(
        (sys.executable, "-c", code),
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    # click asks bash for its version, and says so on stderr where there is none
    assert done.returncode == 0, done.stderr
    assert "_FOLDLOG_COMPLETE" in done.stdout
