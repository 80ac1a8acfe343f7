"""Logs with every checksum right that say what no writer would: each reader refuses them, typed, in
bounded memory and reads."""

from __future__ import annotations

import contextlib
import io
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
from actor_kit import logging_text_only
from blake3 import blake3
from counting import CountedFiles
from forged import KEYS, forged, sample, written

import foldlog
from foldlog import (
    AppendLogSnapshot,
    ArtifactInvalidError,
    FoldlogError,
    Synced,
    WatchCursor,
)
from foldlog.cli import main
from foldlog.storage.artifacts.artifact import ArtifactFile, ExportManifest
from foldlog.storage.formats.registry import load_intact
from foldlog.storage.log.files import ReadHandle
from foldlog.storage.repair.verify import verify_log

pytestmark = pytest.mark.exhaustive

MAX_GROWTH_KIB = 96 * 1024

OUTPUT = io.TextIOWrapper(io.BytesIO(), "utf-8", "backslashreplace")
"""What the commands print. One for all runs: click keeps each stream that it has written to, which
took 50 MiB in the campaign."""


class Tally:
    """What became of the logs."""

    def __init__(self) -> None:
        self.cases = self.opened = self.salvaged = self.imported = 0


def read_all_ways(reader: Any) -> None:
    """`get` and `range` agree, whatever the log says."""
    with contextlib.suppress(FoldlogError):
        len(reader.snapshot())
    try:
        entries = {entry.key: entry for entry in reader.range("")}
    except FoldlogError:
        entries = None
    found: list[Any] = []
    with contextlib.suppress(FoldlogError):
        reader.for_each_in_range("b", found.append)
    for key in {*KEYS, *(entries or ()), "zz"}:
        try:
            entry = reader.get(key)
        except FoldlogError:
            assert entries is None, f"range has {key!r}, and get refuses it"
            continue
        if entries is not None:
            assert entry == entries.get(key)
    if entries is not None:
        assert list(entries) == sorted(entries)


def check(path: Path, raw: bytes, tally: Tally) -> None:
    """Read a log in every way that there is."""
    files = CountedFiles()
    path.write_bytes(raw)
    with contextlib.suppress(FoldlogError), foldlog.follow(path, files=files) as follower:
        read_all_ways(follower)
        with contextlib.suppress(FoldlogError), contextlib.closing(follower.watch()) as watch:
            for event in watch:
                if isinstance(event, Synced):
                    break
    for command in (["verify"], ["dump", "--bodies"], ["dump", "--bodies", "--json"], ["info"]):
        run(command[0], str(path), *command[1:])
    saved = path.with_name("saved.log")
    run("salvage", str(path), "--output", str(saved))
    assert path.read_bytes() == raw
    if saved.exists():
        tally.salvaged += 1
        told = {problem.reason for problem in verify_log(saved).problems}
        assert all("end" in reason and "leaf" in reason for reason in told), "leaves end elsewhere"
        load_intact(ReadHandle(files, saved)).fold.range("")
        saved.unlink()
    import_as_artifact(path.with_name("artifact"), raw, tally)
    with contextlib.suppress(FoldlogError):
        _, snap = AppendLogSnapshot.open(path, files=files)
        tally.opened += 1
        try:
            read_all_ways(snap)
            snap.verify()
        finally:
            snap.close()
    assert files.bytes_read < 400 * len(raw) + 65_536
    tally.cases += 1
    for left in path.parent.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def import_as_artifact(folder: Path, raw: bytes, tally: Tally) -> None:
    """The log as the payload of an artifact whose manifest is right."""
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "fold.log").write_bytes(raw)
    file = ArtifactFile("data/fold.log", len(raw), blake3(raw).hexdigest())
    manifest = ExportManifest("foldlog", "1", WatchCursor(b"c"), 0, (file,))
    (folder / "MANIFEST.json").write_bytes(manifest.to_json())
    dest = folder.with_name("imported.log")
    try:
        _, snap = AppendLogSnapshot.import_artifact(folder, dest)
    except ArtifactInvalidError:
        assert not dest.exists()
        return
    tally.imported += 1
    read_all_ways(snap)
    assert snap.range("") is not None
    snap.close()


def run(command: str, *arguments: str) -> None:
    OUTPUT.seek(0)
    OUTPUT.truncate()
    with contextlib.redirect_stdout(OUTPUT), contextlib.redirect_stderr(OUTPUT):
        with pytest.raises(SystemExit) as end:
            main([command, *arguments])
        OUTPUT.seek(0)
    assert end.value.code in (0, 1), OUTPUT.read()


def campaign(path: Path, seeds: range) -> Tally:
    tally = Tally()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with logging_text_only():  # pytest keeps all records: the frames of their errors took 190 MiB
        for seed in seeds:
            try:
                check(path, forged(seed), tally)
            except BaseException as error:
                error.add_note(f"forged log {seed}")
                raise
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{tally.cases} forged logs: {tally.opened} opened, {tally.salvaged} salvaged,")
    print(f"{tally.imported} imported; nothing but typed errors;")
    print(f"peak memory grew by {grown / 1024:.0f} MiB")
    assert grown < MAX_GROWTH_KIB
    return tally


def test_what_is_forged_is_right_but_for_the_forgery(path):
    import random

    raw = written(sample(random.Random(1)))
    path.write_bytes(raw)
    _, snap = AppendLogSnapshot.open(path)
    assert len(snap.range("")) > 0
    assert snap.verify().ok
    snap.close()


@pytest.mark.parametrize("part", range(4))
def test_a_log_that_is_forged_is_read_with_nothing_but_typed_errors(path, part):
    tally = campaign(path, range(25 * part, 25 * (part + 1)))
    assert 0 < tally.opened < tally.cases, "some are accepted, some are not"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_forged_logs_are_read_with_nothing_but_typed_errors(path, part):
    campaign(path, range(10_000 + 2500 * part, 10_000 + 2500 * (part + 1)))
