"""The engines: what stores a fold, and publishes immutable snapshots of it.

registry.py  the one table of engines
options.py   the options of opening an engine
append_log/  an append-only log and its fold
rocksdb/     a RocksDB database
"""
