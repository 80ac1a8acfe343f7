"""Upstreams to mirror: NATS JetStream KV buckets, etcd prefixes, other foldlog logs. Each is
imported on first use.

nats_kv.py    NatsKv(url, bucket=)     needs nats-py: the extra `nats`
etcd.py       Etcd(url, prefix=)
log_file.py   LogFile(path)
checking.py   their arguments, checked

nats_connection.py  a connection, and the API of JetStream
nats_pull.py        pull requests, without loss
nats_wire.py        messages on the wire; nats_bulk.py decodes many at a time
http_json.py        JSON over HTTP, for etcd
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from foldlog.protocol.options import check_text

if TYPE_CHECKING:
    from foldlog.protocol.upstream import Upstream
    from foldlog.upstreams.etcd import Etcd
    from foldlog.upstreams.log_file import LogFile
    from foldlog.upstreams.nats_kv import NatsKv

__all__ = ["Etcd", "LogFile", "NatsKv", "from_url"]

_MODULES = {"NatsKv": "nats_kv", "Etcd": "etcd", "LogFile": "log_file"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def from_url(url: str, **options: Any) -> Upstream:
    """The upstream at `nats://HOST:PORT/BUCKET`, `tls://HOST:PORT/BUCKET`,
    `etcd://HOST:PORT/PREFIX`, `etcds://HOST:PORT/PREFIX` or the path of a log. ValueError for any
    other scheme, TypeError for an option that its kind does not have."""
    check_text("an upstream", url)
    scheme, separator, rest = url.partition("://")
    address, _, name = rest.partition("/")
    kind: type[Any]
    if not separator:
        from foldlog.upstreams.log_file import LogFile

        kind, arguments = LogFile, {"path": url}
    elif scheme in ("nats", "tls"):
        from foldlog.upstreams.nats_kv import NatsKv

        kind, arguments = NatsKv, {"url": f"{scheme}://{address}", "bucket": name}
    elif scheme in ("etcd", "etcds"):
        from foldlog.upstreams.etcd import Etcd

        http = "https" if scheme == "etcds" else "http"
        kind, arguments = Etcd, {"url": f"{http}://{address}", "prefix": name}
    else:
        raise ValueError(
            "an upstream is nats://HOST:PORT/BUCKET, etcd://HOST:PORT/PREFIX or a path"
        )
    for option in options.keys() - inspect.signature(kind).parameters.keys():
        raise TypeError(f"{option} is no option of {kind.__name__}")
    upstream: Upstream = kind(**(options | arguments))
    return upstream
