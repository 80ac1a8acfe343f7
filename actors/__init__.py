"""The actors that make the engine a store for many threads, and keep it alive.

    adapter.py      pykka, made fit: a mailbox that can refuse, an actor that restarts in place and always says how it ended
    core.py         what the actors of one store share: the published snapshot, the state, the books
    requests.py     a batch on its way through the writer, and the future that its caller waits on
    writer.py       owns the log and the newest fold: apply, compact, export
    readers.py      serve Get and Range messages from the published snapshot
    internal.py     what the actors of one store tell each other
    maintenance.py  the long work of compaction and export
    syncer.py       syncs in the background, and looks after the log's file
    feeds.py        who is told of changes, and how, without holding up the writer
    delivery.py     tells an actor
    follower.py     a thread that reads a log as another process writes it
    filewatch.py    wake-ups on file events, with a poll as the truth
    supervisor.py   starts them, restarts them by class of error, gives up by rule

Data flows: a request -> the writer's mailbox -> the log -> `core.snapshot` -> readers and callers.
"""
