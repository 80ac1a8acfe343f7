"""The engine: a log, the fold of it, and what carries a fold from file to file. No threads are started here.

    readable.py    what every open store offers to be read
    append_log.py  AppendLogSnapshot: all of it behind the contract, for one thread
    engine.py      a log and its fold, kept in step
    opening.py     what opening a log for writing does: the lock, the replay, the repair
    lock.py        one writer per log, and what it remembers beside it
    fold.py        base + delta + runs: one immutable state
    delta.py       changes newer than the base: runs, and the delta that they settle into
    base.py        the leaves of a log, read when they are touched
    leaf.py        the entries of the base, 128 to 512 to a frame
    log.py         the writer's side of a log: append, sync, poison
    rewrite.py     a fold into a new file: creation, compaction, export
    replay.py      a log into a fold, whatever its format
    recovery.py    torn or corrupt: the decision, as a pure function
    scan.py        frames read in order, each checked against the chain
    format.py      what differs between the file formats
    slipstream.py, slipstream_log.py, slipstream_walk.py    the format of the Rust crate: bytes, log, checks
    files.py       the seam: every call to the operating system's files

    artifact.py    export and import
    tail.py        a log that another process writes, read on as it grows
    backlog.py     the batches since a cursor
    diff.py        the difference of two folds, at the cost of what changed
    verify.py      every invariant, in code
    salvage.py     what is right of a damaged log, as a new one
    walk.py        all of a damaged log, piece by piece
    collector.py   the garbage collector, held back while much is built
    strict_json.py JSON from outside: manifests, change streams

A write goes down the first list on its way to the disk, a read comes up it. The second is what else can be done with a log.
"""
