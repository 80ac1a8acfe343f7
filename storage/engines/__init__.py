"""The engines: what stores a fold, and publishes immutable snapshots of it.

registry.py  the one table of engines
options.py   what an engine is told when it is opened
append_log/  a log and the fold of it
rocksdb/     a RocksDB database
"""
