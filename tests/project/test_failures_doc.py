"""docs/failures.md tells the truth about its tests: every row has at least one, and each exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "failures.md"
TESTS = Path(__file__).with_name("failures.toml")


def rows() -> list[tuple[str, list[str]]]:
    """The rows of the tables: section and cells."""
    found, section = [], ""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("|") and not re.match(r"\|(---\||\s*failure \|)", line):
            found.append((section, [cell.strip() for cell in line.strip("|").split("|")]))
    return found


def named_tests() -> dict[tuple[str, str], list[str]]:
    """The tests of each failure, by section and first cell."""
    sections = tomllib.loads(TESTS.read_text(encoding="utf-8"))
    return {
        (section, failure): tests
        for section, failures in sections.items()
        for failure, tests in failures.items()
    }


def test_every_row_says_what_happens_what_is_seen_and_how_to_recover() -> None:
    for _, cells in rows():
        assert len(cells) == 4, cells
        assert all(cells), cells


def test_every_failure_has_a_test_and_every_test_a_failure() -> None:
    failures = [(section, cells[0]) for section, cells in rows()]
    assert len(failures) == len(set(failures)) >= 30
    assert named_tests().keys() == set(failures)
    assert all(named_tests().values())


def test_every_test_of_a_failure_exists() -> None:
    known: dict[str, str] = {}
    for name in sorted({name for tests in named_tests().values() for name in tests}):
        file, test = name.split("::")
        if file not in known:
            known[file] = "".join(
                found.read_text("utf-8") for found in (ROOT / "tests").rglob(file)
            )
        assert re.search(rf"^ *(async )?def {test}\(", known[file], re.MULTILINE), name


def test_every_error_of_the_disk_the_file_and_the_actors_is_in_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in (
        *("CorruptLogError", "ForeignFileError", "LogAccessError", "InvalidFormatError"),
        *("LogChangedError", "LogRegressedError", "LogPoisonedError", "StoreLocked"),
        *("ArtifactInvalidError", "StoreFailed", "ForkedStore", "Backpressure"),
        *("RequestTimeout", "WriterCrashed", "OSError"),
    ):
        assert f"`{name}`" in page, name
