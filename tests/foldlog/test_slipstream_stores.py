"""The Rust crate's format behind every face: stores, artifacts, conversions, the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import slipref
from actor_kit import DEADLINE_S
from cli_kit import files_in, run, told, told_by_line
from hypothesis import given
from hypothesis import strategies as st
from logfiles import frames_of

import foldlog
from foldlog import (
    AppendLogSnapshot,
    ArtifactInvalidError,
    CursorExpired,
    Delete,
    Export,
    InvalidFormatError,
    Purge,
    Put,
    VersionToken,
    WatchCursor,
)
from foldlog.protocol.store import FormatName
from foldlog.storage.artifacts.artifact import read_manifest
from foldlog.testing import crash_at

FORMATS: tuple[FormatName, FormatName] = ("foldlog", "slipstream-v2")
Entries = dict[str, tuple[bytes, bytes]]


def u64(number: int) -> WatchCursor:
    return WatchCursor.from_u64(number)


def entries_of(store: Any) -> Entries:
    return {entry.key: (entry.value, bytes(entry.version)) for entry in store.range("")}


def bodies_of(raw: bytes) -> list[bytes]:
    """What a log of foldlog's own format holds, without its ids."""
    return [frame.body for frame in frames_of(raw)]


# Random histories, through both formats at once.

TOKEN = st.one_of(
    st.just(b""),
    st.integers(0, 2**64 - 1).map(slipref.u64),
    st.binary(min_size=10, max_size=10),
    st.binary(max_size=10),
)
KEY = st.one_of(st.sampled_from(["a", "b", "", "a\0", "\ue000", "\U00010000"]), st.text(max_size=6))
UPDATE = st.one_of(
    st.builds(
        lambda key, value, token: Put(key, value, VersionToken(token)),
        KEY,
        st.binary(max_size=20),
        TOKEN,
    ),
    st.builds(lambda key, token: Delete(key, VersionToken(token)), KEY, TOKEN),
    st.builds(lambda key, token: Purge(key, VersionToken(token)), KEY, TOKEN),
)
STEP = st.one_of(
    st.tuples(st.just("apply"), st.lists(UPDATE, max_size=8), TOKEN),
    st.tuples(st.sampled_from(["compact", "reopen", "crash", "convert"])),
)


@given(st.lists(STEP, max_size=12))
def test_a_history_through_both_formats_gives_the_same_fold_cursor_and_artifacts(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("histories")
    paths = {name: folder / name for name in FORMATS}
    stores = {
        name: AppendLogSnapshot.open(paths[name], 1 << 40, format=name)[1] for name in FORMATS
    }
    expected: Entries = {}
    at = b""
    for number, step in enumerate(steps):
        if step[0] == "apply":
            _, updates, at = step
            for update in updates:
                if type(update) is Put:
                    expected[update.key] = update.value, bytes(update.version)
                else:
                    expected.pop(update.key, None)
        for name in FORMATS:
            if step[0] == "apply":
                stores[name].apply(updates, WatchCursor(at))
            elif step[0] == "compact":
                stores[name].compact()
            elif step[0] == "convert":
                stores[name].close()
                other = folder / f"{name}-{number}"
                result = run("convert", paths[name], other, "--to", name)
                assert (result.exit_code, result.stderr) == (0, "")
                paths[name] = other
            elif step[0] == "reopen":
                stores[name].close()
            else:
                stores[name]._engine.log.abandon()
            if step[0] in ("reopen", "crash", "convert"):
                stores[name] = AppendLogSnapshot.open(paths[name], 1 << 40)[1]
            assert entries_of(stores[name]) == expected
            assert stores[name].cursor() == at
    assert slipref.replay(paths["slipstream-v2"].read_bytes()) == (expected, at)
    payloads: dict[tuple[str, str], bytes] = {}
    for name, store in stores.items():
        for format in FORMATS:
            artifact = folder / f"artifact-{name}-{format}"
            manifest = store.export_to(artifact, format=format)
            payloads[name, format] = (artifact / manifest.files[0].path).read_bytes()
            assert manifest.cursor == at
        store.close()
    assert (
        payloads["foldlog", "slipstream-v2"]
        == payloads["slipstream-v2", "slipstream-v2"]
        == slipref.compacted(expected, at)
    )
    ours, theirs = (bodies_of(payloads[name, "foldlog"]) for name in FORMATS)
    assert ours == theirs


# The store of many threads.


@pytest.mark.parametrize(
    "step", ["writer.before_write", "writer.after_write", "writer.after_publish"]
)
@pytest.mark.parametrize("compacted", [False, True])
def test_a_batch_in_hand_at_a_crash_is_settled_by_its_sequence(
    path: Path, step: str, compacted: bool
) -> None:
    """The format stores no sequences: they are counted.

    After a crash the count must continue from the writer's, base included.
    """
    store = foldlog.open(path, format="slipstream-v2", step=crash_at(step, 3))
    assert [store.apply([Put(f"k{n}", b"v")], u64(n), DEADLINE_S) for n in (1, 2)] == [1, 2]
    if compacted:
        store.compact(DEADLINE_S)
    assert [store.apply([Put(f"k{n}", b"%d" % n)], u64(n), DEADLINE_S) for n in (3, 4)] == [3, 4]
    assert len(store.stats().restarts) == 1
    assert store.stats().seq == 4
    store.close()
    records = slipref.replay(path.read_bytes())
    assert records == (
        {"k1": (b"v", b""), "k2": (b"v", b""), "k3": (b"3", b""), "k4": (b"4", b"")},
        slipref.u64(4),
    )
    assert path.read_bytes().count(slipref.put("k3", b"3")) == 1, "written once, and not again"


def test_a_store_exports_either_format_and_by_message(path: Path, tmp_path: Path) -> None:
    with foldlog.open(path, format="slipstream-v2") as store:
        store.apply([Put("k", b"v")], u64(7), DEADLINE_S)
        assert store.export_to(tmp_path / "own").backend == "append-log"
        assert store.export_to(tmp_path / "foldlog", format="foldlog").backend == "foldlog"
        manifest = store.writer.ask(
            Export(str(tmp_path / "told"), "slipstream-v2"), timeout=DEADLINE_S
        )
        assert manifest.files[0].path == "data/fold.snap"
        with pytest.raises(ValueError, match="format is"):
            store.export_to(tmp_path / "no", format="zip")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="format is"):
            store.writer.ask(
                Export(str(tmp_path / "no"), "zip"),  # type: ignore[arg-type]
                timeout=DEADLINE_S,
            )
        assert store.verify().ok
        with pytest.raises(CursorExpired):
            next(store.watch(since=u64(3)))
    with pytest.raises(InvalidFormatError):
        foldlog.follow(path)


# Artifacts.


def test_an_exported_artifact_is_what_the_origin_imports(path: Path, tmp_path: Path) -> None:
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply(
            [Put("b", b"2", VersionToken(b"0123456789")), Put("a", b"1"), Put("c", b"")],
            WatchCursor(b"9876543210"),
        )
        snap.apply([Delete("c")], WatchCursor(b"9876543211"))
        snap.export_to(tmp_path / "out", format="slipstream-v2")
    raw = slipref.compacted({"a": (b"1", b""), "b": (b"2", b"0123456789")}, b"9876543211")
    out = tmp_path / "out"
    files = sorted(file.relative_to(out).as_posix() for file in out.rglob("*"))
    assert files == ["MANIFEST.json", "data", "data/fold.snap"]
    assert (out / "data/fold.snap").read_bytes() == raw
    artifact = slipref.write_artifact(tmp_path / "theirs", raw, b"9876543211")
    theirs = json.loads((artifact / "MANIFEST.json").read_bytes())
    ours = json.loads((tmp_path / "out/MANIFEST.json").read_bytes())
    assert ours == theirs | {"created_at_unix": ours["created_at_unix"]}
    assert type(ours["created_at_unix"]) is int


@pytest.mark.parametrize("landing", [None, *FORMATS])
@pytest.mark.parametrize(
    ("entries", "at"),
    [
        ({}, b""),
        ({}, b"0123456789"),
        ({"k": (b"v", b"")}, b""),
        ({"b": (b"2" * 9999, b"\0" * 10), "a": (b"", b"x")}, slipref.u64(5)),
    ],
    ids=["empty", "a cursor only", "no cursor", "entries"],
)
def test_an_artifact_of_the_origin_lands_in_either_format(
    tmp_path: Path, entries: Entries, at: bytes, landing: FormatName | None
) -> None:
    raw = slipref.compacted(entries, at)
    artifact = slipref.write_artifact(tmp_path / "artifact", raw, at)
    before = files_in(artifact)
    dest = tmp_path / "landed.log"
    cursor, snap = AppendLogSnapshot.import_artifact(artifact, dest, format=landing)
    with snap:
        assert (entries_of(snap), cursor) == (entries, at)
        if landing == "slipstream-v2":
            assert dest.read_bytes() == raw
        else:
            assert dest.read_bytes().startswith(b"\x89FLG")
        snap.apply([Put("more", b"1")], u64(9))
    assert files_in(artifact) == before
    assert read_manifest(artifact).backend == "append-log"
    assert not list(tmp_path.glob("*.tmp-*"))


def bad_payloads() -> dict[str, tuple[bytes, bytes]]:
    good = slipref.compacted({"a": (b"1", b""), "b": (b"2", b"")}, b"c")
    flipped = bytearray(good)
    flipped[20] ^= 1
    return {
        "torn": (good[:-1], b"c"),
        "slack": (good + bytes(8), b"c"),
        "flipped": (bytes(flipped), b"c"),
        "another cursor": (good, b"d"),
        "no cursor in the payload": (slipref.compacted({"a": (b"1", b"")}, b""), b"c"),
        "not in order": (
            slipref.HEADER + slipref.put("b", b"") + slipref.put("a", b"") + slipref.cursor(b"c"),
            b"c",
        ),
        "not compact": (
            slipref.HEADER + slipref.put("b", b"") + slipref.delete("b") + slipref.cursor(b"c"),
            b"c",
        ),
        "behind the cursor": (good + slipref.put("z", b""), b"c"),
        "version 1": (b"PGSS\x01\x00" + good[6:], b"c"),
        "no log at all": (b"hello", b""),
        "empty": (b"", b""),
    }


@pytest.mark.parametrize("landing", FORMATS)
@pytest.mark.parametrize("case", bad_payloads())
def test_a_bad_artifact_of_the_origin_never_lands(
    tmp_path: Path, case: str, landing: FormatName
) -> None:
    payload, at = bad_payloads()[case]
    artifact = slipref.write_artifact(tmp_path / "artifact", payload, at)
    with pytest.raises(ArtifactInvalidError):
        AppendLogSnapshot.import_artifact(artifact, tmp_path / "landed.log", format=landing)
    assert not (tmp_path / "landed.log").exists()
    assert not list(tmp_path.glob("*.tmp-*"))


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "fjall"},
        {"backend": "foldlog"},
        {"backend_version": "1"},
        {"backend_version": 2},
        {"schema_version": 2},
        {"cursor_hex": "C0"},
        {"files": []},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_manifest_that_says_something_else_is_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    artifact = slipref.write_artifact(
        tmp_path / "artifact", slipref.compacted({"a": (b"1", b"")}, b"\xc0"), b"\xc0", **change
    )
    with pytest.raises(ArtifactInvalidError):
        AppendLogSnapshot.import_artifact(artifact, tmp_path / "landed.log")
    assert not (tmp_path / "landed.log").exists()


# The command line.


@pytest.fixture
def snap_file(tmp_path: Path) -> Path:
    path = tmp_path / "state.snap"
    path.write_bytes(
        slipref.HEADER
        + slipref.put("b", b"2", slipref.u64(2))
        + slipref.put("a", b"1", b"")
        + slipref.cursor(slipref.u64(2))
        + slipref.delete("b", slipref.u64(3))
        + slipref.cursor(slipref.u64(3))
    )
    return path


def test_commands_that_read_leave_a_file_of_the_origin_as_it_is(snap_file: Path) -> None:
    before = files_in(snap_file.parent)
    assert run("get", snap_file, "a").stdout == "1"
    assert told("range", snap_file) == {"key": "a", "value": "1", "version": None}
    facts = told("info", snap_file)
    expected = {"format": "slipstream-v2", "format_version": 2, "cursor": 3, "entries": 1}
    expected |= dict.fromkeys(("log_id", "generation", "sequence", "leaves", "sealed"))
    assert facts | expected == facts
    assert "format      slipstream-v2\n" in run("info", snap_file).stdout
    verified = run("verify", snap_file)
    assert (verified.exit_code, ": ok: " in verified.stdout) == (0, True)
    assert told("verify", snap_file)["frames"] == 5
    assert files_in(snap_file.parent) == before


def test_dump_prints_every_record(snap_file: Path) -> None:
    lines = run("dump", snap_file, "--bodies").stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["PUT", "PUT", "CURSOR", "DELETE", "CURSOR"]
    assert lines[0].endswith("b @ 2 = 2")
    assert lines[2].endswith("cursor 2")
    facts = told_by_line("dump", snap_file, "--bodies")
    record = {"offset": 6, "size": 22, "ok": True, "reason": "", "kind": "PUT"}
    assert facts[0] == {**record, "key": "b", "value": "2", "version": 2}
    assert [facts[3][name] for name in ("kind", "key", "version")] == ["DELETE", "b", 3]
    assert facts[4]["cursor"] == 3


def test_damage_in_a_file_of_the_origin_is_told_with_exit_code_1(snap_file: Path) -> None:
    raw = bytearray(snap_file.read_bytes())
    raw[30] ^= 1
    snap_file.write_bytes(raw)
    for command in ("get", "info", "verify", "dump"):
        result = run(command, snap_file, *(["a"] if command == "get" else []))
        assert result.exit_code == 1
        assert "28" in result.output
    assert snap_file.read_bytes() == raw
    snap_file.write_bytes(raw[:27])
    torn = run("dump", snap_file)
    assert (torn.exit_code, "ends early" in torn.stdout) == (0, True)


def test_apply_compact_export_and_import_work_on_the_format(tmp_path: Path) -> None:
    path = tmp_path / "state.snap"
    change = b'{"op": "put", "key": "k", "value": "v", "cursor": 1}\n'
    assert run("apply", path, "--format", "slipstream-v2", stdin=change).exit_code == 0
    assert run("apply", path, stdin=change.replace(b"1}", b"2}")).exit_code == 0
    refused = run("apply", path, "--format", "foldlog", stdin=change)
    assert refused.exit_code == 1
    assert "slipstream-v2" in refused.stderr
    assert run("compact", path).exit_code == 0
    raw = slipref.compacted({"k": (b"v", b"")}, slipref.u64(2))
    assert path.read_bytes() == raw
    assert run("export", path, tmp_path / "theirs").exit_code == 0
    assert run("export", path, tmp_path / "ours", "--format", "foldlog").exit_code == 0
    for artifact in ("theirs", "ours"):
        for format in FORMATS:
            dest = tmp_path / f"{artifact}-{format}"
            assert run("import", tmp_path / artifact, dest, "--format", format).exit_code == 0
            assert told("info", dest)["format"] == format
            if format == "slipstream-v2":
                assert dest.read_bytes() == raw
    assert run("import", tmp_path / "theirs", tmp_path / "default").exit_code == 0
    assert told("info", tmp_path / "default")["format"] == "foldlog"


def test_convert_goes_both_ways_and_leaves_its_source_as_it_is(
    snap_file: Path, tmp_path: Path
) -> None:
    before = snap_file.read_bytes()
    there, back = tmp_path / "there.log", tmp_path / "back.snap"
    result = run("convert", snap_file, there, "--to", "foldlog")
    assert result.stdout.startswith("converted 1 entry at cursor 3 from slipstream-v2 to foldlog: ")
    assert run("convert", there, back, "--to", "slipstream-v2").exit_code == 0
    assert back.read_bytes() == slipref.compacted({"a": (b"1", b"")}, slipref.u64(3))
    assert snap_file.read_bytes() == before
    assert run("verify", there).exit_code == 0


def test_convert_never_overwrites_and_never_leaves_a_half(snap_file: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_bytes(b"mine")
    for dest in (taken, snap_file, tmp_path):
        result = run("convert", snap_file, dest, "--to", "foldlog")
        assert (result.exit_code, "never overwrites" in result.stderr) == (2, True)
    assert taken.read_bytes() == b"mine"
    assert run("convert", snap_file, tmp_path / "no folder" / "x", "--to", "foldlog").exit_code == 2
    assert run("convert", tmp_path / "missing", tmp_path / "x", "--to", "foldlog").exit_code == 2
    raw = bytearray(snap_file.read_bytes())
    raw[30] ^= 1
    snap_file.write_bytes(raw)
    assert run("convert", snap_file, tmp_path / "x", "--to", "foldlog").exit_code == 1
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob("*.tmp-*"))


def test_convert_tells_of_a_torn_tail_that_it_leaves_out(snap_file: Path, tmp_path: Path) -> None:
    snap_file.write_bytes(snap_file.read_bytes()[:-2])
    result = run("convert", snap_file, tmp_path / "x", "--to", "foldlog")
    assert result.exit_code == 0
    assert result.stderr == "left out a torn tail of 12 bytes\n"
    assert run("get", tmp_path / "x", "a").stdout == "1"


def test_convert_beside_a_writer_takes_what_stands_there(path: Path, tmp_path: Path) -> None:
    with AppendLogSnapshot.open(path, format="slipstream-v2")[1] as snap:
        snap.apply([Put("k", b"v")], u64(1))
        assert run("convert", path, tmp_path / "x", "--to", "foldlog").exit_code == 0
        snap.apply([Put("k", b"w")], u64(2))
    assert run("get", tmp_path / "x", "k").stdout == "v"
