"""`foldlog verify`, `salvage`, `dump`: output and exit codes; they change no byte of the log."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from faultkit import batch, fold_of, view
from logfiles import frames_of, write_log

from foldlog import AppendLogSnapshot, Delete, Purge, Put, WatchCursor
from foldlog.cli import main
from foldlog.storage.engines.append_log.engine import LogEngine as Engine


def run(*args: object) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def files_in(folder: Path) -> dict[str, tuple[bytes, int, int]]:
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            info = path.stat()
            found[str(path)] = (path.read_bytes(), info.st_mtime_ns, info.st_ino)
    return found


@pytest.fixture
def raw(path: Path) -> bytes:
    return write_log(path, [batch(n) for n in range(3, 7)], base=[batch(1), batch(2)])


@pytest.fixture
def damaged(path: Path, raw: bytes) -> Path:
    """A log whose batch 4 is damaged."""
    frame = next(
        frame for frame in frames_of(raw) if frame.header.batches and frame.header.seq == 4
    )
    path.write_bytes(raw[: frame.start + 60] + b"\0\0" + raw[frame.start + 62 :])
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["verify"],
        ["verify", "--json"],
        ["dump"],
        ["dump", "--json", "--bodies"],
        ["dump", "--bodies"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("harm", ["none", "damaged", "cut", "no header"])
def test_no_byte_of_the_log_changes_and_nothing_is_made_beside_it(path, raw, command, harm):
    image = {
        "none": raw,
        "damaged": raw[:900] + b"\xee" + raw[901:],
        "cut": raw[:-9],
        "no header": bytes(52) + raw[52:],
    }[harm]
    path.write_bytes(image)
    before = files_in(path.parent)
    result = run(command[0], path, *command[1:])
    assert result.exit_code == (
        0 if harm == "none" or (harm == "cut" and command[0] == "verify") else 1
    ), result.output
    assert files_in(path.parent) == before
    assert "Traceback" not in result.output


def test_verify_says_ok_and_what_it_counted(path, raw):
    result = run("verify", path)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"{path}: ok: ")
    assert "4 batches up to batch 6 at cursor 6" in result.stdout


def test_verify_prints_each_problem_with_its_offset(damaged, raw):
    frame = next(
        frame for frame in frames_of(raw) if frame.header.batches and frame.header.seq == 4
    )
    result = run("verify", damaged)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"byte {frame.start}, {frame.end - frame.start:,} bytes: ")
    assert lines[1].startswith(f"byte {frame.end}, ")
    assert "batch 4 is missing" in lines[1]
    assert "damaged, 2 problems" in lines[2]
    facts = json.loads(run("verify", damaged, "--json").stdout)
    assert [problem["offset"] for problem in facts["problems"]] == [frame.start, frame.end]
    assert (facts["ok"], facts["sequence"], facts["cursor"]) == (False, 6, 6)


def test_verify_tells_a_torn_tail_and_ends_with_0(path, raw):
    path.write_bytes(raw[:-9])
    result = run("verify", path)
    assert result.exit_code == 0
    assert "torn tail of" in result.stdout


def test_verify_works_while_a_writer_has_the_log_open(path):
    engine = Engine(path)
    try:
        assert run("verify", path).exit_code == 0
        assert run("dump", path).exit_code == 0
    finally:
        engine.close()


@pytest.mark.parametrize("command", ["verify", "dump"])
def test_misuse_ends_with_2_and_a_file_that_is_no_log_with_1(tmp_path, command):
    assert run(command, tmp_path / "absent.log").exit_code == 2
    assert run(command, tmp_path).exit_code == 2
    assert run(command).exit_code == 2
    (tmp_path / "text").write_text("hello")
    assert run(command, tmp_path / "text").exit_code == 1


def test_salvage_keeps_what_is_right_and_lists_what_was_lost(damaged, tmp_path):
    output = tmp_path / "saved.log"
    before = files_in(damaged.parent)
    result = run("salvage", damaged, "--output", output)
    assert result.exit_code == 1
    assert files_in(damaged.parent) == before
    assert "batches 4 to 4 are lost, after cursor 3, before cursor 5" in result.stdout
    assert "cursor 3 (the last batch kept has 6); 1 loss" in result.stdout
    with AppendLogSnapshot.open(output)[1] as snap:
        assert view(snap) == fold_of([1, 2, 3, 5, 6])
    assert run("verify", output).exit_code == 0


def test_salvage_as_json_with_the_last_cursor(damaged, tmp_path):
    result = run(
        "salvage", damaged, "--output", tmp_path / "saved.log", "--cursor", "last", "--json"
    )
    facts = json.loads(result.stdout)
    assert (facts["cursor"], facts["last_cursor"], facts["batches"]) == (6, 6, 3)
    (loss,) = facts["losses"]
    assert (loss["first_seq"], loss["last_seq"], loss["after_cursor"], loss["before_cursor"]) == (
        4,
        4,
        3,
        5,
    )


def test_salvage_of_a_sound_log_ends_with_0_and_never_overwrites(path, raw, tmp_path):
    output = tmp_path / "saved.log"
    assert run("salvage", path, "--output", output).exit_code == 0
    assert run("salvage", path, "--output", output).exit_code == 2
    assert run("salvage", path).exit_code == 2
    assert run("salvage", tmp_path / "absent", "--output", tmp_path / "x").exit_code == 2
    assert path.read_bytes() == raw


def test_dump_prints_every_frame_where_it_stands(path, raw):
    result = run("dump", path)
    lines = result.stdout.splitlines()
    frames = frames_of(raw)
    assert len(lines) == 1 + len(frames)
    for frame, line in zip(frames, lines[1:], strict=True):
        assert line.split()[0] == str(frame.start)
        assert f"{frame.header.crc:08x}" in line
        assert line.endswith("ok")
    listed = [json.loads(line) for line in run("dump", path, "--json").stdout.splitlines()]
    assert listed[0]["kind"] == "HEADER"
    assert [(piece["offset"], piece["size"], piece["seq"]) for piece in listed[1:]] == [
        (frame.start, frame.end - frame.start, frame.header.seq) for frame in frames
    ]


def test_dump_prints_what_batches_hold(path):
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("a\n", b"1\t\xff"), Delete("b"), Purge("c")], WatchCursor.from_u64(7))
    lines = run("dump", path, "--bodies").stdout.splitlines()
    shown = [line.strip() for line in lines]
    assert "batch 1 at cursor 7, 3 updates" in shown
    assert r"put a\x0a @ none = 1\x09\xff" in shown
    assert "delete b @ none" in shown
    assert "purge c @ none" in shown
    bodies = [
        json.loads(line).get("body")
        for line in run("dump", path, "--bodies", "--json").stdout.splitlines()
    ]
    assert [
        "batch 1 at cursor 7, 3 updates",
        r"  put a\x0a @ none = 1\x09\xff",
        "  delete b @ none",
        "  purge c @ none",
    ] in bodies


def test_dump_shows_the_bytes_that_are_no_frame_and_the_frames_behind_them(damaged, raw):
    image = bytearray(damaged.read_bytes())
    frame = frames_of(raw)[-1]
    image[frame.start + 5] ^= 1
    damaged.write_bytes(image)
    lines = run("dump", damaged).stdout.splitlines()
    assert (
        lines[-1] == f"{frame.start:>12}  {frame.end - frame.start:,} bytes: no valid frame header"
    )
    assert sum("does not verify" in line for line in lines) == 1
