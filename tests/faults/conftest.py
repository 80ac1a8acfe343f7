"""In the campaigns, what is written is read back at once."""

from __future__ import annotations

import pytest
from readback import read_back


@pytest.fixture(autouse=True)
def _read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    read_back(monkeypatch)
