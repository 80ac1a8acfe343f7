"""Loops over every byte, bit or call: a sample in each run, and all of them in the slow set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import pytest

Point = TypeVar("Point")


def every(stride: int, *, timeout_s: int = 600) -> Any:
    """Give a test the parameter `every`: `stride` by default, 1 in the slow set.

    Choose an odd stride for bits: it visits all eight of a byte.
    """
    slow = [pytest.mark.slow, pytest.mark.timeout(timeout_s)]
    strides = [pytest.param(stride, id="sample"), pytest.param(1, id="all", marks=slow)]
    return pytest.mark.parametrize("every", strides)


def sample(points: Sequence[Point], every: int, *, also: Iterable[Point] = ()) -> list[Point]:
    """One in `every` of the points, in order, with the first, the last and those in `also`."""
    chosen = {*points[::every], *points[-1:], *also}
    return [point for point in points if point in chosen]
