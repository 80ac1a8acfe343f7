"""The format "slipstream-v2": the log of the Rust crate `beyond-slipstream`.

records.py  the bytes of a record
search.py   whole records in bytes that do not parse
judge.py    where the base ends, and torn or corrupt
walk.py     all of a damaged file, and what is wrong with it
log.py      the format on the seam: reading, appending, rewriting
"""
