"""The actors of a store, and the supervisor that keeps them alive.

compactor.py    when the log is compacted, and how long writes wait for it
core.py         what they share: the published snapshot, the state, the statistics
histogram.py    counts and sums by bucket, for the statistics
internal.py     messages between the actors of one store
maintenance.py  the long passes of compactions and exports
policy.py       the supervisor's decisions, as pure functions
readers.py      serve Get and Range messages from the published snapshot
requests.py     what callers ask of the writer, and the futures they wait on
supervisor.py   starts actors, restarts them by class of error, gives up by rule
syncer.py       syncs in the background, and checks the log's file
writer.py       owns the log and the newest fold: apply, compact, export
"""
