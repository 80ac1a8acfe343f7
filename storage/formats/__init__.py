"""The file formats: foldlog's own frames, and the records of the Rust crate.

registry.py   what differs between the formats
replay.py     a log into a fold, whatever its format
rewrite.py    a fold into a new file: creation, compaction, export
slipstream.py, slipstream_log.py, slipstream_walk.py    the format of the Rust crate
"""
