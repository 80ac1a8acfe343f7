"""The engine: a log, the fold of it, and what carries a fold from file to file. No threads are started here.

    files.py     the seam: every call to the operating system's files
    lock.py      one writer per log, and what it remembers beside it
    leaf.py      the entries of the base, 128 to 512 to a frame
    scan.py      frames read in order, each checked against the chain
    recovery.py  torn or corrupt: the decision, as a pure function
    base.py      the leaves of a log, read when they are touched
    fold.py      base + delta + runs: one immutable state
    format.py    what differs between the file formats
    log.py       the writer's side of a log: append, sync, poison
    rewrite.py   a fold into a new file: creation, compaction, export
    slipstream.py, slipstream_log.py, slipstream_walk.py    the format of the Rust crate: bytes, log, checks
    replay.py    a log into a fold, whatever its format
    opening.py   what opening a log for writing does: the lock, the replay, the repair
    tail.py      a log that another process writes, read on as it grows
    backlog.py   the batches since a cursor
    diff.py      the difference of two folds, at the cost of what changed
    strict_json.py   JSON from outside: manifests, change streams
    artifact.py  export and import
    walk.py      all of a damaged log, piece by piece
    verify.py    every invariant, in code
    salvage.py   what is right of a damaged log, as a new one
    engine.py    AppendLogSnapshot: all of it behind the contract

Data flows down the list on the way to the disk, and up on the way back.
"""
