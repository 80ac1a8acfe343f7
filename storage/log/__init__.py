"""The log file: appending to it, reading it in order, and deciding what damaged bytes mean.

files.py       the seam: every call to the operating system's files
access.py      owner, group, mode and access list of new files
scan.py        frames read in order, each checked against the chain
recovery.py    torn or corrupt: the decision, as a pure function
log.py         the writer's side of a log: append, sync, poison
opening.py     opening a log for writing: the lock, the replay, the repair
tail.py        a log that another process writes, read as it grows
backlog.py     the batches after a cursor
sidecars/      the small files beside a log: the lock, the note, the origin
"""
