"""Bounded coverage-guided fuzzing of every reader of outside bytes; needs atheris (extra fuzz)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from foldlog import AppendLogSnapshot, Put, WatchCursor
from foldlog.protocol.updates import batches_body, encode_batch
from foldlog.storage.fold.leaf import encode_leaf

RUNS = 20_000


def seeds(reader: str, path: Path) -> list[bytes]:
    """Something right of each kind, to start from."""
    if reader == "batches":
        return [batches_body([encode_batch([Put("a", b"1")], WatchCursor.from_u64(1)).item])]
    if reader == "leaf":
        return [encode_leaf(["a", "b"], [b"1", b""], [b"", b"v"])]
    found = []
    for format in ("foldlog", "slipstream-v2"):
        log = path / f"{format}.log"
        with AppendLogSnapshot.open(log, format=format)[1] as snap:
            snap.apply([Put("a", b"1"), Put("b", b"2")], WatchCursor.from_u64(1))
            snap.export_to(path / format)
        found.append(
            log.read_bytes() if reader == "log" else (path / format / "MANIFEST.json").read_bytes()
        )
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("reader", ["log", "manifest", "batches", "leaf"])
def test_a_fuzzer_finds_nothing_but_typed_errors(tmp_path, reader):
    pytest.importorskip(
        "atheris",
        reason="atheris has no build for every Python; the extra fuzz installs it where it has",
    )
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds(reader, tmp_path)):
        (corpus / str(number)).write_bytes(seed)
    target = Path(__file__).resolve().parents[1] / "kits" / "fuzz_target.py"
    done = subprocess.run(
        [
            sys.executable,
            str(target),
            reader,
            f"-runs={RUNS}",
            "-seed=1",
            "-max_len=4096",
            str(corpus),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"Done {RUNS} runs" in done.stderr
    print(f"{reader}: {RUNS} inputs, nothing but typed errors")
