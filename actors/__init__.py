"""The actors that open the engine to many threads, and keep it alive.

    adapter.py      pykka, adapted: an actor restarts in place and always reports its end
    answers.py      the futures that callers wait on, set without waiting
    bookmark.py     how far one subscriber has read, and how it is woken
    attachment.py   one attachment of a link to its upstream
    auditing.py     finds what no change of an upstream told
    compactor.py    when the log is compacted, and how long writes wait for it
    core.py         what a store's actors share: published snapshot, state, statistics
    delivery.py     delivers events to an actor
    dispatcher.py   one thread that serves all subscribed actors
    feeds.py        tells subscribers of changes without delaying the writer
    filewatch.py    wake-ups on file events; a poll is the truth
    follower.py     a thread that reads a log while another process writes it
    histogram.py    counts and sums by bucket, for statistics
    intake.py       what a link gives to its store
    internal.py     messages between the actors of one store
    link.py         feeds a store from an upstream
    mailbox.py      the bounded mailbox of an actor, which can refuse
    maintenance.py  the long passes of compactions and exports
    past.py         what led from one snapshot to another
    prefixes.py     who sleeps until a key under a prefix changes
    progress.py     what a link reports
    readers.py      serve Get and Range messages from the published snapshot
    requests.py     what callers ask of the writer, and the futures they wait on
    resuming.py     what a link decides, as pure functions
    ring.py         the last commit groups, once for all subscribers
    subscription.py the events of one subscriber, in order
    supervisor.py   starts actors, restarts them by class of error, gives up by rule
    syncer.py       syncs in the background, and checks the log's file
    watch.py        a subscription read by a loop
    tail.py         applies the changes of an upstream
    writer.py       owns the log and the newest fold: apply, compact, export

Data flow: request -> the writer's mailbox -> the log -> `core.snapshot` -> readers and callers.
"""
