"""No path, key or option that a command prints can script a terminal."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from cli_kit import run

import foldlog
from foldlog import AppendLogSnapshot, Put, WatchCursor
from foldlog.cli import main

EVIL = "\x1b]0;owned\x07\x1b[31m\x9b\u202e\r"
KEY = "k\x1b[2J\x9b"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Logs, an artifact and a database under names that are terminal escapes."""
    folder = tmp_path / EVIL
    folder.mkdir()
    good, damaged = folder / f"{EVIL}.log", folder / f"{EVIL}-damaged"
    with AppendLogSnapshot.open(good)[1] as snap:
        snap.apply([Put(KEY, b"1")], WatchCursor.from_u64(1))
        snap.export_to(folder / f"{EVIL}-artifact")
        shutil.copy(good, folder / f"{EVIL}-copy")
        snap.apply([Put(KEY, b"2")], WatchCursor.from_u64(2))
    data = bytearray(good.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    (folder / f"{EVIL}-torn").write_bytes(good.read_bytes()[:-1])
    (folder / f"{EVIL}-empty").mkdir()
    if find_spec("rocksdict") is not None:
        foldlog.open(folder / f"{EVIL}-database", backend="rocksdb").close()
    return folder


COMMANDS: dict[str, list[tuple[str, ...]]] = {
    "get": [("LOG", KEY), ("LOG", KEY, "--json"), ("LOG", f"{KEY}-absent")],
    "range": [("LOG",), ("LOG", "--keys-only"), ("LOG", "--json")],
    "info": [("LOG",), ("LOG", "--json")],
    "export": [("LOG", "NEW")],
    "tail": [("LOG", "--no-follow"), ("LOG", "--no-follow", "--json"), ("LOG", "--since", EVIL)],
    "put": [("LOG", KEY, "1"), ("LOG", KEY, "1", "--create"), ("LOG", KEY, "1", "--expected", "9")],
    "delete": [("LOG", KEY, "--expected", "9"), ("LOG", f"{KEY}-absent"), ("LOG", KEY)],
    "apply": [("LOG", "BAD"), ("LOG", f"{EVIL}-absent")],
    "compact": [("LOG",), ("LOG", "--json")],
    "import": [("ARTIFACT", "NEW"), ("LOG", "NEW")],
    "mirror": [
        ("NEW", "LOG", "--once", "--timeout", "0.5", "--json"),
        ("NEW", f"nats://{EVIL}", "--once", "--timeout", "0"),
        ("NEW", "LOG", "--password-file", EVIL),
        ("NEW", "LOG", "--credentials", EVIL),
    ],
    "convert": [("LOG", "NEW", "--to", "foldlog"), ("LOG", "NEW", "--to", EVIL)],
    "verify": [("LOG",), ("LOG", "--json")],
    "salvage": [("LOG", "--output", "NEW"), ("LOG", "--output", "LOG"), ("LOG", "--cursor", EVIL)],
    "dump": [("LOG", "--bodies"), ("LOG", "--bodies", "--json")],
    "top": [("LOG", "--once"), ("LOG", "--interval", EVIL)],
    "demo": [("--dir", "LOG")],
}
LOGS = (".log", "-damaged", "-torn", "-empty", "-database", "-absent")


def calls(command: str, folder: Path) -> Iterator[list[str]]:
    """Each way to call the command, with each kind of file; then misuses."""
    numbers = itertools.count()
    for arguments in COMMANDS[command]:
        for name in LOGS:
            log = folder / f"{EVIL}{name}"
            if command == "demo" and not log.is_file():
                continue  # it would begin
            names = {
                "LOG": log,
                "NEW": folder / f"{EVIL}-new-{next(numbers)}",
                "ARTIFACT": folder / f"{EVIL}-artifact",
                "BAD": folder / f"{EVIL}-copy",  # no change stream
            }
            yield [str(names.get(word, word)) for word in arguments]
    yield [f"--{EVIL}"]
    yield ["1", "2", "3", "4", EVIL]


@pytest.mark.parametrize("command", sorted(main.commands))
def test_nothing_that_a_command_prints_scripts_a_terminal(command: str, folder: Path) -> None:
    """click's messages quoted file names and options as they were, and `mirror --json` left the
    control characters from 0x80 to 0x9f."""
    for arguments in calls(command, folder):
        result = run(command, *arguments)
        for said in (result.stdout, result.stderr):
            raw = {char for char in said if not char.isprintable()} - {"\n", "\t"}
            assert not raw, (command, arguments, said)


def test_unknown_commands_and_options_are_told_without_escapes() -> None:
    for arguments in ((EVIL,), (f"--{EVIL}",)):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "\x1b" not in result.stderr
        assert "owned" in result.stderr
