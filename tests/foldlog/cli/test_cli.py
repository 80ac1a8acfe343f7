"""The command `foldlog`: what it prints, what it leaves on disk, and how it ends."""

from __future__ import annotations

import base64
import contextlib
import errno
import io
import json
import os
import pty
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cli_kit import COMMAND, files_in, run, told, told_by_line

from foldlog import (
    AppendLogSnapshot,
    CorruptLogError,
    Delete,
    Purge,
    Put,
    StoreLocked,
    VersionToken,
    WatchCursor,
)
from foldlog.cli import exit_code, main
from foldlog.cli.show import counted, printable, size_text, token_json
from foldlog.cli.stream import (
    BadLineError,
    Batcher,
    Change,
    Resume,
    lines_of,
    parse_change,
    read_changes,
)
from foldlog.storage.formats.foldlog.log import FrameFormat
from foldlog.storage.log.sidecars.lock import note_path


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log at cursor 9 with a base of three entries and one batch behind it."""
    path = tmp_path / "some.log"
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply(
            [Put("a/1", b"one", VersionToken.from_u64(7)), Put("a/2", b"\xff\x00\xc3\xa4")],
            WatchCursor.from_u64(7),
        )
        snap.apply([Put("b", b"zwei\t2\n", VersionToken(b"\xc0\xff\xee"))], WatchCursor.from_u64(8))
        snap.compact()
        snap.apply([Put("c", b"gone"), Delete("c"), Put("ä", b"")], WatchCursor.from_u64(9))
    return path


def stream(*changes: dict[str, object]) -> bytes:
    return b"".join(json.dumps(change).encode() + b"\n" for change in changes)


def puts(first: int, last: int) -> bytes:
    return stream(
        *(
            {"op": "put", "key": f"k{n:04}", "value": f"v{n}", "version": n, "cursor": n}
            for n in range(first, last + 1)
        )
    )


def state(path: Path) -> dict[str, str]:
    result = run("range", path, "--json")
    assert result.exit_code == 0
    return {entry["key"]: entry["value"] for entry in map(json.loads, result.stdout.splitlines())}


def cursor_of(path: Path) -> object:
    return told("info", path)["cursor"]


# get


def test_get_prints_the_value_byte_for_byte(log: Path) -> None:
    result = run("get", log, "a/2")
    assert (result.exit_code, result.stdout_bytes, result.stderr) == (0, b"\xff\x00\xc3\xa4", "")


def test_get_as_json_prints_text_or_base64_and_the_version(log: Path) -> None:
    assert told("get", log, "a/1") == {"key": "a/1", "value": "one", "version": 7}
    expected = {
        "key": "a/2",
        "value_base64": base64.b64encode(b"\xff\x00\xc3\xa4").decode(),
        "version": None,
    }
    assert told("get", log, "a/2") == expected
    assert told("get", log, "b")["version"] == "c0ffee"


@pytest.mark.parametrize("key", ["nope", "c", "", "a/"])
def test_get_of_an_absent_or_deleted_key_exits_with_1_and_says_so(log: Path, key: str) -> None:
    result = run("get", log, key)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"foldlog: {log}: no entry with key {key}\n"


def test_a_key_that_is_not_utf8_is_misuse(log: Path) -> None:
    result = run("get", log, "\udcff")
    assert result.exit_code == 2
    assert "is not UTF-8" in result.stderr


# range


def test_range_prints_key_tab_value_in_key_order_with_the_unprintable_escaped(log: Path) -> None:
    result = run("range", log)
    assert result.stdout_bytes.decode() == "a/1\tone\na/2\t\\xff\\x00ä\nb\tzwei\\x092\\x0a\nä\t\n"


def test_range_takes_a_prefix_a_limit_and_keys_only(log: Path) -> None:
    assert run("range", log, "a/", "--keys").stdout == "a/1\na/2\n"
    assert run("range", log, "--keys", "--limit", "3").stdout == "a/1\na/2\nb\n"
    assert run("range", log, "--limit", "0").stdout == ""
    assert run("range", log, "zzz").stdout == ""


def test_range_as_json_prints_one_object_a_line(log: Path) -> None:
    lines = told_by_line("range", log, "a/")
    assert lines == [
        {"key": "a/1", "value": "one", "version": 7},
        {"key": "a/2", "value_base64": "/wDDpA==", "version": None},
    ]
    assert told("range", log, "b", "--keys") == {"key": "b"}


# info


def test_info_as_json_tells_identity_sizes_and_position(log: Path) -> None:
    facts = told("info", log)
    assert facts["path"] == str(log)
    size = log.stat().st_size
    assert facts["size_bytes"] == size == facts["base_bytes"] + facts["appended_bytes"]
    assert (facts["sequence"], facts["cursor"], facts["entries"], facts["leaves"]) == (3, 9, 4, 1)
    assert (facts["batches_since_base"], facts["sealed"], facts["torn_bytes"]) == (1, True, 0)
    assert (facts["locked"], facts["writer_pid"], facts["format_version"]) == (False, None, 1)
    assert len(facts["log_id"]) == 32
    assert len(facts["generation"]) == 16


def test_info_prints_the_same_for_humans(log: Path) -> None:
    lines = dict(
        line.split(maxsplit=1)
        for line in run("info", log).stdout.splitlines()
        if not line.startswith("log id")
    )
    shown = [lines[name] for name in ("cursor", "entries", "sequence", "writer")]
    assert shown == ["9", "4", "3", "none"]
    assert lines["base"].endswith("in 1 leaf")
    assert lines["appended"].endswith(", 1 batch")
    assert lines["sealed"].startswith("yes")


def test_info_tells_of_a_torn_tail_and_leaves_it(log: Path) -> None:
    with log.open("ab") as file:
        file.write(b"\xf5fr")  # the beginning of a frame's magic
    before = files_in(log.parent)
    facts = told("info", log)
    assert (facts["torn_bytes"], facts["entries"]) == (3, 4)
    assert facts["size_bytes"] == log.stat().st_size
    assert "torn tail   3 bytes" in run("info", log).stdout
    assert files_in(log.parent) == before


# reading changes nothing


READS = [
    ("get", "a/1"),
    ("get", "a/1", "--json"),
    ("range",),
    ("range", "a/", "--json"),
    ("info",),
    ("info", "--json"),
]


@pytest.mark.parametrize("command", READS, ids=" ".join)
def test_reading_changes_no_byte_and_creates_no_file(log: Path, command: tuple[str, ...]) -> None:
    note_path(log).unlink()
    before = files_in(log.parent)
    assert run(command[0], log, *command[1:]).exit_code == 0
    assert files_in(log.parent) == before


@pytest.mark.parametrize("command", READS, ids=" ".join)
def test_reading_works_beside_a_writer_and_sees_what_it_wrote(
    log: Path, command: tuple[str, ...]
) -> None:
    with AppendLogSnapshot.open(log)[1] as snap:
        snap.apply([Put("a/3", b"new")], WatchCursor.from_u64(10))
        before = files_in(log.parent)
        result = run(command[0], log, *command[1:])
        assert files_in(log.parent) == before
        snap.apply([Put("a/4", b"newer")], WatchCursor.from_u64(11))  # and the writer goes on
    assert result.exit_code == 0
    if command[0] == "range":
        assert "a/3" in result.stdout
    elif command == ("info", "--json"):
        facts = json.loads(result.stdout)
        assert (facts["locked"], facts["writer_pid"], facts["cursor"]) == (True, os.getpid(), 10)
    elif command == ("info",):
        assert f"writer      process {os.getpid()}" in result.stdout


def test_a_frame_that_a_writer_completes_while_it_is_read_is_no_damage(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading stopped at half a frame; by the time it was judged, the frame was whole.

    It was then reported as "complete but wrong", in 3 of 100 reads beside a busy writer, until the
    judgement was limited to the size of the file when the read began.
    """
    whole = log.read_bytes()
    # Within the frame of the last batch, which the frame of the clean close follows.
    log.write_bytes(whole[:-70])
    judge = FrameFormat.diagnose

    def complete_and_judge(*arguments: Any) -> object:
        log.write_bytes(whole)
        return judge(*arguments)

    monkeypatch.setattr(FrameFormat, "diagnose", complete_and_judge)
    result = run("info", log, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout)["cursor"] == 8  # the state at the first look


@pytest.mark.parametrize("command", [*READS, ("compact",), ("export", "out")], ids=" ".join)
def test_a_log_that_is_missing_is_misuse_and_is_not_made(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    path = tmp_path / "missing.log"
    result = run(command[0], path, *command[1:])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"foldlog: {path}: No such file or directory\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [*READS, ("compact",)], ids=" ".join)
def test_a_damaged_log_ends_with_1_and_one_line(log: Path, command: tuple[str, ...]) -> None:
    raw = bytearray(log.read_bytes())
    raw[len(raw) // 2] ^= 1
    log.write_bytes(raw)
    before = files_in(log.parent)
    result = run(command[0], log, *command[1:])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"foldlog: {log}: byte ")
    assert result.stderr.count("\n") == 1
    assert {name for name in files_in(log.parent) if ".foldlog-" not in name} == {
        name for name in before if ".foldlog-" not in name
    }
    assert log.read_bytes() == raw


def test_a_folder_or_a_foreign_file_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(
        "some text, longer than the header of a log would be, so that it is read\n"
    )
    assert run("info", tmp_path).exit_code == 2
    result = run("info", tmp_path / "text")
    assert (result.exit_code, result.stderr) == (
        1,
        f"foldlog: {tmp_path / 'text'}: byte 0: not a foldlog log: wrong magic\n",
    )


# apply


def test_apply_folds_a_stream_from_stdin_and_prints_a_summary(tmp_path: Path) -> None:
    path = tmp_path / "new.log"
    changes = stream(
        {"op": "put", "key": "a", "value": "ä", "version": 1, "cursor": 1},
        {"op": "put", "key": "b", "value_base64": "AP8=", "version": "00C0ffee", "cursor": 2},
        {"op": "put", "key": "c", "value": "", "cursor": 3},
        {"op": "put", "key": "d", "value": "x", "version": None, "cursor": 3},
        {"op": "delete", "key": "c", "cursor": 4},
        {"op": "purge", "key": "d", "version": 9, "cursor": 18446744073709551615},
    )
    result = run("apply", path, stdin=changes)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(
        "applied 6 changes in 1 batch, skipped 0; cursor 18446744073709551615; "
    )
    assert result.stdout.endswith(" changes/s\n")
    assert told_by_line("range", path) == [
        {"key": "a", "value": "ä", "version": 1},
        {"key": "b", "value_base64": "AP8=", "version": "00c0ffee"},
    ]


def test_apply_reads_a_file_and_resumes_after_the_stored_cursor(tmp_path: Path) -> None:
    path, file = tmp_path / "new.log", tmp_path / "changes"
    file.write_bytes(puts(1, 5))
    applied = run("apply", path, file, "--batch", "2").stdout
    assert "applied 5 changes in 3 batches, skipped 0; cursor 5;" in applied
    file.write_bytes(puts(1, 8))
    assert "applied 3 changes in 1 batch, skipped 5; cursor 8;" in run("apply", path, file).stdout
    assert "applied 0 changes in 0 batches, skipped 8; cursor 8;" in run("apply", path, file).stdout
    assert state(path) == {f"k{n:04}": f"v{n}" for n in range(1, 9)}


def test_apply_never_splits_lines_with_one_cursor_into_two_batches(tmp_path: Path) -> None:
    cursors = [1, 2, 2, 2, 3, 3, 4]
    changes = b"".join(put(key=str(n), cursor=at) + b"\n" for n, at in enumerate(cursors))
    path = tmp_path / "new.log"
    applied = run("apply", path, "-", "--batch", "2", stdin=changes).stdout
    assert "applied 7 changes in 3 batches," in applied
    assert told("info", path)["sequence"] == 3


def test_apply_of_nothing_makes_an_empty_log(tmp_path: Path) -> None:
    result = run("apply", tmp_path / "new.log", stdin=b"\n \n")
    assert (result.exit_code, state(tmp_path / "new.log")) == (0, {})
    assert "cursor none;" in result.stdout


def test_a_bad_line_ends_apply_and_the_batches_before_it_stay(tmp_path: Path) -> None:
    path = tmp_path / "new.log"
    result = run("apply", path, "--batch", "2", stdin=puts(1, 5) + b'{"op": "put"}\n' + puts(7, 9))
    assert (result.exit_code, result.stdout) == (2, "")
    reason = (
        "stdin: line 6: key is missing; already applied: 4 changes in 2 batches, up to cursor 4"
    )
    assert result.stderr == f"foldlog: {reason}\n"
    assert state(path) == {f"k{n:04}": f"v{n}" for n in range(1, 5)}
    assert "skipped 4; cursor 9;" in run("apply", path, stdin=puts(1, 9)).stdout


def test_a_bad_line_in_a_file_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "changes"
    file.write_bytes(b"[]\n")
    result = run("apply", tmp_path / "new.log", file)
    assert (result.exit_code, result.stderr) == (
        2,
        f"foldlog: {file}: line 1: is not a JSON object; nothing was applied\n",
    )


def test_apply_refuses_a_file_that_is_missing_and_makes_no_log(tmp_path: Path) -> None:
    assert run("apply", tmp_path / "new.log", tmp_path / "missing").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_apply_resumes_opaque_cursors_behind_the_last_line_with_the_stored_one(
    tmp_path: Path,
) -> None:
    path = tmp_path / "new.log"
    cursors = {"a": "0a", "b": "0b", "c": "0b", "d": "01", "e": "02"}
    lines = [
        {"op": "put", "key": key, "value": "1", "cursor": cursor} for key, cursor in cursors.items()
    ]
    assert "cursor 0b;" in run("apply", path, stdin=stream(*lines[:3])).stdout
    for counts in ("2 changes in 1 batch, skipped 3", "0 changes in 0 batches, skipped 5"):
        applied = run("apply", path, stdin=stream(*lines)).stdout
        assert f"applied {counts}; cursor 02;" in applied


def test_a_stream_without_the_stored_opaque_cursor_is_refused_and_nothing_is_applied(
    tmp_path: Path,
) -> None:
    path = tmp_path / "new.log"
    run("apply", path, stdin=stream({"op": "put", "key": "a", "value": "1", "cursor": "0a"}))
    for changes in (stream({"op": "delete", "key": "a", "cursor": "0b"}), b"", puts(1, 3)):
        result = run("apply", path, stdin=changes)
        assert (result.exit_code, result.stdout) == (2, "")
        expected = (
            "foldlog: stdin: cannot resume: no line has cursor 0a, which the log is at;"
            " nothing was applied\n"
        )
        assert result.stderr == expected
    assert state(path) == {"a": "1"}


class InterruptedInput(io.BytesIO):
    """Ctrl-C comes when these lines are read."""

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(-1 if size is None else size)
        if not line:
            raise KeyboardInterrupt
        return line


def test_ctrl_c_applies_what_has_come_but_a_position_that_may_be_incomplete(tmp_path: Path) -> None:
    path = tmp_path / "new.log"
    result = run("apply", path, "--batch", "2", stdin=InterruptedInput(puts(1, 4) + puts(4, 4)))
    assert result.exit_code == 130
    assert "applied 3 changes in 2 batches, skipped 0; cursor 3;" in result.stdout
    assert "Aborted" not in result.stderr
    assert cursor_of(path) == 3
    run("apply", path, stdin=puts(1, 4) + puts(4, 6))
    assert state(path) == {f"k{n:04}": f"v{n}" for n in range(1, 7)}


@pytest.mark.parametrize("command", [("apply",), ("compact",)], ids=" ".join)
def test_a_log_that_another_writer_has_open_is_refused_with_2(
    log: Path, command: tuple[str, ...]
) -> None:
    with AppendLogSnapshot.open(log)[1]:
        result = run(command[0], log, *command[1:], stdin=puts(10, 11))
    assert (result.exit_code, result.stderr) == (
        2,
        f"foldlog: {log}: already open for writing in process {os.getpid()}\n",
    )


# compact, export, import


def test_compact_rewrites_the_log_once_and_tells_the_bytes(log: Path) -> None:
    before = log.stat().st_size
    result = run("compact", log)
    after = log.stat().st_size
    assert result.stdout == f"compacted: {before} bytes before, {after} bytes after, 4 entries\n"
    again = run("compact", log).stdout
    assert again == f"already compact: {after} bytes before, {after} bytes after, 4 entries\n"
    assert (cursor_of(log), run("get", log, "a/1").stdout) == (9, "one")


def test_export_and_import_carry_the_state_and_need_no_lock(log: Path, tmp_path: Path) -> None:
    artifact, copy = tmp_path / "artifact", tmp_path / "copy.log"
    with AppendLogSnapshot.open(log)[1] as snap:
        before = log.read_bytes()
        result = run("export", log, artifact)
        assert log.read_bytes() == before
        expected = snap.range("")
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"exported 4 entries at cursor 9 to {artifact}, " in result.stdout
    result = run("import", artifact, copy)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"at cursor 9 to {copy}" in result.stdout
    with AppendLogSnapshot.open(copy)[1] as snap:
        assert snap.range("") == expected


def test_export_creates_nothing_beside_the_log(log: Path, tmp_path: Path) -> None:
    note_path(log).unlink()
    before = files_in(log.parent)
    assert run("export", log, tmp_path / "artifact").exit_code == 0
    shutil.rmtree(tmp_path / "artifact")
    assert files_in(log.parent) == before


def test_export_and_import_never_overwrite(log: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    assert run("export", log, artifact).exit_code == 0
    before = files_in(tmp_path)
    assert run("export", log, artifact).exit_code == 2
    assert run("import", artifact, log).exit_code == 2
    assert files_in(tmp_path) == before


def test_import_refuses_a_damaged_artifact_with_1_and_a_missing_one_with_2(
    log: Path, tmp_path: Path
) -> None:
    run("export", log, tmp_path / "artifact")
    payload = tmp_path / "artifact" / "data" / "fold.log"
    payload.write_bytes(payload.read_bytes()[:-1] + b"?")
    result = run("import", tmp_path / "artifact", tmp_path / "copy.log")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert not (tmp_path / "copy.log").exists()
    assert result.stderr.startswith(f"foldlog: {payload}: ")
    assert run("import", tmp_path / "missing", tmp_path / "copy.log").exit_code == 2


# the change stream


def put(**changes: object) -> bytes:
    """A line that is valid but for these fields; one that is ... is left out."""
    return line_with({"op": "put", "key": "a", "value": "1", "cursor": 1}, changes)


def delete(**changes: object) -> bytes:
    return line_with({"op": "delete", "key": "a", "cursor": 1}, changes)


def line_with(fields: dict[str, object], changes: dict[str, object]) -> bytes:
    given = {name: value for name, value in (fields | changes).items() if value is not ...}
    return json.dumps(given).encode()


NO_TOKEN = "is a number, or the hex of up to 10 bytes, not"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "is not JSON: Expecting property name"),
        (b"\xff", "is not UTF-8 at byte 0"),
        (b"7", "is not a JSON object"),
        (b'{"op": "put", "op": "put"}', "a field occurs twice"),
        (put(cursor=float("nan")), "NaN is not JSON"),
        (put(ttl=5), "'ttl' is not a field of a change"),
        (put(op=...), "op is missing"),
        (put(key=...), "key is missing"),
        (put(cursor=...), "cursor is missing"),
        (put(op="set"), "op is put, delete or purge, not 'set'"),
        (put(op=["put"]), "op is put, delete or purge, not ['put']"),
        (put(key=5), "key is text, not 5"),
        (put(key="\ud800"), "key has a lone surrogate at character 0"),
        (put(key="k" * 65_536), "key takes 65536 bytes of UTF-8"),
        (put(value=...), "a put has either value or value_base64"),
        (put(value_base64=""), "a put has either value or value_base64"),
        (put(value=None), "value is text, not None"),
        (put(value="\udfff"), "value has a lone surrogate"),
        (put(value=..., value_base64="A"), "value_base64 is not base64"),
        (put(value=..., value_base64="A A="), "value_base64 is not base64"),
        (put(value="v" * (16 * 2**20 + 1)), "value takes 16777217 bytes"),
        (delete(value="1"), "a delete has no value"),
        (delete(op="purge", value_base64=""), "a purge has no value"),
        (delete(cursor=-1), "cursor is 0 to 2**64 - 1, not -1"),
        (delete(cursor=2**64), "cursor is 0 to 2**64 - 1, not 18446744073709551616"),
        (delete(cursor=1.0), f"cursor {NO_TOKEN} 1.0"),
        (delete(cursor=True), f"cursor {NO_TOKEN} True"),
        (delete(cursor=None), f"cursor {NO_TOKEN} None"),
        (delete(cursor=""), "cursor is empty"),
        (delete(cursor="0"), f"cursor {NO_TOKEN} "),
        (delete(cursor="0a 0b"), f"cursor {NO_TOKEN} "),
        (delete(cursor="0011223344556677889900"), f"cursor {NO_TOKEN} "),
        (delete(version="x1"), f"version {NO_TOKEN} "),
        # Nested too deeply, or not JSON: which one depends on the version of Python.
        (b"[" * 100_000, "is n"),
    ],
    ids=lambda value: repr(value[:60]),
)
def test_a_line_that_is_not_a_change_is_refused_with_the_reason(line: bytes, reason: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        parse_change(line)
    assert str(caught.value).startswith(reason)
    assert len(str(caught.value)) < 200


def test_a_line_becomes_an_update_with_its_cursor() -> None:
    put = parse_change(
        b'{"op": "put", "key": "\xc3\xa4", "value": "xyz", "version": 5, "cursor": 6}', 3
    )
    expected = Change(3, Put("ä", b"xyz", VersionToken.from_u64(5)), WatchCursor.from_u64(6), 6, 5)
    assert put == expected
    delete = parse_change(b'{"op": "delete", "key": "a", "version": "", "cursor": "0a"}')
    assert (delete.update, delete.cursor, delete.number) == (Delete("a"), WatchCursor(b"\n"), None)
    assert parse_change(b'{"op": "purge", "key": "", "cursor": 0}').update == Purge("")


def test_numbers_that_go_backwards_are_refused_with_the_line() -> None:
    changes = read_changes([*puts(3, 3).splitlines(), b"", *puts(2, 2).splitlines()], "x")
    assert next(changes).number == 3
    with pytest.raises(
        BadLineError, match=r"^x: line 3: cursor 2 is before 3, the cursor of an earlier line$"
    ):
        next(changes)


def test_lines_tell_how_far_they_have_come() -> None:
    told: list[tuple[int, int]] = []
    lines = lines_of(io.BytesIO(b"a\nbc"), lambda done, total: told.append((done, total)), 4)
    assert list(lines) == [b"a\n", b"bc"]
    assert told == [(2, 4), (4, 4)]


def change(cursor: int, size: int = 1) -> Change:
    return Change(1, Delete("k"), WatchCursor.from_u64(cursor), cursor, size)


def opaque(cursor: bytes) -> Change:
    return Change(1, Delete("k"), WatchCursor(cursor), None, 1)


def test_a_batch_also_ends_when_its_bytes_are_many() -> None:
    batcher = Batcher(1000)
    assert [len(batcher.push(change(n, 20 * 2**20))) for n in range(1, 6)] == [0, 0, 2, 0, 2]
    assert len(batcher.rest()) == 1
    assert batcher.rest() == []


AT_2, AT_B = WatchCursor.from_u64(2), WatchCursor(b"b")


@pytest.mark.parametrize(
    ("stored", "changes", "held", "lost"),
    [
        (WatchCursor.none(), [change(1)], [False], False),
        (AT_2, [change(1), change(2), change(2), change(3)], [True, True, True, False], False),
        (AT_2, [change(1)], [True], False),
        (AT_2, [change(3)], [False], False),
        (AT_2, [], [], False),
        (AT_2, [opaque(b"\1")], [True], True),
        (AT_2, [opaque(b"\1"), opaque(AT_2), opaque(b"\0")], [True, True, False], False),
        (AT_B, [*map(opaque, (b"a", b"b", b"b", b"a", b"b"))], [True] * 3 + [False] * 2, False),
        (AT_B, [opaque(b"a"), opaque(b"b")], [True, True], False),
        (AT_B, [opaque(b"a"), change(1)], [True, True], True),
        (AT_B, [], [], True),
    ],
)
def test_resuming_skips_what_the_log_holds(
    stored: WatchCursor, changes: list[Change], held: list[bool], lost: bool
) -> None:
    resume = Resume(stored)
    assert [resume.is_held(change) for change in changes] == held
    assert (resume.skipped, resume.lost) == (sum(held), lost)


# what is shown


def test_text_for_a_terminal_has_no_control_characters() -> None:
    assert printable("plain ä") == "plain ä"
    assert printable("a\n\x1b[31m\x9b\u2028\U000e0001") == "a\\x0a\\x1b[31m\\x9b\\u2028\\U000e0001"


def test_numbers_are_told_with_their_unit() -> None:
    assert (counted(1, "batch"), counted(2000, "batch")) == ("1 batch", "2,000 batches")
    assert counted(0, "change") == "0 changes"
    assert (size_text(1000), size_text(3 * 2**20)) == ("1,000 bytes", "3,145,728 bytes (3.0 MiB)")
    tokens = (VersionToken.from_u64(5), VersionToken(b"\5"), VersionToken())
    assert [token_json(token) for token in tokens] == [5, "05", None]


# how it ends


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CorruptLogError("x", 1, "bad"), 1),
        (StoreLocked("x", 1), 2),
        (FileNotFoundError(errno.ENOENT, "missing"), 2),
        (FileExistsError(errno.EEXIST, "exists"), 2),
        (PermissionError(errno.EACCES, "no"), 2),
        (OSError(errno.ENOSPC, "full"), 1),
        (OSError(errno.EIO, "broken"), 1),
        (ValueError("bad"), 2),
    ],
    ids=repr,
)
def test_the_exit_code_tells_misuse_from_a_store_that_says_no(
    error: BaseException, code: int
) -> None:
    assert exit_code(error) == code


@pytest.mark.parametrize(
    "args",
    [
        ("nope",),
        ("get",),
        ("get", "x", "y", "z"),
        ("apply", "x", "--batch", "0"),
        ("info", "x", "--nope"),
    ],
)
def test_bad_arguments_are_misuse(args: tuple[str, ...]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")


def test_every_command_has_help_with_an_example() -> None:
    assert run("--version").stdout.startswith("foldlog, version ")
    assert "_FOLDLOG_COMPLETE=bash_source foldlog" in " ".join(run("--help").stdout.split())
    named = {"apply", "compact", "demo", "export", "get", "import", "info", "range"}
    assert named <= set(main.commands)
    for name in main.commands:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert "Example" in result.stdout


def test_ctrl_c_ends_any_command_with_130_and_no_traceback(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("foldlog.cli.read.load_intact", interrupted)
    result = run("info", log)
    assert (result.exit_code, result.output) == (130, "")


# as a process


def command(*args: object, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # type: ignore[call-overload,no-any-return]
        (*COMMAND, *map(str, args)), **options
    )


def test_a_reader_that_leaves_ends_range_quietly(tmp_path: Path) -> None:
    path = tmp_path / "many.log"
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put(f"{n:06}", b"v" * 50) for n in range(20_000)], WatchCursor.from_u64(1))
    with command(
        "range", path, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"000000\t" + b"v" * 50 + b"\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_processes_apply_resume_and_fail_with_their_exit_codes(tmp_path: Path) -> None:
    def piped(text: bytes, *args: object) -> tuple[int, bytes, bytes]:
        done = subprocess.run(
            (*COMMAND, *map(str, args)),
            cwd=tmp_path,
            input=text,
            capture_output=True,
            timeout=150,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    code, _, err = piped(puts(1, 20) + b"?", "apply", "a.log", "--batch", "8")
    assert code == 2
    assert b"16 changes in 2 batches, up to cursor 16" in err
    assert b"Traceback" not in err
    code, out, err = piped(puts(1, 20), "apply", "a.log")
    assert (code, err) == (0, b"")
    assert out.startswith(b"applied 4 changes in 1 batch, skipped 16; cursor 20; ")
    assert piped(b"", "get", "a.log", "k0020") == (0, b"v20", b"")
    assert piped(b"", "get", "a.log", "k0021")[0] == 1


def test_closed_standard_streams_are_no_error_and_never_become_the_log(tmp_path: Path) -> None:
    (tmp_path / "changes").write_bytes(puts(1, 3))
    shell = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *COMMAND)
    for args, code in (
        (("apply", "a.log", "changes"), 0),
        (("range", "a.log"), 0),
        (("get", "a.log", "nope"), 1),
    ):
        assert (
            subprocess.run((*shell, *args), cwd=tmp_path, check=False, timeout=60).returncode
            == code
        )
    assert state(tmp_path / "a.log") == {"k0001": "v1", "k0002": "v2", "k0003": "v3"}


def test_a_progress_bar_shows_on_a_terminal_only(log: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    try:
        with command(
            "export", log, "artifact", cwd=tmp_path, stdout=subprocess.PIPE, stderr=theirs
        ) as process:
            os.close(theirs)
            shown = b""
            with contextlib.suppress(OSError):  # Linux says EIO when the other end is closed
                while piece := os.read(ours, 65_536):
                    shown += piece
            assert process.stdout is not None
            out = process.stdout.read()
    finally:
        os.close(ours)
    assert process.returncode == 0
    assert out.startswith(b"exported 4 entries")
    assert b"exporting" in shown
