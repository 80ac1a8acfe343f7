"""Derived state: a longest-prefix route table, kept in step with the store.

The table is immutable: each prefix length has a dict that is replaced, never changed, so readers
need no lock.
"""

from __future__ import annotations

import ipaddress
import tempfile
from collections.abc import Iterable, Sequence
from types import MappingProxyType
from typing import TypeAlias

import foldlog
from foldlog import FoldSnapshot, Put, Update

Table: TypeAlias = MappingProxyType[int, dict[int, str]]
"""prefix length -> network address -> next hop."""


def changed(table: Table, changes: Iterable[tuple[str, bytes | None]]) -> Table:
    """The table after these changes. Copies only the dicts that change."""
    lengths = dict(table)
    copied: set[int] = set()
    for key, where in changes:
        network = ipaddress.IPv4Network(key.removeprefix("route/"))
        length = network.prefixlen
        if length not in copied:
            copied.add(length)
            lengths[length] = dict(lengths.get(length, {}))
        if where is None:
            lengths[length].pop(int(network.network_address), None)
        else:
            lengths[length][int(network.network_address)] = where.decode()
    return MappingProxyType(dict(sorted(lengths.items(), reverse=True)))


def build(state: FoldSnapshot) -> Table:
    return changed(MappingProxyType({}), state.items("route/"))


def update(table: Table, updates: Sequence[Update]) -> Table:
    return changed(table, ((u.key, u.value if isinstance(u, Put) else None) for u in updates))


def lookup(table: Table, address: str) -> str | None:
    """The next hop for the longest matching prefix of `address`. Cost: a lookup per prefix length
    in use."""
    number = int(ipaddress.IPv4Address(address))
    for length, networks in table.items():
        where = networks.get(number >> (32 - length) << (32 - length))
        if where is not None:
            return where
    return None


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, foldlog.open(f"{folder}/r.log") as store:
        store.apply([Put("route/0.0.0.0/0", b"default"), Put("route/10.0.0.0/8", b"site")], 1)
        with foldlog.derive(store, build, update, prefix="route/") as routes:
            print(lookup(routes.value, "10.1.2.3"), lookup(routes.value, "192.0.2.1"))
            before = routes.state
            store.apply([Put("route/10.1.0.0/16", b"rack")], 2)
            routes.wait_for(2)
            print(lookup(routes.value, "10.1.2.3"), "and before:", lookup(before.value, "10.1.2.3"))
            version = store.delete("route/10.0.0.0/8")
            routes.wait_for(seq=version)
            print(lookup(routes.value, "10.9.9.9"), "at batch", routes.snapshot.seq)


if __name__ == "__main__":
    main()
