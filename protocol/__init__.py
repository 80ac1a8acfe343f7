"""What every part of foldlog agrees on: values, errors, and the bytes of a frame. No I/O, no threads.

The package stands at the bottom of the ladder `protocol <- storage <- actors <- foldlog`; it imports none of the others.

    tokens.py    VersionToken and WatchCursor: opaque, up to 10 bytes
    updates.py   Put, Delete, Purge and KvEntry, and the encoding of one batch
    frames.py    the log's frames: layout, checksums, limits
    errors.py    the family of errors, by what to do next
    store.py     SnapshotStore: the contract that every store keeps
"""
