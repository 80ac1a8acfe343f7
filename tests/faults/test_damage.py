"""Damage to a log: no loss is silent and no value is wrong, however its bytes are changed.

Bytes are flipped, overwritten, torn out and spliced in. And the readers under hypothesis: any
bytes give a state or a typed error, in bounded memory and with a bounded number of reads.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from counting import CountedFiles
from crc32c import crc32c
from faultkit import quick_folder, rebooted
from hypothesis import example, given
from hypothesis import strategies as st
from logfiles import State, commit_all, forge_log, frames_of, prefix_states, write_log

from foldlog import (
    CorruptLogError,
    ExportManifest,
    FoldlogError,
    InvalidFormatError,
    LogRegressedError,
    Put,
    VersionToken,
)
from foldlog.protocol.frames import (
    FILE_HEADER,
    FRAME_HEADER,
    FRAME_MAGIC,
    KIND_BASE_END,
    KIND_BATCHES,
    KIND_LEAF,
    KIND_OPEN,
    build_frame,
    parse_file_header,
)
from foldlog.protocol.tokens import U64_MAX
from foldlog.storage.artifacts.artifact import parse_manifest
from foldlog.storage.engines.append_log.engine import LogEngine as Engine
from foldlog.storage.formats.registry import load_intact
from foldlog.storage.log.files import OS_FILES, Files, ReadHandle
from foldlog.storage.repair.salvage import salvage_log
from foldlog.storage.repair.verify import verify_log
from foldlog.testing import flips, sampled_flips, splices

pytestmark = pytest.mark.exhaustive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with quick_folder(tmp_path_factory.mktemp("damage")) as quick:
        yield quick


@pytest.fixture
def path(folder: Path) -> Path:
    for file in folder.iterdir():
        file.unlink()
    return folder / "state.log"


def batches_of(count: int) -> list[list[Put]]:
    return [
        [Put(f"k{n % 17}", b"value %d" % n, VersionToken.from_u64(n)), Put("last", b"%d" % n)]
        for n in range(1, count + 1)
    ]


def read(path: Path, files: Files = OS_FILES) -> State | FoldlogError:
    """What a reader makes of the file: a state or a typed error."""
    try:
        fold = load_intact(ReadHandle(files, path)).fold
        entries = {entry.key: (entry.value, bytes(entry.version)) for entry in fold.range("")}
        return State(fold.seq, bytes(fold.cursor()), entries)
    except (CorruptLogError, InvalidFormatError, LogRegressedError) as error:
        return error


def all_refused(path: Path, images: Iterator[tuple[int, bytes]]) -> int:
    """Every image must be refused, with the offset of what is wrong. Returns their number."""
    count = 0
    for bit, image in images:
        path.write_bytes(image)
        found = read(path)
        assert isinstance(found, (CorruptLogError, InvalidFormatError, LogRegressedError)), (
            f"bit {bit}: silently read as batch {found[0]}"
        )
        assert 0 <= found.offset <= bit // 8, f"bit {bit}: told at byte {found.offset}"
        count += 1
    return count


def hundred_batches(path: Path) -> bytes:
    return write_log(path, batches_of(100))


def compacted_base(path: Path) -> bytes:
    engine = Engine(path)
    commit_all(
        engine, [[Put(f"key{n:04}", b"v%d" % n, VersionToken.from_u64(n)) for n in range(300)]]
    )
    engine.compact()
    engine.close()
    raw = path.read_bytes()
    assert sum(frame.header.kind == KIND_LEAF for frame in frames_of(raw)) >= 2
    return raw


LOGS = [hundred_batches, compacted_base]
CAMPAIGN = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(params=[False, True], ids=["in one boot", "after a reboot"])
def boot(request: pytest.FixtureRequest) -> Iterator[None]:
    """The log is read in the boot that it was written in, or in a later one."""
    with rebooted() if request.param else contextlib.nullcontext():
        yield


@pytest.mark.usefixtures("boot")
@pytest.mark.parametrize("log", LOGS)
def test_no_bit_of_a_log_can_flip_unnoticed(path, log):
    raw = log(path)
    count = all_refused(path, sampled_flips(raw, 300, seed=8))
    print(f"{count} of {len(raw) * 8} bits flipped, 0 silent losses")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("boot")
@pytest.mark.parametrize("log", LOGS)
def test_no_bit_of_all_of_a_log_can_flip_unnoticed(path, log):
    raw = log(path)
    count = all_refused(path, flips(raw))
    assert count == len(raw) * 8 >= 36_000
    print(f"all {count} bits flipped, 0 silent losses")


def harmed(raw: bytes, chance: random.Random) -> bytes:
    """A log with one to three stretches overwritten, zeroed, removed, repeated or inserted."""
    image = bytearray(raw)
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(max(len(image), 1))
        size = chance.choice((1, 2, 7, 64, 512, 4096))
        stop = min(start + size, len(image))
        way = chance.randrange(5)
        if way == 0:
            image[start:stop] = chance.randbytes(stop - start)
        elif way == 1:
            image[start:stop] = bytes(stop - start)
        elif way == 2:
            del image[start:stop]
        elif way == 3:
            image[start:start] = image[start:stop]
        else:
            image[start:start] = chance.randbytes(size)
    return bytes(image)


def nothing_wrong_is_read(path: Path, raw: bytes, images: Iterator[bytes]) -> tuple[int, int]:
    """Check that each image is refused, or reads as an earlier state of the log and a torn tail.

    `verify` and `salvage` must keep their promises. Returns how many images were refused, and how
    many read as torn.
    """
    states = [*prefix_states(raw, path).values()]
    entries = {(key, *entry) for state in states for key, entry in state.entries.items()}
    refused = torn = 0
    output = path.with_name("saved.log")
    for number, image in enumerate(images):
        path.write_bytes(image)
        found = read(path)
        if isinstance(found, State):
            assert found in states, f"image {number} reads as a state that never was"
            torn += image != raw
        else:
            refused += 1
        if number % 4 == 0:
            try:
                assert verify_log(path).ok == isinstance(found, State), number
                report = salvage_log(path, output)
            except InvalidFormatError:
                continue
            saved = read(output)
            assert isinstance(saved, State)
            assert {(key, *entry) for key, entry in saved.entries.items()} <= entries, (
                f"image {number}: salvaged what never was"
            )
            assert report.seq <= states[-1].seq
            output.unlink()
    return refused, torn


@pytest.mark.usefixtures("boot")
@pytest.mark.parametrize(
    ("count", "seed"),
    [(300, 1), *(pytest.param(2000, seed, marks=CAMPAIGN) for seed in range(2, 12))],
)
def test_damage_of_many_bytes_is_refused_or_reads_as_a_torn_tail(path, count, seed):
    raw = write_log(path, batches_of(30), base=batches_of(40))
    chance = random.Random(seed)
    refused, torn = nothing_wrong_is_read(path, raw, (harmed(raw, chance) for _ in range(count)))
    assert refused > count // 2
    print(f"{count} damaged logs: {refused} refused, {torn} read as torn, 0 wrong")


@pytest.mark.usefixtures("boot")
@pytest.mark.parametrize("count", [120, pytest.param(5000, marks=CAMPAIGN)])
def test_a_splice_of_two_logs_is_refused_or_reads_as_a_torn_tail(path, count):
    first = write_log(path, batches_of(20), base=batches_of(3))
    path.unlink()
    second = write_log(path, [[Put("foreign", b"x" * n)] for n in range(30)])
    for other in (second, first):  # the log's own bytes, too
        images = (
            image
            for _, _, image in splices(first, other, count, seed=4)
            if len(image) > FILE_HEADER.size
        )
        refused, torn = nothing_wrong_is_read(path, first, images)
        assert refused > count // 2
        print(f"{count} splices: {refused} refused, {torn} read as torn, 0 wrong")


# Fuzzing. All readers on all bytes: a value or a typed error.


def all_readers(path: Path, image: bytes) -> None:
    path.write_bytes(image)
    read(path)
    for reader in (verify_log, lambda file: salvage_log(file, file.with_name("saved.log"))):
        try:
            reader(path)
        except InvalidFormatError:
            pass
        finally:
            path.with_name("saved.log").unlink(missing_ok=True)


frames = st.lists(
    st.tuples(
        st.sampled_from((KIND_OPEN, KIND_BATCHES, KIND_LEAF, KIND_BASE_END, 5, 6)),
        st.binary(max_size=200),
    ),
    max_size=6,
)


@given(st.binary(max_size=600))
@example(FRAME_MAGIC * 50)
def test_any_bytes_read_as_a_log_or_a_typed_error(folder, image):
    all_readers(folder / "state.log", image)


@given(frames)
def test_any_frames_with_right_checksums_read_as_a_log_or_a_typed_error(folder, made):
    all_readers(folder / "state.log", forge_log(made))


@given(st.data())
def test_any_edits_of_a_log_read_as_a_log_or_a_typed_error(folder, data):
    path = folder / "state.log"
    if "raw" not in _cache:
        path.unlink(missing_ok=True)
        _cache["raw"] = write_log(path, batches_of(5), base=batches_of(9))
    image = bytearray(_cache["raw"])
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(image)))
        image[start : start + data.draw(st.integers(0, 80))] = data.draw(st.binary(max_size=80))
    all_readers(path, bytes(image))


_cache: dict[str, bytes] = {}


@given(st.binary(max_size=300), st.integers(0, 3))
def test_any_bytes_behind_the_header_of_the_interchange_format_read_as_a_log_or_a_typed_error(
    folder, rest, lost
):
    path = folder / "state.log"
    path.write_bytes((b"PGSS\x02\x00" + rest)[: len(rest) + 6 - lost])
    read(path)


MANIFEST = {
    "schema_version": 1,
    "backend": "foldlog",
    "backend_version": "1",
    "cursor_hex": "00ff",
    "created_at_unix": 1,
    "files": [{"path": "data/fold.log", "size": 1, "blake3": "0" * 64}],
}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4)
    ),
    max_leaves=12,
)


def a_manifest_or_a_value_error(raw: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert isinstance(parse_manifest(raw), ExportManifest)


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_a_value_error(raw):
    a_manifest_or_a_value_error(raw)


@given(st.sampled_from([*MANIFEST, "path", "size", "blake3", "new"]), json_values)
def test_any_field_of_a_manifest_may_be_anything(name, value):
    fields = json.loads(json.dumps(MANIFEST))
    (fields["files"][0] if name in ("path", "size", "blake3") else fields)[name] = value
    a_manifest_or_a_value_error(json.dumps(fields).encode("utf-8", "surrogatepass"))


@given(st.integers(0, 400), st.binary(max_size=12), st.integers(0, 12))
def test_any_edit_of_a_manifest_is_a_manifest_or_a_value_error(at, inserted, removed):
    raw = json.dumps(MANIFEST).encode()
    a_manifest_or_a_value_error(raw[:at] + inserted + raw[at + removed :])


# What reading costs, on files made to be costly: in bytes read and bytes held, not in seconds.


def costly(path: Path, parts: int) -> dict[str, bytes]:
    """Files made to be costly to read: endless headers, false lengths, correct checksums. The more
    `parts`, the larger."""
    raw = write_log(path, batches_of(3))
    header = parse_file_header(raw[: FILE_HEADER.size])
    torn = raw[:-3] + b"\xff\xff\xff"

    def headers(size: int, count: int, *, displaced: int = 0) -> bytes:
        """Consecutive frame headers, each claiming a body of the next `size` bytes."""
        made = bytearray()
        for number in range(count):
            offset = len(torn) + len(made) + displaced
            frame, _ = build_frame(
                header.seed,
                KIND_BATCHES,
                b"",
                seq=9 + number,
                synced_seq=0,
                offset=offset,
                link=0,
                batches=1,
                body_crc=1,
            )
            fields = list(FRAME_HEADER.unpack(frame[: FRAME_HEADER.size]))
            fields[2] = size
            made += repacked(fields, header.seed)
        return bytes(made)

    return {
        "magic numbers": torn + FRAME_MAGIC * (10_000 * parts),
        "headers of long bodies": torn + headers(400_000, 1_000 * parts) + bytes(400_000),
        "displaced headers of long bodies": torn
        + headers(400_000, 1_000 * parts, displaced=1)
        + bytes(400_000),
        "headers of bodies over the limit": torn + headers(2**32 - 1, 700 * parts),
        "zeros": torn + bytes(100_000 * parts),
        "noise": torn + random.Random(1).randbytes(100_000 * parts),
        "no header and magic numbers": bytes(FILE_HEADER.size) + FRAME_MAGIC * (10_000 * parts),
        "sequences without end": raw
        + headers(0, 1)
        + bytes(100)
        + U64_MAX.to_bytes(8, "little") * 1000,
    }


def repacked(fields: list[object], seed: int) -> bytes:
    checked = struct.pack("<IIQQQIBBH", *fields[2:])
    return FRAME_MAGIC + crc32c(checked, seed).to_bytes(4, "little") + checked


@pytest.mark.parametrize("parts", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_files_made_to_be_costly_are_read_in_bounded_memory_and_with_bounded_reads(path, parts):
    made = costly(path, parts)
    readers = {
        "open": lambda files: read(path, files),
        "verify": lambda files: verify_log(path, files=files),
        "salvage": lambda files: salvage_log(path, path.with_name("saved.log"), files=files),
    }
    for (what, image), (name, reader) in itertools.product(made.items(), readers.items()):
        path.write_bytes(image)
        path.with_name("saved.log").unlink(missing_ok=True)
        files = CountedFiles()
        tracemalloc.start()
        try:
            with rebooted():  # or the verdict comes before the search for evidence
                reader(files)
        except InvalidFormatError:
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        # A window of 4 MiB, and a few copies of the rest of the file; never what a length claims.
        assert peak < 12 * 1024 * 1024 + 6 * len(image), f"{name} of {what}: {peak} bytes held"
        assert files.bytes_read < 80 * 1024 * 1024 + 8 * len(image), (
            f"{name} of {what}: {files.bytes_read} bytes read"
        )
        assert files.reads < 83_000 * parts, f"{name} of {what}: {files.reads} reads"
