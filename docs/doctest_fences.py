"""A griffe extension for the build of the site: examples in docstrings (`>>>`) become code
blocks."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(
    r"^>>> .*(?:\n(?!\s*$).*)*(?:\n\n>>> .*(?:\n(?!\s*$).*)*)*",
    flags=re.MULTILINE,
)


def fenced(docstring: str) -> str:
    """`docstring` with each run of examples in a fence."""
    return _EXAMPLE.sub(
        lambda match: f"```pycon\n{match.group(0)}\n```", docstring
    )


class DoctestFences(griffe.Extension):
    """See the module."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        if obj.docstring is not None and ">>>" in obj.docstring.value:
            obj.docstring.value = fenced(obj.docstring.value)
