"""What every part of foldlog shares: values, errors, seams and the frame layout. No I/O, no
threads.

The bottom of the ladder `protocol <- storage <- actors <- foldlog`: it imports none of the others.

    tokens.py    VersionToken and WatchCursor: opaque, up to 10 bytes
    updates.py   Put, Delete, Purge and KvEntry, and the encoding of one batch
    frames.py    the log's frames: layout, checksums, limits
    errors.py    one family of errors, grouped by what the caller does next
    store.py     SnapshotStore: the contract that every store keeps
"""
