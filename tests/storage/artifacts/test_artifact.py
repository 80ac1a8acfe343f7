"""Tampered artifacts: a typed error with path and field, no destination, the artifact untouched."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import msgpack
import pytest
from blake3 import blake3
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from logfiles import companions, forge, forge_log, some_batches, write_log

from foldlog import AppendLogSnapshot, ArtifactInvalidError, ExportManifest, Put, WatchCursor
from foldlog.protocol.frames import KIND_BASE_END, KIND_BATCHES, KIND_LEAF
from foldlog.storage.artifacts import artifact as product
from foldlog.storage.artifacts.artifact import ArtifactFile, parse_manifest, read_manifest
from foldlog.storage.fold.leaf import encode_leaf
from foldlog.storage.log.files import Files


@pytest.fixture
def artifact(path, tmp_path):
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put(f"k{n:04}", b"%d" % n) for n in range(700)], WatchCursor.from_u64(9))
        snap.export_to(tmp_path / "artifact")
    return tmp_path / "artifact"


@pytest.fixture
def dest(tmp_path):
    folder = tmp_path / "dest"
    folder.mkdir()
    return folder / "imported.log"


def picture(folder: Path) -> dict[str, object]:
    """All that is in a folder, without following or opening what is not a file."""
    found = {}
    for file in sorted(folder.rglob("*")):
        mode = os.lstat(file).st_mode
        found[str(file.relative_to(folder))] = (
            mode,
            file.read_bytes() if file.is_file() and not file.is_symlink() else None,
        )
    return found


def refused(artifact: Path, dest: Path, match: str = ".") -> ArtifactInvalidError:
    before = picture(artifact)
    with pytest.raises(ArtifactInvalidError, match=match) as caught:
        AppendLogSnapshot.import_artifact(artifact, dest)
    assert picture(artifact) == before
    assert {file.name for file in dest.parent.iterdir()} <= companions(dest)
    assert caught.value.path.is_relative_to(artifact)
    return caught.value


def manifest_of(artifact: Path) -> dict:
    return json.loads((artifact / "MANIFEST.json").read_bytes())


def write_manifest(artifact: Path, fields: object) -> None:
    (artifact / "MANIFEST.json").write_text(json.dumps(fields))


def set_fields(artifact: Path, **fields: object) -> None:
    write_manifest(artifact, manifest_of(artifact) | fields)


def set_file(artifact: Path, **fields: object) -> None:
    """Change what the manifest says of its only file."""
    set_fields(artifact, files=[manifest_of(artifact)["files"][0] | fields])


def put_payload(artifact: Path, raw: bytes, **fields: object) -> None:
    """Exchange the payload, with the size and digest that it has."""
    (artifact / "data" / "fold.log").write_bytes(raw)
    set_fields(artifact, **fields)
    set_file(artifact, size=len(raw), blake3=blake3(raw).hexdigest())


def test_a_manifest_says_exactly_what_was_exported(artifact):
    manifest = manifest_of(artifact)
    payload = (artifact / "data" / "fold.log").read_bytes()
    assert manifest.pop("created_at_unix") > 1_600_000_000
    assert manifest == {
        "schema_version": 1,
        "backend": "foldlog",
        "backend_version": "1",
        "cursor_hex": "0000000000000009",
        "files": [
            {"path": "data/fold.log", "size": len(payload), "blake3": blake3(payload).hexdigest()}
        ],
    }
    read = read_manifest(artifact)
    assert type(read) is ExportManifest
    assert read.files == (ArtifactFile("data/fold.log", len(payload), blake3(payload).hexdigest()),)
    assert parse_manifest(read.to_json()) == read


# The manifest's fields.

NAMES = ["schema_version", "backend", "backend_version", "cursor_hex", "created_at_unix", "files"]
WRONG = [None, True, [], {}, 1.5, -1, "", "x", 2**63, [None]]


@pytest.mark.parametrize("name", NAMES)
def test_a_field_that_is_missing_is_named(artifact, dest, name):
    manifest = manifest_of(artifact)
    del manifest[name]
    write_manifest(artifact, manifest)
    assert name in refused(artifact, dest, name).reason


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize("name", NAMES)
def test_a_field_of_another_value_is_refused(artifact, dest, name, value):
    if (name, value) == ("created_at_unix", -1) or value != manifest_of(artifact)[name]:
        set_fields(artifact, **{name: value})
        error = refused(artifact, dest)
        assert error.path.name in ("MANIFEST.json", "fold.log")
        assert name in error.reason


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        (
            "cursor_hex",
            ["0", "zz", "0G", "ABCD", "00" * 11, "0x00", " 00", "00 ", "٠٠", "00\n"],
            "cursor_hex is not the lower-case hex of a token",
        ),
        (
            "cursor_hex",
            ["", "0000000000000008", "09", "000000000000000900"],
            "cursor_hex is .* the payload is at '0000000000000009'",
        ),
        ("backend", ["append-log", "Foldlog"], "backend"),
        ("backend_version", ["2", "01"], "backend_version"),
        ("schema_version", [2], "schema_version"),
    ],
    ids=["no token", "another cursor", "backend", "backend version", "schema version"],
)
def test_a_cursor_or_a_kind_that_is_not_the_payloads_is_refused(
    artifact, dest, name, values, words
):
    for value in values:
        set_fields(artifact, **{name: value})
        refused(artifact, dest, words)


@pytest.mark.parametrize(
    "value",
    [
        "../fold.log",
        "data/../fold.log",
        "data/../../etc/passwd",
        "/etc/passwd",
        "/data/fold.log",
        "data\\fold.log",
        "data//fold.log",
        "./data/fold.log",
        "data/./fold.log",
        "data/.",
        "data/..",
        "data/.hidden",
        "data",
        "data/",
        "",
        "data/fold.log\0",
        "data/fold.log\n",
        "data/\ud800",
        "data/fold.log/",
        "data/sub/fold.log",
        "DATA/fold.log",
        "data/FOLD.LOG",
        "data/ｆold.log",
        "data/other.log",
        "data/" + "x" * 300,
        "C:fold.log",
        None,
        7,
        ["data/fold.log"],
    ],
    ids=ascii,
)
def test_a_path_that_leads_elsewhere_is_refused(artifact, dest, value):
    set_file(artifact, path=value)
    assert "files" in refused(artifact, dest).reason


@pytest.mark.parametrize(
    "value", [-1, 0, 1, True, 1.0, 1e3, None, "1", 2**63, 2**64, 10**40], ids=repr
)
def test_a_size_that_lies_is_refused(artifact, dest, value):
    set_file(artifact, size=value)
    refused(artifact, dest, "size|bytes")


def test_a_size_off_by_one_is_refused(artifact, dest):
    size = manifest_of(artifact)["files"][0]["size"]
    for wrong in (size - 1, size + 1):
        set_file(artifact, size=wrong)
        refused(artifact, dest, "declared")


def test_a_digest_that_is_not_the_payloads_is_refused(artifact, dest):
    digest = manifest_of(artifact)["files"][0]["blake3"]
    for wrong in (
        digest[:-1] + ("0" if digest[-1] != "0" else "1"),
        digest.upper() if digest.upper() != digest else "A" * 64,
        digest[:-1],
        digest + "0",
        blake3(b"").hexdigest(),
        "sha256:" + digest,
        None,
        " " + digest[1:],
    ):
        set_file(artifact, blake3=wrong)
        refused(artifact, dest, "blake3|BLAKE3")


def test_no_files_or_too_many_are_refused(artifact, dest):
    one = manifest_of(artifact)["files"][0]
    for files in (
        [],
        [one, one],
        [one, one | {"path": "data/other.log"}],
        [one, one | {"path": "data/FOLD.log"}],
        [one] * 5000,
    ):
        set_fields(artifact, files=files)
        refused(artifact, dest, "files")


@pytest.mark.parametrize(
    "field",
    [{"size": 1}, {"path": "data/fold.log", "size": 1}, 7, None, "data/fold.log", []],
    ids=repr,
)
def test_a_declared_file_that_lacks_a_field_is_refused(artifact, dest, field):
    set_fields(artifact, files=[field])
    refused(artifact, dest, r"files\[0\]")


# The manifest's bytes.


@pytest.mark.parametrize(
    "mangle",
    [
        lambda text: "",
        lambda text: "null",
        lambda text: "[]",
        lambda text: "7",
        lambda text: text[:-3],
        lambda text: text + "x",
        lambda text: text + text,
        lambda text: "\ufeff" + text,
        lambda text: text.replace("1", "NaN", 1),
        lambda text: text.replace("1", "Infinity", 1),
        lambda text: text.replace("1", "1" * 10_000, 1),
        lambda text: text.replace("1", "1e999", 1),
        lambda text: text.replace('"backend"', '"backend": "foldlog", "backend"', 1),
        lambda text: text.replace('"size"', '"size": 1, "size"', 1),
        lambda text: text.replace('"backend"', '"comment": "hello", "backend"', 1),
        lambda text: text.replace('"size"', '"mode": 1, "size"', 1),
        lambda text: text.replace('"backend"', '"\\ud800": 1, "backend"', 1),
        lambda text: text.replace('"foldlog"', "'foldlog'"),
        lambda text: text + "\0",
        lambda text: "[" * 200_000,
        lambda text: '{"a":' * 100_000,
        lambda text: text + " " * (1024 * 1024),
    ],
)
def test_a_manifest_that_is_not_strictly_json_is_refused(artifact, dest, mangle):
    text = (artifact / "MANIFEST.json").read_text()
    mangled = mangle(text)
    assert mangled != text
    (artifact / "MANIFEST.json").write_text(mangled)
    refused(artifact, dest)


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xfe{}",
        b"\xff",
        '{"backend": "\xe9"}'.encode("latin-1"),
        "{}".encode("utf-16"),
        bytes(100),
    ],
)
def test_a_manifest_that_is_not_utf_8_is_refused(artifact, dest, raw):
    (artifact / "MANIFEST.json").write_bytes(raw)
    refused(artifact, dest, "JSON")


def test_a_gigantic_manifest_is_refused_unread(artifact, dest):
    with open(artifact / "MANIFEST.json", "r+b") as file:
        file.truncate(1024**3)
    with pytest.raises(ArtifactInvalidError, match="larger than"):
        AppendLogSnapshot.import_artifact(artifact, dest)
    assert not dest.exists()


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.text(max_size=8),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from([*NAMES, "path", "size", "blake3"]), inner),
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(NAMES), json_values))
def test_any_json_is_a_manifest_or_a_value_error(fields):
    sound = {
        "schema_version": 1,
        "backend": "foldlog",
        "backend_version": "1",
        "cursor_hex": "",
        "created_at_unix": 0,
        "files": [{"path": "data/fold.log", "size": 1, "blake3": "0" * 64}],
    }
    try:
        manifest = parse_manifest(json.dumps(sound | fields).encode())
    except ValueError:
        return
    assert parse_manifest(manifest.to_json()) == manifest


# The folder.


@pytest.mark.parametrize("what", ["MANIFEST.json", "data", "data/fold.log", "."])
def test_a_part_that_is_missing_is_named(artifact, dest, what):
    shutil.rmtree(artifact / what) if (artifact / what).is_dir() else (artifact / what).unlink()
    with pytest.raises(ArtifactInvalidError, match="is missing") as caught:
        AppendLogSnapshot.import_artifact(artifact, dest)
    assert caught.value.path == artifact / what
    assert not dest.exists()


@pytest.mark.parametrize("what", ["MANIFEST.json", "data", "data/fold.log"])
@pytest.mark.parametrize(
    "kind", ["link", "dangling link", "pipe", "socket", "folder", "file", "second name"]
)
def test_a_part_of_another_kind_is_refused_at_once(
    artifact, dest, tmp_path, what, kind, monkeypatch
):
    part = artifact / what
    aside = tmp_path / "aside"
    if kind == "second name" and part.is_file():
        os.link(part, aside)
    else:
        part.rename(aside)
        if kind == "link":
            part.symlink_to(aside)
        elif kind == "dangling link":
            part.symlink_to(tmp_path / "nowhere")
        elif kind == "pipe":
            os.mkfifo(part)
        elif kind == "socket":
            monkeypatch.chdir(part.parent)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(part.name)
        elif kind == "folder":
            part.mkdir()
        else:
            part.write_bytes(b"")
    refused(artifact, dest)


def test_a_link_to_an_artifact_is_not_followed(artifact, dest, tmp_path):
    (tmp_path / "link").symlink_to(artifact)
    with pytest.raises(ArtifactInvalidError, match="links are not followed"):
        AppendLogSnapshot.import_artifact(tmp_path / "link", dest)
    assert not dest.exists()


@pytest.mark.parametrize(
    "name", ["extra", "data/extra", "data/.hidden", "sub/extra", "data/sub/extra"]
)
def test_a_file_that_is_not_declared_is_refused(artifact, dest, name):
    (artifact / name).parent.mkdir(exist_ok=True)
    (artifact / name).write_bytes(b"")
    assert "not declared" in refused(artifact, dest).reason
    (artifact / name).unlink()  # a folder that was made for it is left, and is empty
    if "sub" in name:
        refused(artifact, dest, "not declared")


# The payload.


def test_a_payload_with_any_bit_flipped_is_refused_even_under_its_own_digest(artifact, dest):
    raw = (artifact / "data" / "fold.log").read_bytes()
    for bit in range(3, len(raw) * 8, len(raw) // 8 * 3):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        (artifact / "data" / "fold.log").write_bytes(damaged)
        refused(artifact, dest, "BLAKE3")
        put_payload(artifact, bytes(damaged))
        refused(artifact, dest, "byte|not a foldlog")
        put_payload(artifact, raw)


def test_a_payload_that_is_torn_is_refused_and_not_repaired(artifact, dest):
    raw = (artifact / "data" / "fold.log").read_bytes()
    for size in (0, 1, 51, 52, 60, len(raw) // 2, len(raw) - 1):
        put_payload(artifact, raw[:size])
        refused(artifact, dest)
    for tail in (b"\0", bytes(600), b"junk", raw[52:200]):
        put_payload(artifact, raw + tail)
        refused(artifact, dest, "byte")


def leaf_of(*keys):
    return encode_leaf(keys, [b"v"] * len(keys), [b""] * len(keys))


def base_end(leaves, entries, digest=None):
    return KIND_BASE_END, {"cursor": b"", "leaves": leaves, "entries": entries, "digest": digest}


def unseparated(leaf):
    """The leaf with the separators around its keys overwritten, and its own checksum right."""
    keys_len = int.from_bytes(leaf[8:12], "little")
    raw = bytearray(leaf)
    raw[16] = raw[16 + keys_len - 1] = ord("x")
    index_len = int.from_bytes(leaf[4:8], "little")
    raw[12:16] = crc32c(raw[16:index_len], crc32c(raw[:12])).to_bytes(4, "little")
    return bytes(raw)


def forged(frames):
    """A log of these frames; an end of the base without a digest gets the right one."""
    digest = blake3(b"".join(body for kind, body in frames if kind == KIND_LEAF)).digest()
    packed = [
        (
            kind,
            msgpack.packb(body | {"digest": body["digest"] or digest})
            if kind == KIND_BASE_END
            else body,
        )
        for kind, body in frames
    ]
    return forge_log(packed)


def test_a_payload_with_batches_behind_its_base_is_refused(artifact, dest, tmp_path):
    put_payload(
        artifact,
        write_log(tmp_path / "other.log", some_batches(2), sealed=True),
        cursor_hex=WatchCursor.from_u64(2).hex(),
    )
    refused(artifact, dest, "not compact")


SENSELESS = {
    "descending": [(KIND_LEAF, leaf_of("b", "a")), base_end(1, 2)],
    "twice": [(KIND_LEAF, leaf_of("a", "a")), base_end(1, 2)],
    "overlap": [(KIND_LEAF, leaf_of("a", "c")), (KIND_LEAF, leaf_of("b")), base_end(2, 3)],
    "value": [(KIND_LEAF, leaf_of("a")[:-1] + b"w"), base_end(1, 1)],
    "rest": [(KIND_LEAF, leaf_of("a") + b"x"), base_end(1, 1)],
    "version": [(KIND_LEAF, encode_leaf(["a"], [b"v"], [b"x" * 11])), base_end(1, 1)],
    "key": [(KIND_LEAF, encode_leaf(["x" * 65_536], [b"v"], [b""])), base_end(1, 1)],
    "UTF-8": [(KIND_LEAF, leaf_of("a").replace(b"\xffa\xff", b"\xff\xc0\xff")), base_end(1, 1)],
    "separators": [(KIND_LEAF, unseparated(leaf_of("a", "b"))), base_end(1, 2)],
    "digest": [(KIND_LEAF, leaf_of("a")), base_end(1, 1, b"d" * 32)],
    "no end": [(KIND_LEAF, leaf_of("a"))],
    "after the end": [base_end(0, 0), (KIND_LEAF, leaf_of("a"))],
}


@pytest.mark.parametrize("frames", SENSELESS.values(), ids=SENSELESS)
def test_a_payload_that_verifies_and_makes_no_sense_is_refused(artifact, dest, frames):
    put_payload(artifact, forged(frames), cursor_hex="")
    refused(artifact, dest)


def test_a_forged_payload_that_makes_sense_is_taken(artifact, dest):
    put_payload(artifact, forged([(KIND_LEAF, leaf_of("a", "b")), base_end(1, 2)]), cursor_hex="")
    with AppendLogSnapshot.import_artifact(artifact, dest)[1] as snap:
        assert [entry.key for entry in snap.range()] == ["a", "b"]


def test_a_backup_can_be_restored_over_what_came_after_it(artifact, dest):
    """The lock file remembered how far the log had been synced.

    The restored log, with the same log id, seemed to have been cut.
    """
    with AppendLogSnapshot.import_artifact(artifact, dest)[1] as snap:
        snap.apply([Put("later", b"")], WatchCursor.from_u64(10))
    dest.unlink()
    with AppendLogSnapshot.import_artifact(artifact, dest)[1] as snap:
        assert (snap.get("later"), len(snap)) == (None, 700)
    with AppendLogSnapshot.open(dest)[1] as snap:
        assert snap.cursor() == WatchCursor.from_u64(9)


def test_a_payload_with_a_frame_of_a_newer_format_is_refused(artifact, dest):
    raw = (artifact / "data" / "fold.log").read_bytes()
    put_payload(artifact, raw + forge(raw, 77, b""))
    refused(artifact, dest, "newer")
    put_payload(artifact, raw + forge(raw, KIND_BATCHES, b"\xc1", batches=1))
    refused(artifact, dest)


def test_a_sparse_payload_of_gigabytes_is_refused_by_its_size(artifact, dest):
    with open(artifact / "data" / "fold.log", "r+b") as file:
        file.truncate(3 * 1024**3)
    with pytest.raises(ArtifactInvalidError, match="declared"):
        AppendLogSnapshot.import_artifact(artifact, dest)
    assert not dest.exists()


class Meddling(Files):
    """Does something to the world at the first write of the staged copy."""

    def __init__(self, deed) -> None:
        self.deed = deed

    def create(self, path, *, exclusive=False, mode=0o666):
        fd = super().create(path, exclusive=exclusive, mode=mode)
        if ".foldlog-" not in path.name and self.deed is not None:
            deed, self.deed = self.deed, None
            deed()
        return fd


@pytest.mark.parametrize("change", ["grows", "shrinks", "is changed"])
def test_a_payload_that_changes_during_the_import_is_refused(artifact, dest, change):
    payload = artifact / "data" / "fold.log"
    raw = payload.read_bytes()
    changed = {
        "grows": raw + b"x",
        "shrinks": raw[:-1],
        "is changed": raw[:100] + b"?" + raw[101:],
    }[change]
    with pytest.raises(ArtifactInvalidError):
        AppendLogSnapshot.import_artifact(
            artifact, dest, files=Meddling(lambda: payload.write_bytes(changed))
        )
    assert {file.name for file in dest.parent.iterdir()} <= companions(dest)


def test_a_destination_that_appears_during_the_import_is_kept(artifact, dest):
    with pytest.raises(FileExistsError):
        AppendLogSnapshot.import_artifact(
            artifact, dest, files=Meddling(lambda: dest.write_bytes(b"mine"))
        )
    assert dest.read_bytes() == b"mine"
    assert {file.name for file in dest.parent.iterdir()} <= {dest.name, *companions(dest)}


def test_a_folder_that_is_missing_at_the_destination_is_not_made(artifact, tmp_path):
    with pytest.raises(FileNotFoundError):
        AppendLogSnapshot.import_artifact(artifact, tmp_path / "missing" / "x.log")
    assert not (tmp_path / "missing").exists()


# Exports.


def test_an_export_beside_a_folder_of_a_like_name_leaves_that_alone(path, tmp_path):
    mine = tmp_path / "artifact.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("my only copy")
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.export_to(tmp_path / "artifact")
    assert (mine / "thesis.txt").read_text() == "my only copy"


def test_an_export_into_a_missing_folder_fails_and_leaves_nothing(path, tmp_path):
    with AppendLogSnapshot.open(path)[1] as snap, pytest.raises(FileNotFoundError):
        snap.export_to(tmp_path / "missing" / "artifact")
    assert not (tmp_path / "missing").exists()


def test_an_artifact_never_changes_once_it_stands(path, artifact):
    before = picture(artifact)
    with AppendLogSnapshot.open(path)[1] as snap:
        snap.apply([Put("k", b"v")], WatchCursor.from_u64(10))
        snap.compact()
    assert picture(artifact) == before


def test_the_limits_of_a_manifest_are_what_they_are_said_to_be():
    assert product.MAX_MANIFEST_BYTES == 1024 * 1024
