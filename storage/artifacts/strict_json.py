"""Strict parsing of untrusted JSON: one object, in UTF-8.

Refused, beyond what `json` refuses:

- a duplicate field, of which `json` silently keeps the last;
- NaN and the infinities, which are not JSON, though Python writes and reads them;
- nesting that exhausts the stack: its RecursionError would escape every `except ValueError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any


def parse_object(raw: bytes, reason: Callable[[ValueError], str]) -> dict[str, Any]:
    """The JSON object in `raw`. ValueError says what is wrong.

    `reason` words the message for a parse error.
    """
    try:
        fields = json.loads(
            raw.decode(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except ValueError as error:
        raise ValueError(reason(error)) from None
    if type(fields) is not dict:
        raise ValueError("is not a JSON object")
    return fields


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field occurs twice")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
