"""In the campaigns, what is written is read back at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faultkit import quick_folder
from readback import read_back


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where a campaign keeps its many small files."""
    with quick_folder(tmp_path) as quick:
        yield quick


@pytest.fixture(autouse=True)
def _read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    read_back(monkeypatch)
