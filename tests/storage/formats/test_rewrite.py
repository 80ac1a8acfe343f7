"""The decisions of a rewrite that runs beside a writer."""

from __future__ import annotations

import sys

import pytest

from foldlog.storage.formats.rewrite import (
    FINISH_BYTES,
    MAX_PASSES,
    SLACK_BYTES,
    Next,
    allowance_bytes,
    next_pass,
    room_bytes,
)

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("lag", "live", "passes", "expected"),
    [
        (0, 0, 0, Next.FINISH),
        (FINISH_BYTES, 0, 0, Next.FINISH),
        (FINISH_BYTES + 1, 0, 0, Next.AGAIN),
        (30 * MIB, 30 * MIB - 1, 0, Next.AGAIN),
        (30 * MIB, 30 * MIB, 0, Next.CARRY),
        (30 * MIB, 500 * MIB, MAX_PASSES - 1, Next.CARRY),
        (30 * MIB, 500 * MIB, MAX_PASSES, Next.FINISH),
    ],
)
def test_what_costs_less_is_written(lag, live, passes, expected):
    assert next_pass(lag, live, passes) is expected


def test_the_first_pass_leaves_a_third_of_the_room_for_those_after_it():
    assert allowance_bytes(91 * MIB, 31 * MIB, 0, 0, 10) == 31 * MIB + SLACK_BYTES + 20 * MIB
    assert allowance_bytes(91 * MIB, 31 * MIB, 0, 5, 10) == 31 * MIB + SLACK_BYTES + 30 * MIB
    assert allowance_bytes(91 * MIB, 31 * MIB, 0, 10, 10) == 31 * MIB + SLACK_BYTES + 40 * MIB
    assert allowance_bytes(91 * MIB, 31 * MIB, 0, 99, 10) == 31 * MIB + SLACK_BYTES + 40 * MIB


@pytest.mark.parametrize("lag", [0, MIB, 50 * MIB])
@pytest.mark.parametrize("stage", [0, 31 * MIB, 91 * MIB, 900 * MIB])
@pytest.mark.parametrize("made", [0, 1, 2, 3])
def test_nothing_is_allowed_beyond_the_limit(lag, stage, made):
    assert allowance_bytes(91 * MIB, stage, lag, made, 2) <= 91 * MIB
    assert allowance_bytes(91 * MIB, stage, lag, made, 0) <= 91 * MIB


@pytest.mark.parametrize(
    ("free", "needed", "room"),
    [
        (None, 5, sys.maxsize),
        (4, 5, sys.maxsize),
        (5, 5, 0),
        (6, 5, 0),
        (15, 5, 5),
    ],
)
def test_half_of_the_room_that_a_pass_leaves_is_for_what_is_appended_meanwhile(free, needed, room):
    assert room_bytes(free, needed) == room


def test_passes_become_short_though_the_writer_takes_all_that_it_may():
    """Each leaves about half as much as the one before, until little enough is left to finish."""
    limit, stage, lag, passes = 1 << 40, 0, 4096 * MIB, 0
    while next_pass(lag, 1 << 40, passes) is not Next.FINISH:
        lag = allowance_bytes(limit, stage, lag, 1, 1) - stage
        stage += lag
        passes += 1
    assert lag <= FINISH_BYTES
    assert passes < MAX_PASSES
