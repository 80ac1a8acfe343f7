"""Shared by the tests of links in virtual time."""

from __future__ import annotations

import asyncio

import pytest
import scripted_upstream


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be done on a thread is done at once, and heartbeats are few."""

    async def inline(call, *arguments):
        return call(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", inline)
    monkeypatch.setattr(scripted_upstream, "BEAT_S", 0.1)
