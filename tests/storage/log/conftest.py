"""What the tests of recovery share."""

from __future__ import annotations

import pytest


@pytest.fixture(params=[False, True], ids=["same boot", "rebooted"])
def rebooted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """True if the machine was restarted between the writing of a log and its reading."""
    if request.param:
        monkeypatch.setattr("foldlog.storage.log.recovery.boot_id", lambda: "another boot")
    return bool(request.param)
