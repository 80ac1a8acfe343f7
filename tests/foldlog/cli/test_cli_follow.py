"""`foldlog tail` and `foldlog get --follow`: what they print, when, and how they end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cli_kit
import pytest
from actor_kit import DEADLINE_S, cursor
from cli_kit import run, told_by_line

from foldlog import AppendLogSnapshot, Delete, Purge, Put, VersionToken, WatchCursor

COMMAND = (cli_kit.COMMAND[0], "-W", "error", *cli_kit.COMMAND[1:])


class Running:
    """The command in a process of its own, read line by line."""

    def __init__(self, *args: object) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self.out: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.err: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.out), (self.process.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(source: Any, lines: queue.SimpleQueue[str]) -> None:
        for line in source:
            lines.put(line)

    def line(self) -> str:
        return self.out.get(timeout=DEADLINE_S)

    def error(self) -> str:
        return self.err.get(timeout=DEADLINE_S)

    def interrupt(self) -> tuple[int, str]:
        """Ctrl-C. Returns the exit code, and all that was still printed, on either stream."""
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(DEADLINE_S)
        for reader in self._readers:
            reader.join(DEADLINE_S)
        rest = [lines.get() for lines in (self.out, self.err) for _ in range(lines.qsize())]
        return code, "".join(rest)


@pytest.fixture
def start() -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def start(*args: object) -> Running:
        running.append(Running(*args))
        return running[-1]

    yield start
    for one in running:
        one.process.kill()
        one.process.wait(DEADLINE_S)
        for stream in (one.process.stdout, one.process.stderr):
            assert stream is not None
            stream.close()


@pytest.fixture
def log(path: Path) -> Path:
    """A log with a base at cursor 1, and two batches behind it."""
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a/1", b"one", VersionToken.from_u64(1)), Put("b", b"x\ty\n")], cursor(1))
        snap.compact()
        snap.apply([Put("a/1", b"two"), Put("a/2", b"\xff", VersionToken(b"\xab"))], cursor(2))
        snap.apply([Delete("b"), Purge("gone", VersionToken.from_u64(3))], cursor(3))
    return path


def test_tail_prints_the_state_and_a_mark(log: Path):
    result = run("tail", log, "--no-follow")
    assert result.exit_code == 0
    assert result.stdout == "put\ta/1\ttwo\nput\ta/2\t\\xff\n# synced at cursor 3, batch 3\n"
    for prefix, put in (("a/2", "put\ta/2\t\\xff\n"), ("nothing", "")):
        result = run("tail", log, "--no-follow", "--prefix", prefix)
        assert result.stdout == put + "# synced at cursor 3, batch 3\n"


def test_tail_since_a_cursor_prints_the_changes_behind_it(log: Path):
    assert run("tail", log, "--no-follow", "--since", "2").stdout == (
        "delete\tb\npurge\tgone\n# synced at cursor 3, batch 3\n"
    )
    assert run("tail", log, "--no-follow", "--since", "0x0000000000000002").stdout.startswith(
        "delete\tb\n"
    )
    assert run("tail", log, "--no-follow", "--since", "1").stdout.startswith("put\ta/1\ttwo\n")


def test_tail_since_a_cursor_that_is_gone_ends_with_1_and_one_that_is_none_with_2(log: Path):
    with AppendLogSnapshot.open(log)[1] as snap:
        snap.compact()
    expired = run("tail", log, "--no-follow", "--since", "2")
    assert (expired.exit_code, expired.stdout) == (1, "")
    assert "not in the log any more" in expired.stderr
    for wrong in ("x", "-1", "0x", "123456789012345678901234567890", "abc"):
        assert run("tail", log, "--no-follow", "--since", wrong).exit_code == 2


def test_tail_as_json_prints_what_apply_reads_and_marks(log: Path, tmp_path: Path):
    lines = told_by_line("tail", log, "--no-follow", "--since", "1")
    assert lines == [
        {"op": "put", "key": "a/1", "value": "two", "version": None, "cursor": 2},
        {"op": "put", "key": "a/2", "value_base64": "/w==", "version": "ab", "cursor": 2},
        {"op": "delete", "key": "b", "version": None, "cursor": 3},
        {"op": "purge", "key": "gone", "version": 3, "cursor": 3},
        {"mark": "synced", "cursor": 3, "sequence": 3},
    ]
    changes = tmp_path / "changes.jsonl"
    state = run("tail", log, "--no-follow", "--json").stdout
    changes.write_text(
        "".join(line + "\n" for line in state.splitlines() if '"op"' in line), encoding="utf-8"
    )
    assert run("apply", tmp_path / "copy.log", changes).exit_code == 0
    with (
        AppendLogSnapshot.open(log)[1] as one,
        AppendLogSnapshot.open(tmp_path / "copy.log")[1] as other,
    ):
        assert (one.range(""), one.cursor()) == (other.range(""), other.cursor())


def test_a_log_that_is_missing_ends_with_2_unless_it_is_waited_for(path: Path):
    assert run("tail", path, "--no-follow").exit_code == 2
    assert list(path.parent.iterdir()) == []


def test_a_file_that_is_no_log_is_refused(path: Path):
    path.write_bytes(b"no log, whatever it is that stands here, and of some length, too")
    for command in (("tail", path), ("get", "--follow", path, "k")):
        result = run(*command)
        assert result.exit_code == 1
        assert "not a foldlog log" in result.stderr


def test_tail_prints_changes_as_they_come_through_compactions_and_ends_quietly_with_ctrl_c(
    path: Path, start
):
    running = start("tail", path, "--prefix", "k")
    assert running.line() == "# synced at cursor none, batch 0\n"
    assert "waiting" in running.error()
    for number in range(1, 4):
        with AppendLogSnapshot.open(path)[1] as snap:
            snap.apply([Put("k", b"%d" % number), Put("other", b"")], cursor(number))
            assert running.line() == f"put\tk\t{number}\n"
            snap.compact()
    assert running.interrupt()[0] == 130


def test_tail_ends_quietly_when_its_reader_leaves(log: Path):
    writer = subprocess.Popen(
        [*COMMAND, "tail", str(log)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None
        assert writer.stderr is not None
        assert writer.stdout.readline() == b"put\ta/1\ttwo\n"
        writer.stdout.close()
        for number in range(4, 40):
            with AppendLogSnapshot.open(log)[1] as snap:
                snap.apply([Put("k", b"x" * 100)], WatchCursor.from_u64(number))
            if writer.poll() is not None:
                break
        assert writer.wait(DEADLINE_S) == 0
        assert writer.stderr.read() == b""
    finally:
        writer.kill()
        writer.wait(DEADLINE_S)
        assert writer.stderr is not None
        writer.stderr.close()


def test_tail_tells_of_another_log_under_the_name(path: Path, start):
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a", b"1")], cursor(7))
    running = start("tail", path, "--json")
    assert json.loads(running.line())["key"] == "a"
    assert json.loads(running.line()) == {"mark": "synced", "cursor": 7, "sequence": 1}
    with AppendLogSnapshot.open(path.parent / "other.log")[1] as snap:
        snap.apply([Put("b", b"1")], cursor(1))
    os.replace(path.parent / "other.log", path)
    assert json.loads(running.line()) == {
        "mark": "rewound",
        "reason": "the log was replaced by another",
    }
    assert [json.loads(running.line()).get("op") for _ in range(3)] == ["delete", "put", None]
    path.unlink()
    assert "missing" in running.error()


def test_get_follow_prints_the_value_whenever_it_changes(log: Path, start):
    running = start("get", "--follow", log, "a/1")
    assert running.line() == "two\n"
    with AppendLogSnapshot.open(log)[1] as snap:
        snap.apply([Put("a/1", b"two")], cursor(4))
        snap.apply([Put("a/11", b"another key")], cursor(5))
        snap.apply([Put("a/1", b"three")], cursor(6))
        assert running.line() == "three\n"
        snap.compact()
        snap.apply([Delete("a/1")], cursor(7))
        assert "a/1 was deleted" in running.error()
        snap.apply([Put("a/1", b"four")], cursor(8))
        assert running.line() == "four\n"
    assert running.interrupt() == (130, "")


def test_get_follow_as_json_tells_versions_and_deletes(path: Path, start):
    running = start("get", "--follow", "--json", path, "k")
    assert "waiting" in running.error()
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("k", b"\xff", VersionToken.from_u64(5))], cursor(1))
        assert json.loads(running.line()) == {"key": "k", "value_base64": "/w==", "version": 5}
        snap.apply([Put("k", b"\xff", VersionToken.from_u64(6))], cursor(2))
        assert json.loads(running.line())["version"] == 6
        snap.apply([Purge("k")], cursor(3))
        assert json.loads(running.line()) == {"key": "k", "deleted": True}
    assert running.interrupt()[0] == 130


def test_help_shows_examples():
    assert "foldlog tail routes.log --since 4711 --no-follow --json" in run("tail", "--help").stdout
    assert "foldlog get --follow routes.log tenants/a" in run("get", "--help").stdout
