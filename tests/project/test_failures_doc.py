"""docs/failures.md tells the truth about its tests: every row names at least one, and each of them exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "failures.md"


def rows() -> list[str]:
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    return [
        line
        for line in lines
        if line.startswith("|") and not re.match(r"\|(---\||\s*failure \|)", line)
    ]


def test_every_failure_names_a_test_that_exists() -> None:
    known: dict[str, set[str]] = {}
    for row in rows():
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        assert all(cells), row
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", cells[4])
        assert named, f"names no test: {row}"
        for file, test in named:
            if file not in known:
                (found,) = (ROOT / "tests").rglob(file)
                tree = ast.parse(found.read_text(encoding="utf-8"))
                known[file] = {
                    node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
                }
            assert test in known[file], f"{file} has no {test}"


def test_every_error_of_the_disk_the_file_and_the_actors_is_in_the_table() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in (
        *(
            "CorruptLogError",
            "ForeignFileError",
            "LogAccessError",
            "InvalidFormatError",
            "LogChangedError",
            "LogRegressedError",
            "LogPoisonedError",
            "StoreLocked",
        ),
        *(
            "ArtifactInvalidError",
            "StoreFailed",
            "ForkedStore",
            "Backpressure",
            "RequestTimeout",
            "WriterCrashed",
            "OSError",
        ),
    ):
        assert f"`{name}`" in page, name
    assert len(rows()) >= 30
