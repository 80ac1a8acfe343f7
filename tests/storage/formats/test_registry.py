"""The one table of formats, and the one of engines: each name that a caller can give has a row."""

from __future__ import annotations

from typing import get_args

import pytest

from foldlog.protocol.store import Backend, FormatName
from foldlog.storage.engines.registry import SEATS
from foldlog.storage.formats.registry import FORMATS, MAGICS, format_named


def test_every_name_of_a_format_and_of_an_engine_has_a_row_and_no_row_is_without_a_name() -> None:
    assert list(FORMATS) == list(get_args(FormatName))
    assert list(SEATS) == list(get_args(Backend))


def test_no_format_can_be_taken_for_another() -> None:
    for magic in MAGICS:
        assert [
            other for other in MAGICS if other.startswith(magic) or magic.startswith(other)
        ] == [magic]
    backends = [format.backend for format in FORMATS.values()]
    assert len(set(backends)) == len(backends)


@pytest.mark.parametrize("name", [None, *FORMATS])
def test_a_new_log_is_of_the_named_format_and_of_the_first_without_a_name(
    name: FormatName | None,
) -> None:
    assert format_named(name).name == (name or get_args(FormatName)[0])
