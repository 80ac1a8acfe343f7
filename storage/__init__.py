"""The layer below the actors: logs, folds and files. It starts no threads.

    handover.py   thread synchronization that survives exceptions
    forks.py      what a forked child does with what it inherited
    readable.py   the reads that every open store offers
    difference.py the difference between two snapshots
    engines/      what stores a fold: an append-only log, or RocksDB
    log/          the log file: appending, reading in order, recovery, the lock
    fold/         the state: a base in the log, and the changes since
    formats/      the file formats, and rewriting a fold from file to file
    repair/       verify, walk and salvage
    artifacts/    export and import

A write goes engines -> log -> disk; a read goes engines -> fold -> log.
"""
