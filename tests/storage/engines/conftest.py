"""Shared by the tests of engines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faultkit import quick_folder


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where a test's database goes: free, and on a quick disk if there is one."""
    with quick_folder(tmp_path) as quick:
        yield quick / "state.db"
