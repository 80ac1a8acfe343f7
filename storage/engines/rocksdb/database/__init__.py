"""The database: what foldlog asks of RocksDB, and what it keeps in it.

opening.py  opening a database with the options that the promises need
record.py   the bytes of an entry and of the state record
state.py    reading the state record
scan.py     keys in order
errors.py   RocksDB's messages as typed errors
holder.py   which process holds RocksDB's lock
"""
