"""What a link reports: each state once, and statistics."""

from __future__ import annotations

import logging
from types import SimpleNamespace

from foldlog import LinkState, LinkStats
from foldlog.actors.link import progress as progress_module
from foldlog.actors.link.progress import Progress


def test_each_state_is_told_once_and_a_failure_that_comes_again_is_logged_once(caplog):
    progress, told = Progress("m"), []
    progress.changed = SimpleNamespace(ring=lambda: told.append((progress.state, progress.reason)))
    states = [
        (LinkState.LOST, "away"),
        (LinkState.ATTACHING, "away"),
        (LinkState.LOST, "away"),
        (LinkState.LIVE, ""),
        (LinkState.LOST, "away"),
        (LinkState.LOST, "gone"),
    ]
    assert progress.error is None
    with caplog.at_level(logging.INFO):
        progress.set(LinkState.ATTACHING)  # as it begins
        for state, reason in states:
            progress.set(state, reason)
            progress.set(state, reason)
        progress.fail(error := ValueError("no"))
    assert told == [*states, (LinkState.FAILED, "no")]
    assert progress.error is error
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "m: link lost: away"),
        ("INFO", "m: link live"),
        ("WARNING", "m: link lost: away"),
        ("WARNING", "m: link lost: gone"),
        ("WARNING", "m: link failed: no"),
    ]


def test_statistics_name_what_was_counted(monkeypatch):
    progress = Progress("m")
    assert progress.stats() == LinkStats(
        LinkState.ATTACHING, "", None, float("inf"), 0, 0, 0, 0, 0, 0
    )
    monkeypatch.setattr(progress_module, "time", SimpleNamespace(monotonic=lambda: 9.0))
    progress.set(LinkState.LIVE, "so")
    progress.behind, progress.confirmed_at = 7, 8.0
    names = ("updates", "attaches", "audits", "mended", "resets", "skipped")
    for number, name in enumerate(names, 1):
        setattr(progress, name, number)
    counted = {name: number for number, name in enumerate(names, 1)}
    assert progress.stats() == LinkStats(LinkState.LIVE, "so", lag=7, staleness_s=1.0, **counted)
