"""What all tests share: a place for a log, and two deterministic profiles for hypothesis.

`pytest --hypothesis-profile=campaign` tries fifty times as many examples.
"""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("conformance", "logfiles", "refencoder")

pytest_plugins = ["actor_kit", "engine_kit"]  # their fixtures

for profile, examples in (("foldlog", 40), ("campaign", 2000)):
    settings.register_profile(
        profile,
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    )
settings.load_profile("foldlog")

# Ignored in the background of a shell; but what the tests start must hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Under PYTHONDONTWRITEBYTECODE, each program that a test starts would compile foldlog anew:
    half a second each. These programs, and those of later runs, share a cache of pytest's instead.
    """
    cache = getattr(config, "cache", None)
    if cache is not None and os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
        os.environ["PYTHONPYCACHEPREFIX"] = str(cache.mkdir("bytecode"))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Let every other worker collect backwards: in a fresh checkout each then compiles the half of
    the tests that it comes to first, and finds the rest compiled."""
    report = yield
    if isinstance(collector, pytest.Directory) and os.environ.get(
        "PYTEST_XDIST_WORKER", "gw0"
    ).endswith(("1", "3", "5", "7", "9")):
        report.result.reverse()
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All workers must have the same order."""
    items.sort(key=lambda item: item.path)


def leave_out_of_garbage_collection() -> None:
    """Leave what is alive now out of each garbage collection from here on: thousands of collected
    tests and their reports, which made one take 80 ms. Hundreds of tests call for one."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    leave_out_of_garbage_collection()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if nextitem is None or nextitem.path != item.path:
        leave_out_of_garbage_collection()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test's log goes: in a folder of its own, free."""
    folder = tmp_path / "log"
    folder.mkdir()
    return folder / "state.log"
