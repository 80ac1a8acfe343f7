"""What lies below the actors: logs, folds and files. No threads are started here.

    readable.py   what every open store offers to be read
    engines/      a log and its fold in step, for one thread
    log/          the log file: appending, reading in order, recovery, the lock
    fold/         the state: a base in the log, and the changes since
    formats/      the file formats, and what carries a fold from file to file
    repair/       verify, walk and salvage
    artifacts/    export and import

A write goes engines -> log -> disk; a read goes engines -> fold -> log.
"""
