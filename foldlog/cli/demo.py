"""The command `demo`: the whole life of a log, on data that every Python has: the Unicode character database.

`unicodedata` holds two versions of it, 3.2.0 and a current one, so there is a real history to fold:

    1  every named character of 3.2.0                                   puts
    2  what changed or came since                                       puts
    3  the compatibility ideographs and presentation forms go           deletes
    4  they are purged, and the ideographs of the basic plane return    a purge and a put at one cursor

Each change has a version (30200 is 3.2.0) and a cursor. The stream is folded in two runs with a restart between them, and the
result is compared with a plain dict that took the same changes.
"""

from __future__ import annotations

import errno
import json
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from foldlog.cli.read import read_log
from foldlog.cli.show import counted, printable, progress_bar, size_text, token_text, value_text
from foldlog.cli.stream import read_changes
from foldlog.cli.write import Tally, fold_stream
from foldlog.protocol.tokens import VersionToken, WatchCursor
from foldlog.protocol.updates import KvEntry
from foldlog.storage.artifacts.artifact import import_artifact
from foldlog.storage.engines.append_log import AppendLogSnapshot
from foldlog.storage.fold.snapshot import FoldSnapshot
from foldlog.storage.formats.rewrite import Progress

ALL_CODE_POINTS = range(0x110000)
IDEOGRAPHS = (range(0xF900, 0xFB00),)
LEAVING = (*IDEOGRAPHS, range(0xFB50, 0xFE00), range(0x2F800, 0x2FA20))
SHOWN_KEYS = ("U+0041", "U+20AC", "U+FB50")
SHOWN_PREFIX = "U+1F60"

Model = dict[str, tuple[str, int]]
"""key -> (value, version): what the log must hold in the end."""


class Database:
    """One version of the Unicode character database."""

    def __init__(self, source: Any) -> None:
        self._source = (
            source  # the module, or its older version: an object with the functions of the module
        )
        major, minor, update = source.unidata_version.split(".")
        self.version = int(major) * 10_000 + int(minor) * 100 + int(update)

    def describe(self, code: int) -> str | None:
        """The value for a code point: name;category;direction;decomposition. None if it has no name."""
        char, source = chr(code), self._source
        name = source.name(char, "")
        if not name:
            return None
        return f"{name};{source.category(char)};{source.bidirectional(char)};{source.decomposition(char)}"


OLD, NEW = Database(unicodedata.ucd_3_2_0), Database(unicodedata)


def key_of(code: int) -> str:
    """The key of a code point: U+0041."""
    return f"U+{code:04X}"


class History:
    """The change stream as lines of JSON, and the state that it leads to in a plain dict. Cost: about 1 s."""

    def __init__(self, code_points: Sequence[int] = ALL_CODE_POINTS) -> None:
        self.lines: list[bytes] = []
        self.model: Model = {}
        self.steps: list[tuple[str, int]] = []
        """What each step does, and its changes."""
        self._cursor = 0
        leaving = [code for part in LEAVING for code in part if code in code_points]
        self._step("the characters of Unicode 3.2.0", code_points, self._add_old)
        self._step(
            f"what Unicode {unicodedata.unidata_version} changed and added",
            code_points,
            self._add_new,
        )
        self._step("compatibility ideographs and presentation forms deleted", leaving, self._delete)
        self._step("the same purged, and some put back", leaving, self._purge)

    def _step(self, what: str, codes: Sequence[int], take: Callable[[int], None]) -> None:
        before = len(self.lines)
        for code in codes:
            take(code)
        self.steps.append((what, len(self.lines) - before))

    def _add_old(self, code: int) -> None:
        value = OLD.describe(code)
        if value is not None:
            self._put(key_of(code), value, OLD.version)

    def _add_new(self, code: int) -> None:
        key, value = key_of(code), NEW.describe(code)
        held = self.model.get(key)
        if value is None:
            if held is not None:
                self._remove("delete", key)
        elif held is None or held[0] != value:
            self._put(key, value, NEW.version)

    def _delete(self, code: int) -> None:
        if key_of(code) in self.model:
            self._remove("delete", key_of(code))

    def _purge(self, code: int) -> None:
        self._remove("purge", key_of(code))
        value = NEW.describe(code)
        if value is not None and any(code in part for part in IDEOGRAPHS):
            self._put(key_of(code), value, NEW.version, same_position=True)

    def _put(self, key: str, value: str, version: int, *, same_position: bool = False) -> None:
        self.model[key] = (value, version)
        self._line({"op": "put", "key": key, "value": value, "version": version}, same_position)

    def _remove(self, op: str, key: str) -> None:
        self.model.pop(key, None)
        self._line({"op": op, "key": key, "version": NEW.version}, False)

    def _line(self, fields: dict[str, str | int], same_position: bool) -> None:
        self._cursor += not same_position
        fields["cursor"] = self._cursor
        self.lines.append(json.dumps(fields).encode())


def differences(fold: FoldSnapshot, model: Model) -> Iterator[str]:
    """The keys at which the log and the dict differ, in the log's order and then the dict's; also if the order is wrong."""
    expected = dict(model)
    last = ""
    for block in fold.blocks():
        for key, value, version in block:
            held = expected.pop(key, None)
            if (
                held is None
                or value != held[0].encode()
                or version != VersionToken.from_u64(held[1])
                or key <= last
            ):
                yield key
            last = key
    yield from expected


class Report:
    """The tidy report: a heading for each part, with its time, and indented lines below."""

    @contextmanager
    def part(self, title: str) -> Iterator[Progress | None]:
        """A part, timed. Its heading comes when it is done, its lines with `line` after that."""
        start = time.perf_counter()
        with progress_bar(title) as progress:
            yield progress
        click.echo(f"{title:<52} {time.perf_counter() - start:6.2f} s")

    def line(self, text: str) -> None:
        click.echo(f"    {text}")


def run(folder: Path, code_points: Sequence[int] = ALL_CODE_POINTS) -> bool:
    """Run the demo in `folder`, and print its report. Returns whether all that was compared was equal. Cost: about 5 s."""
    log, copy, artifact = folder / "unicode.log", folder / "copy.log", folder / "artifact"
    for path in (log, copy, artifact):
        if path.exists():
            raise FileExistsError(errno.EEXIST, "the demo never overwrites", str(path))
    report = Report()
    with report.part("make a change stream of the Unicode database"):
        history = History(code_points)
    for what, count in history.steps:
        report.line(f"{count:>9,}  {what}")

    with report.part("apply the first half, and stop") as progress:
        cursor, tally = _feed(log, history.lines[: len(history.lines) // 2], progress)
    report.line(_told(cursor, tally, log))
    with report.part("restart, feed it all, and let it resume") as progress:
        resumed_from = read_log(log).loaded.fold.cursor()
        cursor, tally = _feed(log, history.lines, progress)
    report.line(f"resumed after cursor {token_text(resumed_from)}")
    report.line(_told(cursor, tally, log))

    fold = read_log(log).loaded.fold
    with report.part("look some up"):
        found = [fold.get(key) for key in SHOWN_KEYS]
        under = fold.range(SHOWN_PREFIX)
    for key, entry in zip(SHOWN_KEYS, found, strict=True):
        report.line(f"get {key:<9} {_shown(entry)}")
    report.line(f"range {SHOWN_PREFIX}: {counted(len(under), 'entry')}")
    for entry in under[:3]:
        report.line(f"    {entry.key:<9} {_shown(entry)}")

    with report.part("compare with a plain dict"):
        wrong = list(differences(fold, history.model))
    equal = _verdict(wrong, len(history.model), report)
    with report.part("compact") as progress:
        before = log.stat().st_size
        AppendLogSnapshot.open(log, progress=progress)[1].close()
    report.line(
        f"{size_text(before)} before, {size_text(log.stat().st_size)} after: no history, and an index for each leaf"
    )
    with report.part("export and import") as progress:
        with AppendLogSnapshot.open(log)[1] as snap:
            manifest = snap.export_to(artifact, progress)
        import_artifact(artifact, copy, progress=progress)
    report.line(
        f"artifact of {size_text(manifest.files[0].size)}, blake3 {manifest.files[0].blake3[:16]}..."
    )
    with report.part("compare the imported copy with the dict"):
        imported = read_log(copy).loaded.fold
        wrong = list(differences(imported, history.model))
    if imported.cursor() != cursor:
        click.echo(f"foldlog: the copy stands at cursor {token_text(imported.cursor())}", err=True)
        equal = False
    return _verdict(wrong, len(history.model), report) and equal


def _feed(log: Path, lines: list[bytes], progress: Progress | None) -> tuple[WatchCursor, Tally]:
    """Open the log, apply `lines` from where it stands, close it."""

    def told() -> Iterator[bytes]:
        for number, line in enumerate(lines, 1):
            if progress is not None:
                progress(number, len(lines))
            yield line

    with AppendLogSnapshot.open(log)[1] as snap:
        tally = fold_stream(snap, read_changes(told(), "the stream"), "the stream")
        if tally.interrupted:
            raise KeyboardInterrupt
        return snap.cursor(), tally


def _told(cursor: WatchCursor, tally: Tally, log: Path) -> str:
    applied = f"{counted(tally.applied, 'change')} in {counted(tally.batches, 'batch')}"
    return f"{applied}, {tally.skipped:,} skipped; cursor {token_text(cursor)}; file of {size_text(log.stat().st_size)}"


def _shown(entry: KvEntry | None) -> str:
    return (
        "no entry"
        if entry is None
        else f"{value_text(entry.value)}  (version {token_text(entry.version)})"
    )


def _verdict(wrong: list[str], entries: int, report: Report) -> bool:
    if wrong:
        shown = ", ".join(map(printable, wrong[:5]))
        click.echo(
            f"foldlog: the log and the dict differ in {counted(len(wrong), 'key')}: {shown}",
            err=True,
        )
        return False
    report.line(f"verified against a dict: {entries:,} entries equal")
    return True


@click.command(epilog="Example: foldlog demo")
@click.option(
    "--dir",
    "folder",
    type=click.Path(path_type=Path),
    help="Work and leave the files here, instead of in a temporary folder.",
)
def demo(folder: Path | None) -> None:
    """Fold the Unicode character database: apply, stop, resume, read, verify, compact, export, import. Takes a few seconds.

    Exit code 1 if the log differs from a plain dict that took the same changes.
    """
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="foldlog-demo-") as temporary:
            equal = run(Path(temporary))
    else:
        folder.mkdir(parents=True, exist_ok=True)
        equal = run(folder)
    if not equal:
        raise click.exceptions.Exit(1)


COMMANDS = (demo,)
