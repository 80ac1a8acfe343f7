"""What every part of foldlog shares: values, errors, seams and the frame layout. No I/O, no
threads.

The bottom of the ladder `protocol <- storage <- actors <- foldlog`: it imports none of the others.

    tokens.py    VersionToken and WatchCursor: opaque, up to 10 bytes
    updates.py   Put, Delete, Purge and KvEntry, and the encoding of one batch
    frames.py    the log's frames: layout, checksums, limits
    decoding.py  batches from bytes, or the verdict that no writer produces them
    messages.py  what the actors of a store are asked
    events.py    what subscribers receive
    errors.py    one family of errors, grouped by what the caller does next
    logger.py    the library's logger
    closing.py   what a `with` block closes
    options.py   options: declared, defaulted and checked once
    store.py     SnapshotStore: the contract that every store keeps
    engine.py    the seam between the writer and an engine
    upstream.py  the seam between a mirror and its upstream
"""
