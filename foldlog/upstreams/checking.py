"""The arguments of upstreams, checked before anything is connected to. Errors show no values: these
may be secrets."""

from __future__ import annotations

import ssl

from foldlog.protocol.options import check_text


def check_texts(**arguments: object) -> None:
    """TypeError unless each is a str or None; ValueError for one that is not UTF-8. `url` and
    `prefix` may not be None."""
    for name, value in arguments.items():
        if value is not None or name in ("url", "prefix"):
            check_text(name, value)


def check_tls(tls: object) -> None:
    """TypeError unless it is an ssl.SSLContext or None."""
    if tls is not None and not isinstance(tls, ssl.SSLContext):
        raise TypeError(f"tls is an ssl.SSLContext, not {type(tls).__name__}")
