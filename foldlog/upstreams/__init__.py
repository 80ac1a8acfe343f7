"""Upstreams to mirror: NATS JetStream KV buckets, etcd prefixes, other foldlog logs. Each is
imported on first use.

nats_kv.py    NatsKv(url, bucket=)     needs nats-py: the extra `nats`
etcd.py       Etcd(url, prefix=)
log_file.py   LogFile(path)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
    other scheme."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        from foldlog.upstreams.log_file import LogFile

        return LogFile(url)
    address, _, name = rest.partition("/")
    if scheme in ("nats", "tls"):
        from foldlog.upstreams.nats_kv import NatsKv

        return NatsKv(f"{scheme}://{address}", bucket=name, **options)
    if scheme in ("etcd", "etcds"):
        from foldlog.upstreams.etcd import Etcd

        return Etcd(f"http{'s' if scheme == 'etcds' else ''}://{address}", prefix=name, **options)
    raise ValueError("an upstream is nats://HOST:PORT/BUCKET, etcd://HOST:PORT/PREFIX or a path")
