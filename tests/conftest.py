"""What all tests share: a place for a log, and one deterministic profile for hypothesis."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("conformance", "logfiles", "refencoder")

pytest_plugins = ["actor_kit"]  # its fixtures

settings.register_profile(
    "foldlog",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("foldlog")

# Ignored in the background of a shell; but what the tests start must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test's log goes: in a folder of its own, free."""
    folder = tmp_path / "log"
    folder.mkdir()
    return folder / "state.log"
