"""The actors that open the engine to many threads, and keep it alive.

    base       what every actor is built on: its life, its mailbox, its answers
    store      the writer, the readers, the syncer, maintenance, and their supervisor
    feeds      who hears of a change: watches, subscribed actors, derived state
    following  reads a log that another process writes
    link       feeds a mirror from its upstream

Data flow: request -> the writer's mailbox -> the log -> `core.snapshot` -> readers and callers.
"""
