"""`put` and `delete`, `--on-damage`, pauses of `apply`, and output to a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import time
from pathlib import Path

import pytest
import slipref
from cli_kit import COMMAND, files_in, run, told

import foldlog
from foldlog import AppendLogSnapshot, Put, WatchCursor

DEADLINE_S = 60.0


def test_put_and_delete_write_one_key_and_print_its_version(path: Path) -> None:
    result = run("put", path, "a", "1")
    assert (result.exit_code, result.stdout) == (0, "put a at version 1\n")
    assert run("put", path, "b", stdin=b"\xff\n").exit_code == 0
    assert run("get", path, "b").stdout_bytes == b"\xff\n"
    assert told("put", path, "a", "2", "--expected", "1") == {"key": "a", "version": 3}
    assert run("delete", path, "a", "--expected", "3").stdout == "deleted a at version 4\n"
    assert run("get", path, "a").exit_code == 1


def test_a_write_that_is_refused_writes_nothing_and_says_why_without_internal_names(
    path: Path,
) -> None:
    run("put", path, "a", "1")
    before = run("dump", path, "--bodies").stdout.count("batch ")
    for arguments, why in (
        (("put", path, "a", "x", "--create"), "exists, at version 1"),
        (("put", path, "a", "x", "--expected", "9"), "expected version 9, found version 1"),
        (("put", path, "new", "x", "--expected", "0x00ff"), "version 00ff, found no entry"),
        (("delete", path, "a", "--expected", "2"), "expected version 2, found version 1"),
        (("delete", path, "b"), "no entry with key b"),
    ):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert why in result.stderr
        assert "Token" not in result.stderr
    assert run("dump", path, "--bodies").stdout.count("batch ") == before
    assert run("put", path, "a", "x", "--expected", "zz").exit_code == 2
    assert run("put", path, "a", "x", "--create", "--expected", "1").exit_code == 2


def test_delete_makes_no_log(path: Path) -> None:
    assert run("delete", path, "a").exit_code == 2
    assert not list(path.parent.iterdir())


@pytest.mark.parametrize("command", ["put", "apply", "compact", "delete"])
def test_a_damaged_log_is_cut_only_if_that_is_asked_for(path: Path, command: str) -> None:
    raw = slipref.HEADER + slipref.put("a", b"1") + slipref.cursor(slipref.u64(1))
    path.write_bytes(raw + b"\x09" * 30)
    arguments = {"put": ["b", "2"], "delete": ["a"]}.get(command, [])
    refused = run(command, path, *arguments, stdin=b"")
    assert refused.exit_code == 1
    assert path.read_bytes() == raw + b"\x09" * 30
    assert run(command, path, *arguments, "--on-damage", "cut", stdin=b"").exit_code == 0
    assert path.read_bytes().startswith(slipref.HEADER)
    assert b"\x09" * 30 not in path.read_bytes()


def test_help_has_a_short_form() -> None:
    for arguments in (["-h"], ["put", "-h"], ["tail", "-h"]):
        assert run(*arguments).stdout.startswith("Usage: ")


@pytest.mark.parametrize("command", ["get", "range", "export", "convert"])
def test_a_torn_tail_that_is_left_out_is_told_once(path: Path, command: str) -> None:
    path.write_bytes(slipref.HEADER + slipref.put("a", b"1") + slipref.cursor(b"c") + b"\1\2\3")
    before = files_in(path.parent)
    dest = path.parent.parent / "dest"
    arguments = {"get": ["a"], "export": [dest], "convert": [dest, "--to", "foldlog"]}.get(
        command, []
    )
    result = run(command, path, *arguments)
    assert result.exit_code == 0
    assert result.stderr == "left out a torn tail of 3 bytes\n"
    assert files_in(path.parent) == before


@pytest.mark.parametrize(
    "arguments",
    [("tail",), ("tail", "--no-follow"), ("top", "--once"), ("get", "--follow"), ("salvage",)],
    ids=" ".join,
)
def test_what_knows_one_format_names_the_other_and_the_remedy(
    path: Path, arguments: tuple[str, ...]
) -> None:
    """It said "not a foldlog log: shorter than a file header"."""
    path.write_bytes(slipref.HEADER + slipref.put("a", b"1") + slipref.cursor(b"c"))
    more = {"get": ["a"], "salvage": ["--output", path.parent / "new"]}.get(arguments[0], [])
    result = run(*arguments, path, *more)
    assert result.exit_code == 1
    assert "format slipstream-v2" in result.stderr
    assert "foldlog convert" in result.stderr
    assert result.stderr.count("\n") == 1
    with pytest.raises(foldlog.InvalidFormatError, match="slipstream-v2"):
        foldlog.follow(path)


def test_apply_applies_what_has_come_when_its_input_pauses(path: Path) -> None:
    """A paused stream left its last lines unapplied until a full batch or a closed pipe."""
    process = subprocess.Popen(
        [*COMMAND, "apply", path], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    assert process.stdin is not None
    try:
        with foldlog.follow(path, poll_interval_s=0.02) as follower:

            def feed(*changes: tuple[str, int]) -> None:
                for key, cursor in changes:
                    line = json.dumps({"op": "put", "key": key, "value": "1", "cursor": cursor})
                    process.stdin.write(line.encode() + b"\n")  # type: ignore[union-attr]
                process.stdin.flush()  # type: ignore[union-attr]
                deadline = time.monotonic() + DEADLINE_S
                with follower.watch(changes[-1][0]) as watch:
                    while follower.get(changes[-1][0]) is None:
                        assert time.monotonic() < deadline, "it was not applied"
                        watch.next(0.1)

            feed(("a", 1))
            assert follower.cursor() == WatchCursor.none(), "more lines of position 1 may come"
            feed(("b", 1))
            assert follower.cursor() == WatchCursor.none()
            feed(("c", 2), ("d", 3))
            assert follower.cursor() == WatchCursor.from_u64(2)
            process.stdin.close()
            assert process.wait(DEADLINE_S) == 0
            follower.wait_for(WatchCursor.from_u64(3), DEADLINE_S)
    finally:
        process.kill()
        process.wait()


EVIL = b"\x1b[31mred\x9b0m\r\x07 \xe2\x80\xae \xff"


def on_a_terminal(*arguments: object, keys: bytes = b"", term: str = "xterm") -> bytes:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": term},
        start_new_session=not keys,
        preexec_fn=None if not keys else _take_terminal,
    )
    os.close(theirs)
    said = b""
    deadline = time.monotonic() + DEADLINE_S
    try:
        while time.monotonic() < deadline:
            if not select.select((ours,), (), (), 0.1)[0]:
                continue
            try:
                data = os.read(ours, 65_536)
            except OSError:
                break
            if not data:
                break
            said += data
            if keys and b"snapshot" in said:
                os.write(ours, keys)
                keys = b""
        assert process.wait(DEADLINE_S) == 0, said
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    return said


def _take_terminal() -> None:
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_no_value_and_no_name_scripts_a_terminal(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\x1b[31m\x9b")
    folder.mkdir()
    path = folder / "a.log"
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("k\x1b[2J", EVIL)], WatchCursor.from_u64(1))
    for arguments in (
        ("get", path, "k\x1b[2J"),
        ("range", path),
        ("tail", path, "--no-follow"),
        ("top", path, "--once"),
    ):
        said = on_a_terminal(*arguments)
        assert b"\x1b" not in said, (arguments, said)
        assert b"\x9b" not in said
        assert b"\x07" not in said
    assert run("get", path, "k\x1b[2J").stdout_bytes == EVIL, "a pipe gets every byte as it is"


def test_top_ends_with_q_and_a_dumb_terminal_gets_plain_pictures(path: Path) -> None:
    AppendLogSnapshot.open(path)[1].close()
    assert b"following" in on_a_terminal("top", path, "--interval", "0.1", keys=b"xq")
    assert b"\x1b" not in on_a_terminal("top", path, "--once", term="dumb")


@pytest.mark.parametrize("interval", ["inf", "nan", "-1", "0", "0.01", "x"])
def test_top_refuses_an_interval_that_is_none(path: Path, interval: str) -> None:
    """Found in use: for nan and -1 it named 0 as the least, which it then refused as well."""
    result = run("top", path, "--once", "--interval", interval)
    assert result.exit_code == 2
    why = {"inf": "is finite, got", "x": "not a valid float"}.get(interval, "at least 0.05, got")
    assert why in " ".join(result.output.split())


def test_ids_are_hex_in_json(path: Path) -> None:
    run("put", path, "a", "1")
    header = json.loads(run("dump", path, "--json").stdout.splitlines()[0])
    assert header["generation"] == told("info", path)["generation"]
    assert len(header["generation"]) == 16
